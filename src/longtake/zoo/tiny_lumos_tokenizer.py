"""The video tokenizer of tiny-lumos: an `FSQTokenizer` of 4 x 8 x 8 pixels a code, trained on the world of lanes."""

from pathlib import Path

import numpy as np
import torch

from longtake.hosts.lumos.fsq_tokenizer import FSQTokenizer
from longtake.zoo import lanes, tiny_vae
from longtake.zoo.stages import Stage, Stop, go_on
from longtake.zoo.tiny_lumos_learning import optimizers

LEVELS = (8, 8, 6, 5)
WIDTHS = (16, 32, 64)
OUTER = ("gain", "enter", "leave")  # parts of the names of what Muon is not for
FRAMES = 36  # pixel frames a step
RATE = 4e-3
DIRT = 0.04  # share of digits that are one off, so that the decoder forgives a transformer's slips


def build() -> FSQTokenizer:
    """Untrained."""
    tokenizer = FSQTokenizer(levels=LEVELS, widths=WIDTHS, blocks=1)
    # Convolutions on CPU run up to twice as fast with the channels innermost.
    for module in tokenizer.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    return tokenizer


def train(folder: Path, minutes: float, device: str, seed: int, stop: Stop = go_on) -> FSQTokenizer:
    """Reconstruction alone (squared error, what moves or is vivid five times); short clips first, then long ones."""
    torch.manual_seed(seed)
    tokenizer = build().to(device)
    stage = Stage(
        "tokenizer", folder, {"tokenizer": tokenizer}, minutes, RATE, optimizers=optimizers(tokenizer, OUTER, RATE),
        recipe={"seed": seed}, stop=stop,
    )  # fmt: skip
    for share in stage:
        rng = np.random.default_rng([seed, stage.steps])
        # Both halves carry state from frame to frame: without long clips in training they wear out on long videos.
        frames = int(rng.choice([1, 5, 9, 17] if share < 0.6 else [5, 9, 17, 33]))
        pixels, weight = _clips(rng, frames, max(1, FRAMES // (frames + 3)), device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            values = tokenizer.quantised(pixels)
            if share > 0.3:
                values = dirty(values, LEVELS)
            decoded = tokenizer.pixels(values).float()
        square = (decoded - pixels).square()
        stage.step((square * weight).mean(), psnr=10 * float(torch.log10(4.0 / square.detach().mean())))
    stage.finish()
    with torch.no_grad():  # the very weights that will be shipped: another rounding would give other codes
        for p in tokenizer.parameters():
            p.copy_(p.half().float())
    return tokenizer.eval().requires_grad_(False)


def dirty(values: torch.Tensor, levels: tuple[int, ...], share: float = DIRT) -> torch.Tensor:
    """Values [B, channels, f, h, w] with a `share` of the digits one higher or lower, where there is such a digit."""
    column = torch.tensor(levels, device=values.device).view(-1, 1, 1, 1)
    half = column // 2
    off = torch.rand(values.shape, device=values.device)
    steps = (off < share / 2).to(values) - (off > 1 - share / 2).to(values)
    return torch.minimum((values + steps / half).clamp(min=-1), ((column - 1 - half) / half).to(values))


def encode(tokenizer: FSQTokenizer, video: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> codes [B, 1 + (T - 1) / 4, H / 8, W / 8]."""
    return tokenizer.encode(tiny_vae.to_pixels(video))[:, 0]


def decode(tokenizer: FSQTokenizer, codes: torch.Tensor) -> np.ndarray:
    """Codes [B, F, h, w] -> uint8 [B, 4 F - 3, H, W, 3]."""
    pixels = tokenizer.decode(codes[:, None])
    return ((pixels + 1.0) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def _clips(rng: np.random.Generator, frames: int, count: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [B, 3, T, h, w] and the weight of each [B, 1, T, h, w]: what moves is small, and all that matters."""
    pixels = tiny_vae.to_pixels(np.stack([_clip(rng, frames) for _ in range(count)])).to(device)
    moves = (pixels - pixels.median(2, keepdim=True).values).abs().amax(1, keepdim=True) > 0.15
    vivid = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True) > 0.6
    return pixels, 1.0 + (tiny_vae.WEIGHT - 1.0) * (moves | vivid).float()


def _clip(rng: np.random.Generator, frames: int) -> np.ndarray:
    # A square cut out of the picture: everything in the world is smaller than it, and it costs a quarter.
    size = tiny_vae.CROP
    start = lanes.STRIDE * int(rng.integers(64)) * int(rng.random() < 0.8)  # a whole number of latent frames
    scene = lanes.scene(int(rng.integers(1 << 30)), (start + frames) // lanes.STRIDE + 2, gaps=(1, 2, 4, 8))
    y, x = (8 * rng.integers((lanes.SIZE - size) // 8 + 1, size=2)).tolist()
    return scene.render(frames, start)[:, y : y + size, x : x + size]

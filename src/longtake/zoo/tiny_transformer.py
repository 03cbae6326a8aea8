"""The tiny transformer: a stock `WanTransformer3DModel`, trained chunk by chunk, for many steps and then for four."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from longtake.zoo import causal, tiny_text
from longtake.zoo.clips import CHUNK, Batch, Library
from longtake.zoo.stages import Stage, Stop, begun_with, go_on, read_checkpoint

TIMESTEPS = (1000, 750, 500, 250)
SHIFT = 5.0
FIRST_FILMS = 100
FILMS = 1500  # a shelf this large is not outlived
HISTORY_NOISE = 0.3
OWN = 0.3  # share of windows with a past that the model guessed in one step
ROLLED = 0.5  # the same in the second half of "few": a past that the sampler made
ROLL = 6  # chunks that it made, at most: all that a free run sees is its own
ACTOR, RETURNED = 6.0, 12.0  # weights of a latent cell with an actor in it, on a first visit and on a later one
FIRST_CHUNK = 2.0  # weight of a take's first chunk: everything after leans on it


def warp(timesteps: tuple[int, ...] = TIMESTEPS, shift: float = SHIFT) -> list[float]:
    """The time steps that the model is really given: u -> shift u / (1 + (shift - 1) u)."""
    return [1000.0 * shift * (t / 1000) / (1 + (shift - 1) * (t / 1000)) for t in timesteps]


def build(z_dim: int) -> WanTransformer3DModel:
    """Untrained: four layers of width 128, four heads, patches of 1 x 2 x 2."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=z_dim,
        out_channels=z_dim,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )


def train(
    folder: Path,
    vae: AutoencoderKLWan,
    variant: str,
    stage_name: str,
    minutes: float,
    device: str,
    seed: int,
    batch: int,
    start: Path | None = None,
    stop: Stop = go_on,
) -> tuple[WanTransformer3DModel, UMT5EncoderModel, PreTrainedTokenizerFast]:
    """Teacher forcing on windows of seven chunks of `variant` (short or long); text encoder and transformer learn
    together. Stage "many" learns every noise level; stage "few" learns the sampler's four levels, on histories that are
    the model's own now and then: guessed in one step, and in its second half made by the sampler, chunk after chunk.
    `start` is the checkpoint of another stage to begin with."""
    torch.manual_seed(seed)
    tokens = tiny_text.tokenizer()
    encoder = tiny_text.build(len(tokens)).to(device)
    transformer = build(vae.config.z_dim).to(device)
    modules = {"transformer": transformer, "encoder": encoder}
    few, name = stage_name == "few", f"{variant}-{stage_name}"
    if start is not None:
        load(start, modules, device)
    stage = Stage(
        name, folder, modules, minutes, 1.5e-3 if few else 3e-3,
        recipe={"seed": seed, "batch": batch, "begin": begun_with(start, folder)}, stop=stop,
    )  # fmt: skip
    library = Library(vae, variant, seed + stage.steps)
    library.grow(FIRST_FILMS)
    for share in stage:
        rng = np.random.default_rng([seed, few, stage.steps])
        library.grow(int(library.films < FILMS and rng.random() < 0.3))
        chunks = 7 if variant == "long" or few or share > 0.5 or rng.random() < 0.5 else 4
        window = library.draw(rng, max(1, batch * 7 // chunks), chunks)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            text = tiny_text.embed(tokens, encoder, window.captions)
            loss, actor = _loss(transformer, window, text, rng, few, few and share > 0.5)
        stage.step(loss, actor=actor, films=library.films)
    stage.finish()
    causal.release(transformer)
    return transformer, encoder, tokens


def load(checkpoint: Path, modules: dict[str, torch.nn.Module], device: str = "cpu") -> None:
    """Put a stage's averaged weights into modules."""
    state = read_checkpoint(checkpoint, device)
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])
    parameters = [p for module in modules.values() for p in module.parameters()]
    with torch.no_grad():
        torch._foreach_copy_(list[torch.Tensor](parameters), state["average"])


def _loss(
    transformer: WanTransformer3DModel,
    window: Batch,
    text: torch.Tensor,
    rng: np.random.Generator,
    few: bool,
    rolls: bool = False,
) -> tuple[torch.Tensor, float]:
    x, n = window.latents, window.learn.shape[1]
    first = int((window.learn.amax(0) > 0).nonzero()[0])  # chunks before it are history only
    m = n - first
    clean = x
    if rolls and rng.random() < ROLLED:
        clean = _rolled(transformer, x, text, window.frames, rng, first)
    elif few and rng.random() < OWN:
        # History as the sampler may leave it: the model's own guess at one of its noise levels, given the true past.
        level = float(rng.choice(warp()[1:], p=[0.2, 0.4, 0.4]))
        times = torch.full((len(x), n), level, device=x.device)
        sigma = level / 1000
        noisy = (1 - sigma) * x + sigma * torch.randn_like(x)
        with torch.no_grad():
            clean = noisy - sigma * causal.velocity(transformer, x, noisy, times, text, window.frames).float()
    dirt = torch.from_numpy(rng.uniform(0, HISTORY_NOISE, (len(x), n)) * (rng.random((len(x), 1)) < 0.7))
    dirt = _spread(dirt.to(x))
    clean = (1 - dirt) * clean + dirt * torch.randn_like(x)
    sigmas = torch.from_numpy(_sigmas(rng, (len(x), m), few)).to(x)
    target = x[:, :, first * CHUNK :]
    noise = torch.randn_like(target)
    noisy = (1 - _spread(sigmas)) * target + _spread(sigmas) * noise
    predicted = causal.velocity(transformer, clean, noisy, 1000 * sigmas, text, window.frames)
    error = (predicted.float() - (noise - target)).square().mean(1)  # [B, F, h, w]
    actors = window.actors[:, first * CHUNK :]
    learn = window.learn[:, first:].repeat_interleave(CHUNK, 1)[:, :, None, None]
    if first == 0:
        learn = learn.clone()
        learn[:, :CHUNK] *= FIRST_CHUNK
    weight = learn * torch.tensor([1.0, ACTOR, RETURNED], device=x.device)[actors.long()]
    seen = learn * (actors > 0)
    return (error * weight).sum() / weight.sum(), float((error.detach() * seen).sum() / seen.sum().clamp_min(1))


@torch.no_grad()
def _rolled(
    transformer: WanTransformer3DModel,
    x: torch.Tensor,
    text: torch.Tensor,
    frames: torch.Tensor,
    rng: np.random.Generator,
    first: int,
) -> torch.Tensor:
    """The window x [B, Z, F, h, w] with up to ROLL chunks on end made by the sampler, the first of them from a true
    past; what follows is still to be true, so the model learns to find back. The last chunk is nobody's past."""
    clean, n = x.clone(), x.shape[2] // CHUNK
    begin = int(rng.integers(first, n - 1))
    levels = [t / 1000 for t in warp()]
    for c in range(begin, min(begin + int(rng.integers(1, ROLL + 1)), n - 1)):
        own, seen = slice(c * CHUNK, (c + 1) * CHUNK), slice(0, (c + 1) * CHUNK)
        made = torch.randn_like(x[:, :, own])
        for i, level in enumerate(levels):
            times = torch.full((len(x), 1), 1000 * level, device=x.device)
            guess = made - level * causal.velocity(transformer, clean[:, :, seen], made, times, text, frames[:, seen])
            following = levels[i + 1] if i + 1 < len(levels) else 0.0
            made = (1 - following) * guess + following * torch.randn_like(guess)
        clean[:, :, own] = made
    return clean


def _sigmas(rng: np.random.Generator, shape: tuple[int, int], few: bool) -> np.ndarray:
    # Many steps: from everywhere, with the sampler's region in front. Few: mostly the sampler's own levels.
    exact = rng.choice(np.array(warp()) / 1000, shape)
    u = rng.random(shape)
    near = SHIFT * u / (1 + (SHIFT - 1) * u)
    kind = rng.random(shape)
    return np.where(
        kind < (0.7 if few else 0.0), exact, np.where(kind < (0.9 if few else 0.6), near, rng.random(shape))
    )


def _spread(per_chunk: torch.Tensor) -> torch.Tensor:
    # [B, n] -> [B, 1, 3 n, 1, 1]
    return per_chunk.repeat_interleave(CHUNK, 1)[:, None, :, None, None]


def sample(
    transformer: WanTransformer3DModel, text: torch.Tensor, chunks: int, seed: int, steps: list[float] | None = None,
    window: int = 21, sink: int = 3, size: int = 16,
) -> torch.Tensor:  # fmt: skip
    """Normalised latents [B, Z, 3 chunks, size, size] of a rollout under text [B, T, d]; window and sink in latent
    frames."""
    generator = torch.Generator().manual_seed(seed)
    rollout = causal.Rollout(transformer, steps or warp(), window, sink)
    shape = (len(text), transformer.config.in_channels, CHUNK, size, size)
    parts = [rollout.next(torch.randn(shape, generator=generator), text, generator) for _ in range(chunks)]
    causal.release(transformer)
    return torch.cat(parts, 2)

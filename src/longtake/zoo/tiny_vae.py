"""The tiny video autoencoder: a stock `AutoencoderKLWan` with few channels, trained on the world of lanes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock, unpatchify

from longtake.zoo import lanes
from longtake.zoo.stages import Stage, Stop, go_on

Z_DIM = 16
KL_WEIGHT = 2e-5
CROP = 64  # pixels
WEIGHT = 5.0  # of a pixel that moves or is vivid
DIRT = 0.05  # share of a latent's spread that the decoder learns to forgive


def build() -> AutoencoderKLWan:
    """Untrained, with strides 4 x 8 x 8 and a latent of Z_DIM channels."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,  # pixels are folded 2 x 2 into channels, so the widest grid is 64 x 64: twice as fast
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )
    # Starting with a wide posterior would drown the first signals in noise: the mean is small at the start.
    with torch.no_grad():
        vae.quant_conv.weight[Z_DIM:] = 0.0
        vae.quant_conv.bias[Z_DIM:] = -8.0
        # Residual branches that start at zero make the deep net easy to train: it begins almost linear.
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight.zero_()
            elif isinstance(module, WanAttentionBlock):
                module.proj.weight.zero_()
    # Convolutions on CPU run up to twice as fast with the channels innermost.
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    return vae


def to_pixels(video: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, 3, T, H, W] in -1..1."""
    return torch.from_numpy(video).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def train(folder: Path, minutes: float, device: str, seed: int, stop: Stop = go_on) -> AutoencoderKLWan:
    """Reconstruction (squared error) with a faint KL term; short clips first, then clips of up to 33 frames."""
    torch.manual_seed(seed)
    vae = build().to(device)
    stage = Stage("vae", folder, {"vae": vae}, minutes, 4e-3, recipe={"seed": seed}, stop=stop)
    for share in stage:
        rng = np.random.default_rng([seed, stage.steps])
        # Both halves carry state from frame to frame: without long clips in training they wear out on long videos.
        frames = int(rng.choice([5, 9] if share < 0.7 else [9, 17, 33]))
        pixels, weight = _clips(rng, frames, max(1, 36 // frames), device)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = _decode(vae, posterior.sample())
        error, loss = _errors(decoded, pixels, weight)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).float().mean()
        stage.step(loss + KL_WEIGHT * kl, psnr=10 * float(torch.log10(4.0 / error)), kl=float(kl.detach()))
    stage.finish()
    _measure_latents(vae, seed, device)
    return vae


def refine(folder: Path, vae: AutoencoderKLWan, minutes: float, device: str, seed: int, stop: Stop = go_on) -> None:
    """Train the decoder alone, on the latents that the transformer will learn, dirtied a little as it will do."""
    vae.requires_grad_(True)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    stage = Stage("decoder", folder, {"vae": vae}, minutes, 3e-3, recipe={"seed": seed}, stop=stop)
    std = _per_channel(vae, "latents_std")
    for _ in stage:
        rng = np.random.default_rng([seed, 2, stage.steps])
        frames = int(rng.choice([9, 17, 33, 49]))
        pixels, weight = _clips(rng, frames, max(1, 36 // frames), device)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.mean
                latents = latents + DIRT * std * torch.randn_like(latents)
            decoded = _decode(vae, latents)
        error, loss = _errors(decoded, pixels, weight)
        stage.step(loss, psnr=10 * float(torch.log10(4.0 / error)))
    stage.finish()
    vae.requires_grad_(False)


def load(folder: Path) -> AutoencoderKLWan:
    """The autoencoder of a training, in fp32; where it lay is not written into what is made of it. Raises OSError or
    ValueError where there is none."""
    found: Any = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    vae: Any = AutoencoderKLWan.from_config({k: v for k, v in found.config.items() if k != "_name_or_path"})
    vae.load_state_dict(found.state_dict())
    return vae.eval()


def encode(vae: AutoencoderKLWan, video: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> normalised latents [B, Z, 1 + (T - 1) / 4, H / 8, W / 8], the posterior's mean."""
    with torch.no_grad():
        latents = vae.encode(to_pixels(video).to(vae.device)).latent_dist.mean
    mean, std = (_per_channel(vae, name) for name in ("latents_mean", "latents_std"))
    return (latents - mean) / std


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> np.ndarray:
    """Normalised latents [B, Z, F, h, w] -> uint8 [B, 4 F - 3, H, W, 3]."""
    mean, std = (_per_channel(vae, name) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        pixels = vae.decode(latents * std + mean).sample
    return ((pixels + 1.0) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 arrays, in decibels."""
    error = np.square(first.astype(np.float64) - second.astype(np.float64)).mean()
    return float(10 * np.log10(255.0**2 / error))


def _errors(decoded: torch.Tensor, pixels: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    square = (decoded.float() - pixels).square()
    return square.detach().mean(), (square * weight).mean()


def _clips(rng: np.random.Generator, frames: int, count: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [B, 3, T, h, w] and the weight of each [B, 1, T, h, w]: what moves is small, and all that matters."""
    clips = np.stack([_clip(rng, frames) for _ in range(count)])
    pixels = to_pixels(clips).to(device)
    moves = (pixels - pixels.median(2, keepdim=True).values).abs().amax(1, keepdim=True) > 0.15
    vivid = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True) > 0.6
    return pixels, 1.0 + (WEIGHT - 1.0) * (moves | vivid).float()


def _clip(rng: np.random.Generator, frames: int, size: int = CROP) -> np.ndarray:
    # A square cut out of the picture: everything in the world is smaller than it, and it costs a quarter.
    start = int(rng.integers(256)) * int(rng.random() < 0.8)
    scene = lanes.scene(int(rng.integers(1 << 30)), (start + frames) // lanes.STRIDE + 2, gaps=(1, 2, 4, 8))
    y, x = (8 * rng.integers((lanes.SIZE - size) // 8 + 1, size=2)).tolist()
    return scene.render(frames, start)[:, y : y + size, x : x + size]


def _decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    # Not vae.decode: it clamps to -1..1, and a clamped pixel has no gradient.
    vae.clear_cache()
    hidden, parts = vae.post_quant_conv(latents), []
    for i in range(latents.shape[2]):
        vae._conv_idx = [0]
        parts.append(vae.decoder(hidden[:, :, i : i + 1], vae._feat_map, vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(parts, 2), vae.config.patch_size)


def _measure_latents(vae: AutoencoderKLWan, seed: int, device: str) -> None:
    rng = np.random.default_rng([seed, 1])
    clips = to_pixels(np.stack([_clip(rng, 33, lanes.SIZE) for _ in range(32)])).to(device)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in clips.split(8)])
    # The spread within a clip, not between clips: most of the latter is the background's, and dividing by it would
    # leave the shapes so faint that the sampler's noise hides them until its last step.
    mean, within = latents.mean((0, 2, 3, 4)), latents.var((2, 3, 4)).mean(0).sqrt()
    vae.register_to_config(
        latents_mean=[round(float(m), 5) for m in mean], latents_std=[round(float(s), 5) for s in within]
    )


def _per_channel(vae: AutoencoderKLWan, name: str) -> torch.Tensor:
    return torch.tensor(vae.config[name], device=vae.device).view(1, -1, 1, 1, 1)

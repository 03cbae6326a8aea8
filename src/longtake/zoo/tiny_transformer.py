"""The tiny transformer: a stock `WanTransformer3DModel`, trained chunk by chunk for a four-step sampler."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from longtake.zoo import causal, tiny_text
from longtake.zoo.clips import CHUNK, Batch, Library
from longtake.zoo.stages import Stage

TIMESTEPS = (1000, 750, 500, 250)
SHIFT = 5.0
FIRST_FILMS = 100
HISTORY_NOISE = 0.3
FADED = 0.3  # share of windows


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
    folder: Path, vae: AutoencoderKLWan, minutes: float, device: str, seed: int, batch: int
) -> tuple[WanTransformer3DModel, UMT5EncoderModel, PreTrainedTokenizerFast]:
    """Teacher forcing on windows of four chunks, later of seven too; text encoder and transformer learn together."""
    torch.manual_seed(seed)
    tokens = tiny_text.tokenizer()
    encoder = tiny_text.build(len(tokens)).to(device)
    transformer = build(vae.config.z_dim).to(device)
    stage = Stage("transformer", folder, {"transformer": transformer, "encoder": encoder}, minutes, 3e-3)
    library = Library(vae, seed + stage.steps)
    library.grow(FIRST_FILMS)
    for share in stage:
        rng = np.random.default_rng([seed, stage.steps])
        library.grow(int(rng.random() < 0.5))
        chunks = 4 if share < 0.6 or rng.random() < 0.4 else 7
        window = library.draw(rng, max(1, batch * 4 // chunks), chunks)
        # One row of text per distinct prompt of the batch, then one copy per chunk.
        prompts = sorted({caption for captions in window.captions for caption in captions})
        which = torch.tensor([[prompts.index(caption) for caption in captions] for captions in window.captions])
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            text = tiny_text.embed(tokens, encoder, prompts)[which.to(device)]
            loss = _loss(transformer, window, text, rng, own=share > 0.5 and rng.random() < 0.5)
        stage.step(*loss)
    stage.finish()
    causal.release(transformer)
    return transformer, encoder, tokens


def _loss(
    transformer: WanTransformer3DModel, window: Batch, text: torch.Tensor, rng: np.random.Generator, own: bool
) -> tuple[torch.Tensor]:
    x, n = window.latents, window.learn.shape[1]
    clean = x
    if own:
        # History as the sampler may leave it: the model's own guess at one of its noise levels, given the true past.
        level = float(rng.choice(warp()[1:], p=[0.2, 0.4, 0.4]))
        times = torch.full((len(x), n), level, device=x.device)
        sigma = level / 1000
        noisy = (1 - sigma) * x + sigma * torch.randn_like(x)
        with torch.no_grad():
            clean = noisy - sigma * causal.velocity(transformer, x, noisy, times, text, window.frames).float()
    # Shapes that have faded must come back: the history is mixed with the empty scene now and then.
    faded = torch.from_numpy(rng.random((len(x), n)) * (rng.random((len(x), 1)) < FADED)).to(x)
    clean = clean + _spread(faded) * (window.empty - clean)
    dirt = torch.from_numpy(rng.uniform(0, HISTORY_NOISE, (len(x), n)) * (rng.random((len(x), 1)) < 0.7))
    dirt = _spread(dirt.to(x))
    clean = (1 - dirt) * clean + dirt * torch.randn_like(x)
    sigmas = torch.from_numpy(_sigmas(rng, (len(x), n))).to(x)
    noise = torch.randn_like(x)
    noisy = (1 - _spread(sigmas)) * x + _spread(sigmas) * noise
    predicted = causal.velocity(transformer, clean, noisy, 1000 * sigmas, text, window.frames)
    error = (predicted.float() - (noise - x)).square().unflatten(2, (n, CHUNK)).mean((1, 3, 4, 5))  # [B, n]
    return ((error * window.learn).sum() / window.learn.sum(),)


def _sigmas(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    # Mostly the sampler's own noise levels, some of the same region, a few from everywhere.
    exact = rng.choice(np.array(warp()) / 1000, shape)
    u = rng.random(shape)
    near = SHIFT * u / (1 + (SHIFT - 1) * u)
    kind = rng.random(shape)
    return np.where(kind < 0.6, exact, np.where(kind < 0.85, near, rng.random(shape)))


def _spread(per_chunk: torch.Tensor) -> torch.Tensor:
    # [B, n] -> [B, 1, 3 n, 1, 1]
    return per_chunk.repeat_interleave(CHUNK, 1)[:, None, :, None, None]


def sample(
    transformer: WanTransformer3DModel, text: torch.Tensor, chunks: int, seed: int, steps: list[float] | None = None,
    window: int = 21, sink: int = 3,
) -> torch.Tensor:  # fmt: skip
    """Normalised latents [B, Z, 3 chunks, 8, 8] of a rollout under text [B, T, d]; window and sink in latent frames."""
    generator = torch.Generator().manual_seed(seed)
    rollout = causal.Rollout(transformer, steps or warp(), window, sink)
    shape = (len(text), transformer.config.in_channels, CHUNK, 8, 8)
    parts = [rollout.next(torch.randn(shape, generator=generator), text, generator) for _ in range(chunks)]
    causal.release(transformer)
    return torch.cat(parts, 2)

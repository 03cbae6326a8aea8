"""Diffusion forcing: every chunk of a window at a noise level of its own, in one forward with gradients.

As the staggered sampler runs a model, so it is trained: a chunk sees the chunks before it *at the noise they have*,
each with its own timestep, and itself; nothing sees a later chunk. Chunks stand on the batch axis of the stock forward,
and a self-attention processor puts them back on the token axis, so no mask is needed.

Letters: B videos, F latent frames, n chunks of c frames, N tokens, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.zoo.causal import Rotation, rotation

LAGS, LAG_SHARES = (5, 10, 15, 25), (0.2, 0.5, 0.2, 0.1)  # steps between neighbours, and how often
STAIRCASE = 0.6  # share of windows whose levels are a moment of the sampler; the others' are independent
FINISHED = 0.3  # share of chunks that are finished, where levels are independent
STRAIGHT = 0.4  # share of independent levels drawn evenly; the others crowd where the sampler's do


def velocity(transformer: Any, noisy: Tensor, sigmas: Tensor, text: Tensor, frames: Tensor) -> Tensor:
    """Predicted velocity (noise - clean) [B, Z, F, h, w] of every chunk.

    noisy [B, Z, F, h, w]; sigmas [B, n], the noise levels of its n chunks; text [B, T, d]; frames [B, F], temporal
    positions. The transformer's processors are replaced: `release` gives the stock ones back.
    """
    n = sigmas.shape[1]
    parts = noisy.unflatten(2, (n, -1)).transpose(1, 2)  # [B, n, Z, c, h, w]
    texts = text[:, None].expand(-1, n, -1, -1)
    rotary = rotation(transformer, frames.unflatten(1, (n, -1)), noisy.shape[3] // 2, noisy.shape[4] // 2)
    attention = _ChunkCausal(n, rotary)
    for block in transformer.blocks:
        block.attn1.set_processor(attention)
        block.attn2.set_processor(_attend_text)
    out = transformer(parts.flatten(0, 1), 1000 * sigmas.flatten(), texts.flatten(0, 1), return_dict=False)[0]
    return out.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)


def release(transformer: Any) -> None:
    """Give the stock attention processors back."""
    for block in transformer.blocks:
        for attn in (block.attn1, block.attn2):
            attn.set_processor(type(attn)._default_processor_cls())


def staircase(rng: np.random.Generator, levels: tuple[float, ...], chunks: int, lag: int) -> np.ndarray:
    """Noise levels [chunks] at a random moment of a staggered take: finished chunks are at 0, each of the others `lag`
    steps behind the one before it; NaN for those that have not entered. At least one is being denoised."""
    steps = len(levels) - 1
    row = int(rng.integers(steps + lag * (chunks - 1)))
    at = row - lag * np.arange(chunks)
    table = np.array(levels)  # the last level is 0
    return np.where(at < 0, np.nan, table[at.clip(0, steps)])


def draw_sigmas(
    rng: np.random.Generator, shape: tuple[int, int], levels: tuple[float, ...], shift: float
) -> np.ndarray:
    """Noise levels [B, n] for a training step. Chunks that the staircase leaves out get independent ones: nobody sees
    them, but they learn."""
    u = rng.random(shape)
    free = np.where(rng.random(shape) < STRAIGHT, u, shift * u / (1 + (shift - 1) * u))
    free = np.where(rng.random(shape) < FINISHED, 0.0, free)
    for i in range(shape[0]):
        if rng.random() < STAIRCASE:
            stairs = staircase(rng, levels, shape[1], int(rng.choice(LAGS, p=LAG_SHARES)))
            free[i] = np.where(np.isnan(stairs), free[i], stairs)
        elif not free[i].any():
            free[i, -1] = u[i, -1]  # something has to be learnt
    return free


class _ChunkCausal:
    """Self-attention over n chunks that arrive as batch entries: chunk g looks at the chunks up to g."""

    def __init__(self, n: int, rotary: Rotation) -> None:
        self.n, self.rotary = n, rotary

    def __call__(self, attn: Any, hidden: Tensor, *_: object, **__: object) -> Tensor:
        heads = lambda x: x.reshape(-1, self.n * x.shape[1], attn.heads, x.shape[2] // attn.heads)  # [B, N, H, D]
        q, k, v = heads(attn.norm_q(attn.to_q(hidden))), heads(attn.norm_k(attn.to_k(hidden))), attn.to_v(hidden)
        v = heads(v).transpose(1, 2)
        q, k = (_rotate(x, self.rotary).to(v.dtype).transpose(1, 2) for x in (q, k))
        size = hidden.shape[1]
        parts = [
            _attend(q[:, :, g * size : (g + 1) * size], k[:, :, : (g + 1) * size], v[:, :, : (g + 1) * size])
            for g in range(self.n)
        ]
        return attn.to_out[0](torch.cat(parts, 2).transpose(1, 2).flatten(2).reshape(hidden.shape))


def _attend_text(attn: Any, hidden: Tensor, text: Tensor, *_: object, **__: object) -> Tensor:
    q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
    q, k, v = (x.to(v.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
    return attn.to_out[0](_attend(q, k, v).transpose(1, 2).flatten(2))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Spelled out: for short sequences the backward pass of the fused CPU kernel takes several times as long.
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(-1) @ v


def _rotate(x: Tensor, rotary: Rotation) -> Tensor:
    cos, sin = rotary
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

"""A throw-away MAGI-1 DiT: one chunk, one forward, plain functions over the checkpoint's own weight names.

Only what the distilled 4.5B layout does at a tiny size: shared pre-LayerNorm, self- and cross-attention side by side,
one tanh-capped gate per branch, LayerNorm after each branch, no shift or scale modulation. Everything that depends on
the past is behind one seam:

    layers[i].attend(q, k, v) -> out    q, out [B, N, Hq, D]; k, v [B, N, Hk, D], Hq a multiple of Hk

q and k come after their per-head LayerNorm and before any rotation, so the layer object owns rotation, K/V storage
and attention; `rotary_table` and `chunk_positions` say how MAGI rotates, in the words

    angle[n, pair] = position[n, axis[pair]] · frequency[pair].

Letters: B batch, C latent channels, F latent frames of a chunk, N = F·h·w tokens, S text tokens, Hq query heads, Hk
KV heads, D head dim, P rotated pairs, E hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as fn
from torch import Tensor

Weights = Mapping[str, Tensor]


class Layer(Protocol):
    """What the model asks of the past, per transformer layer."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Un-rotated q [B, N, Hq, D], k, v [B, N, Hk, D] of the chunk being forwarded -> [B, N, Hq, D]."""
        ...


@dataclass(frozen=True)
class MagiConfig:
    """What the weights do not tell.

    query_heads, kv_heads: counts. patch: latent cells per token edge in height and width (1 in time).
    step_size: the distilled model's second time input, 2·num_steps/4 for schedules with evenly spaced indices.
    interleave: slices in which self- and cross-attention channels alternate before the output projection.
    gate_cap: the gates are tanh(g / cap)·cap. eps: of every LayerNorm.
    """

    query_heads: int
    kv_heads: int
    patch: int
    step_size: float
    interleave: int = 8
    gate_cap: float = 1.0
    eps: float = 1e-6


@dataclass(frozen=True)
class RotaryTable:
    """Half-split pairs over the first 2·P channels, the rest unrotated: pair p is channels (p, p + P).

    axis [P] int64: 0 time, 1 height, 2 width. frequency [P]: radians per unit of position.
    """

    axis: Tensor
    frequency: Tensor


def rotary_table(weights: Weights) -> RotaryTable:
    """The learned bands once per axis, axis after axis: t bands, h bands, w bands (3/4 of the channels in total)."""
    bands = weights["rope.bands"]
    return RotaryTable(torch.arange(3).repeat_interleave(len(bands)), bands.repeat(3))


def chunk_positions(first_frame: int, frames: int, height: int, width: int) -> Tensor:
    """Positions [N, 3] on axes t, h, w of a chunk's tokens, t-major.

    t is the latent frame since the start of the video. h and w (height, width: the token grid) are centred at 0 and
    stretched as if the grid had the area of 16·16 tokens: with s = sqrt(256 / (height·width)), an axis of n tokens
    spans -(n·s - 1)/2 .. (n·s - 1)/2.
    """
    stretch = (256 / (height * width)) ** 0.5
    t = torch.arange(first_frame, first_frame + frames, dtype=torch.float32)
    h, w = (_centred(n, n * stretch) for n in (height, width))
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij"), dim=-1).flatten(0, 2)


def rotate(x: Tensor, positions: Tensor, table: RotaryTable) -> Tensor:
    """Rotate x [B, N, H, D] by positions [N, 3]."""
    angle = (positions[:, table.axis] * table.frequency)[None, :, None]  # [1, N, 1, P]
    cos, sin, pairs = angle.cos(), angle.sin(), angle.shape[-1]
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped-query attention without a mask: q [B, N, Hq, D], k, v [B, M, Hk, D] -> [B, N, Hq, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return fn.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def schedule(num_steps: int) -> Tensor:
    """Times [num_steps + 1] from noise (0) to data (1): t = y/(3 - 2y) with y = (k/num_steps)²."""
    y = torch.linspace(0, 1, num_steps + 1) ** 2
    return y / (3 - 2 * y)


def patch_tokens(weights: Weights, x: Tensor) -> Tensor:
    """Embed latents [B, C, F, H, W] to tokens [B, N, E]; also FlowCache's reuse feature."""
    kernel = weights["x_embedder.weight"]
    return fn.conv3d(x, kernel, stride=kernel.shape[2:]).flatten(2).transpose(1, 2)


def forward_chunk(
    weights: Weights, cfg: MagiConfig, x_chunk: Tensor, t: Tensor, text: Tensor, mask: Tensor, layers: Sequence[Layer]
) -> Tensor:
    """Velocity of one chunk, same shape as x_chunk.

    x_chunk [1, C, F, H, W]; t: scalar tensor in 0..1 (0 is noise); text [S, caption channels]; mask [S], non-zero
    where text is real.
    """
    hidden = patch_tokens(weights, x_chunk)  # [1, N, E]
    caption = fn.silu(_linear(weights, "y_embedder.y_proj_xattn.0", text[mask.bool()]))[None]  # [1, S', E]
    condition = _condition(weights, cfg, t)
    for i, layer in enumerate(layers):
        hidden = _block(weights, cfg, f"videodit_blocks.layers.{i}.", hidden, caption, condition, layer)
    hidden = _linear(weights, "final_linear.linear", _norm(weights, cfg, "videodit_blocks.final_layernorm", hidden))
    _, channels, frames, height, width = x_chunk.shape
    p = cfg.patch
    grid = hidden.view(1, frames, height // p, width // p, p, p, channels)
    return grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(x_chunk.shape)


def _block(
    weights: Weights, cfg: MagiConfig, name: str, hidden: Tensor, caption: Tensor, condition: Tensor, layer: Layer
) -> Tensor:
    gates = _linear(weights, name + "ada_modulate_layer.proj.0", fn.silu(condition))
    gate_attention, gate_mlp = (torch.tanh(gates / cfg.gate_cap) * cfg.gate_cap).chunk(2, dim=-1)  # [E] each

    out = _attentions(weights, cfg, name + "self_attention.", hidden, caption, layer)
    hidden = hidden + _norm(weights, cfg, name + "self_attn_post_norm", out * gate_attention)

    out = _norm(weights, cfg, name + "mlp.layer_norm", hidden)
    out = _linear(weights, name + "mlp.linear_fc2", fn.gelu(_linear(weights, name + "mlp.linear_fc1", out)))
    return hidden + _norm(weights, cfg, name + "mlp_post_norm", out * gate_mlp)


def _attentions(weights: Weights, cfg: MagiConfig, name: str, hidden: Tensor, caption: Tensor, layer: Layer) -> Tensor:
    """Self- and cross-attention of the same normalised input, interleaved and projected back to [1, N, E]."""

    def heads(part: str, x: Tensor, count: int) -> Tensor:
        return _linear(weights, name + part, x).unflatten(-1, (count, -1))

    x = _norm(weights, cfg, name + "linear_qkv.layer_norm", hidden)
    q = _norm(weights, cfg, name + "q_layernorm", heads("linear_qkv.q", x, cfg.query_heads))
    k = _norm(weights, cfg, name + "k_layernorm", heads("linear_qkv.k", x, cfg.kv_heads))
    own = layer.attend(q, k, heads("linear_qkv.v", x, cfg.kv_heads))

    q = _norm(weights, cfg, name + "q_layernorm_xattn", heads("linear_qkv.qx", x, cfg.query_heads))
    k, v = heads("linear_kv_xattn", caption, cfg.kv_heads).chunk(2, dim=-1)  # per head K | V
    cross = attention(q, _norm(weights, cfg, name + "k_layernorm_xattn", k), v)

    slices = torch.stack([part.flatten(2).unflatten(-1, (cfg.interleave, -1)) for part in (own, cross)], dim=3)
    return _linear(weights, name + "linear_proj", slices.flatten(2))


def _condition(weights: Weights, cfg: MagiConfig, t: Tensor) -> Tensor:
    """Condition vector [E/4]: time + step size + last-but-one row of the learned null caption (passes with text).

    One embedder serves time and step size, and multiplies either by 1000.
    """

    def embed(value: Tensor) -> Tensor:
        rate = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        wave = 1000 * value * rate
        wave = fn.silu(_linear(weights, "t_embedder.mlp.0", torch.cat([wave.cos(), wave.sin()])))
        return _linear(weights, "t_embedder.mlp.2", wave)

    null_text = _linear(weights, "y_embedder.y_proj_adaln.0", weights["y_embedder.null_caption_embedding"][-2])
    return embed(t) + embed(torch.tensor(cfg.step_size)) + null_text


def _centred(count: int, extent: float) -> Tensor:
    steps = torch.arange(count, dtype=torch.float32) - (count - 1) / 2
    return steps * ((extent - 1) / max(count - 1, 1))


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return fn.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def _norm(weights: Weights, cfg: MagiConfig, name: str, x: Tensor) -> Tensor:
    """LayerNorm over the last axis. Stored weights are γ - 1, except in the two pre-norms inside attention and
    MLP."""
    weight = weights[name + ".weight"]
    if not name.endswith(".layer_norm"):
        weight = 1 + weight
    return fn.layer_norm(x, weight.shape, weight, weights[name + ".bias"], cfg.eps)

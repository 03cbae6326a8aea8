"""Slow, obvious twins of the causal Wan host: one dense forward over all frames at once, masked block by block.

`block_causal_forward` is the stock diffusers model with a plain attention processor. `wan_twin` is the network written
out in plain torch, every operation in one dtype: in fp64 it is the truth, in bf16 it emulates how the published code
runs (weights, norms' outputs, modulation and rotated keys all rounded to bf16).
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def block_causal_mask(spans: Sequence[int], tokens_per_frame: int) -> Tensor:
    """[N, N] bool: a token sees its own block and all blocks before it."""
    block = torch.arange(len(spans)).repeat_interleave(torch.tensor(spans) * tokens_per_frame)
    return block[:, None] >= block[None, :]


class DenseAttention:
    """The textbook attention processor: rotate, softmax over a mask, no cache."""

    def __init__(self, mask: Tensor | None):
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
        if rotary_emb is not None:
            cos, sin = (x.transpose(1, 2) for x in rotary_emb)  # [1, 1, N, D], every value twice
            q, k = (x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin for x in (q, k))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.mask is not None and rotary_emb is not None:
            logits = logits.masked_fill(~self.mask, float("-inf"))
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


@torch.no_grad()
def block_causal_forward(
    transformer, latents: Tensor, frame_timesteps: Sequence[float], text: Tensor, spans: Sequence[int]
) -> Tensor:
    """Velocity [B, C, f, h, w] of all frames, from one forward of the stock model; its weights are left alone."""
    model = copy.deepcopy(transformer)
    per_frame = latents.shape[3] * latents.shape[4] // 4
    mask = block_causal_mask(spans, per_frame)
    for block in model.blocks:
        block.attn1.set_processor(DenseAttention(mask))
        block.attn2.set_processor(DenseAttention(None))
    timestep = torch.tensor(frame_timesteps, dtype=torch.float32).repeat_interleave(per_frame)
    return model(latents, timestep.expand(len(latents), -1), text, return_dict=False)[0]


def rollout(
    velocity: Callable[[Tensor, list[float], list[int]], Tensor],
    noise: Sequence[Sequence[Tensor]], timesteps: Sequence[float], first: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Few-step chunks [B, C, f, h, w], each denoised by forwards over all frames so far: clean at t = 0, then noisy.

    `velocity(latents, frame_timesteps, spans)`; `noise[chunk]` holds the chunk's noise and what each step adds.
    """
    done = [] if first is None else [first]
    chunks = []
    for draws in noise:
        x = draws[0]
        for step, t in enumerate(timesteps):
            latents = torch.cat([*done, x], 2)
            spans = [part.shape[2] for part in (*done, x)]
            times = [0.0] * sum(spans[:-1]) + [t] * spans[-1]
            x0 = x - t / 1000 * velocity(latents, times, spans)[:, :, -spans[-1] :]
            if step + 1 < len(timesteps):
                sigma = timesteps[step + 1] / 1000
                x = (1 - sigma) * x0 + sigma * draws[step + 1]
        done.append(x0)
        chunks.append(x0)
    return chunks


@torch.no_grad()
def wan_twin(
    weights: dict[str, Tensor], layers: int, heads: int, latents: Tensor, frame_timesteps: Sequence[float],
    text: Tensor, spans: Sequence[int], dtype: torch.dtype, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Velocity [B, C, f, h, w] of all frames; `weights` under diffusers' names, everything computed in `dtype`."""
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    linear = lambda name, x: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    dim = w["patch_embedding.weight"].shape[0]
    layer_norm = lambda x, *affine: F.layer_norm(x, (dim,), *affine, eps=eps)

    def rms_norm(name: str, x: Tensor) -> Tensor:
        wide = x if dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(dtype) * w[f"{name}.weight"]

    batch, _, frames, height, width = latents.shape
    rows, columns = height // 2, width // 2
    x = F.conv3d(latents.to(dtype), w["patch_embedding.weight"], w["patch_embedding.bias"], stride=(1, 2, 2))
    x = x.flatten(2).transpose(1, 2)  # [B, N, dim]

    half = w["condition_embedder.time_embedder.linear_1.weight"].shape[1] // 2
    angle = torch.tensor(frame_timesteps, dtype=torch.float64)[:, None] * 10000 ** (-torch.arange(half).double() / half)
    time = linear("condition_embedder.time_embedder.linear_1", torch.cat((angle.cos(), angle.sin()), -1).to(dtype))
    time = linear("condition_embedder.time_embedder.linear_2", F.silu(time))  # [f, dim]
    modulation = linear("condition_embedder.time_proj", F.silu(time)).unflatten(1, (6, dim))
    per_token = lambda m: m.repeat_interleave(rows * columns, 0)
    time, modulation = per_token(time), per_token(modulation)  # [N, dim], [N, 6, dim]
    context = linear("condition_embedder.text_embedder.linear_1", text.to(dtype))
    context = linear("condition_embedder.text_embedder.linear_2", F.gelu(context, approximate="tanh"))

    pairs = dim // heads // 2
    side = dim // heads // 6
    ladders = [10000 ** (-torch.arange(n).double() / n) for n in (pairs - 2 * side, side, side)]
    places = torch.meshgrid(*(torch.arange(n).double() for n in (frames, rows, columns)), indexing="ij")
    angles = torch.cat([p.flatten()[:, None] * ladder for p, ladder in zip(places, ladders, strict=True)], -1)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [N, 1, pairs]

    def rotate(x: Tensor) -> Tensor:
        return (
            torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (pairs, 2))) * turn).flatten(-2).to(dtype)
        )

    def attention(name: str, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        q, k = (
            rms_norm(f"{name}.norm_q", linear(f"{name}.to_q", x)),
            rms_norm(f"{name}.norm_k", linear(f"{name}.to_k", source)),
        )
        q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, linear(f"{name}.to_v", source)))
        if mask is not None:
            q, k = rotate(q), rotate(k)
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), attn_mask=mask)
        return linear(f"{name}.to_out.0", out.transpose(1, 2).flatten(2))

    mask = block_causal_mask(spans, rows * columns)
    for i in range(layers):
        at = f"blocks.{i}"
        shift, scale, gate, f_shift, f_scale, f_gate = (w[f"{at}.scale_shift_table"] + modulation).unbind(1)
        h = layer_norm(x) * (1 + scale) + shift
        x = x + attention(f"{at}.attn1", h, h, mask) * gate
        h = layer_norm(x, w[f"{at}.norm2.weight"], w[f"{at}.norm2.bias"])
        x = x + attention(f"{at}.attn2", h, context, None)
        h = linear(f"{at}.ffn.net.0.proj", layer_norm(x) * (1 + f_scale) + f_shift)
        x = x + linear(f"{at}.ffn.net.2", F.gelu(h, approximate="tanh")) * f_gate
    shift, scale = (w["scale_shift_table"] + time[:, None]).unbind(1)
    x = linear("proj_out", layer_norm(x) * (1 + scale) + shift)  # [B, N, 2·2·C]
    x = x.view(batch, frames, rows, columns, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
    return x.reshape(batch, -1, frames, height, width)

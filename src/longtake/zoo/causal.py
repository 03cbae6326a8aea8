"""Chunk-causal use of a stock `WanTransformer3DModel`: all chunks at once to train, one after the other to sample.

Training puts the chunks of a video on the batch axis of the stock forward, so that each chunk has its own time step; a
self-attention processor puts them back on the token axis, each with its own past. Sampling keeps keys and values.

Letters: B videos, F latent frames, n chunks of c frames, S sequence chunks (clean and noisy), N tokens, H heads, D head
dim.
"""

from dataclasses import dataclass, field

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch.nn import functional

Rotation = tuple[torch.Tensor, torch.Tensor]  # cos, sin: [B, N, 1, D / 2]


def velocity(
    transformer: WanTransformer3DModel,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
    frames: torch.Tensor,
) -> torch.Tensor:
    """Predicted velocity (noise - clean) of the last m chunks, given the clean chunks before each, in one forward.

    clean [B, Z, F, h, w] of n chunks; noisy [B, Z, m F / n, h, w]; timesteps [B, m] in 0..1000; text [B, T, d];
    frames [B, F] temporal positions.
    """
    m = timesteps.shape[1]
    n = clean.shape[2] // (noisy.shape[2] // m)
    # The last clean chunk is nobody's history.
    parts = torch.cat([_chunks(clean, n)[:, :-1], _chunks(noisy, m)], 1)  # [B, S, Z, c, h, w]
    times = torch.cat([torch.zeros_like(timesteps[:, :1]).expand(-1, n - 1), timesteps], 1)
    texts = text[:, None].expand(-1, n - 1 + m, -1, -1)
    grid = _chunks(frames[:, None, :, None, None], n)[:, :, 0, :, 0, 0]  # [B, n, c]
    places = torch.cat([grid[:, :-1], grid[:, n - m :]], 1)
    attention = _TeacherForced(n, m, rotation(transformer, places, clean.shape[3] // 2, clean.shape[4] // 2))
    for block in transformer.blocks:
        block.attn1.processor, block.attn2.processor = attention, _attend_text
    out = transformer(parts.flatten(0, 1), times.flatten(), texts.flatten(0, 1), return_dict=False)[0]
    out = out.unflatten(0, (-1, n - 1 + m))[:, n - 1 :]  # [B, m, Z, c, h, w]
    return out.transpose(1, 2).flatten(2, 3)


@dataclass
class Rollout:
    """A plain chunk-by-chunk sampler with a key/value list per layer: the slow, obvious way to roll the model out.

    `window` latent frames are visible in all, the chunk under way included; the first `sink` of the take stay for ever.
    """

    transformer: WanTransformer3DModel
    timesteps: list[float]
    window: int = 21
    sink: int = 3
    chunk: int = 3
    done: int = 0
    layers: list["_Cached"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = [_Cached() for _ in self.transformer.blocks]

    @torch.no_grad()
    def next(self, noise: torch.Tensor, text: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """The next clean chunk [B, Z, c, h, w] from `noise` of that shape and text [B, T, d]."""
        x, sigmas = noise, [t / 1000.0 for t in self.timesteps]
        for i, sigma in enumerate(sigmas):
            clean = x - sigma * self._forward(x, self.timesteps[i], text, commit=False)
            if i + 1 < len(sigmas):
                fresh = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                x = (1 - sigmas[i + 1]) * clean + sigmas[i + 1] * fresh
        self._forward(clean, 0.0, text, commit=True)
        self.done += self.chunk
        return clean

    def _forward(self, x: torch.Tensor, timestep: float, text: torch.Tensor, commit: bool) -> torch.Tensor:
        frames = torch.arange(self.done, self.done + self.chunk, device=x.device).expand(len(x), 1, -1)
        rotary = rotation(self.transformer, frames, x.shape[3] // 2, x.shape[4] // 2)
        keep, sink = (self.window - self.chunk) // self.chunk, self.sink // self.chunk
        for block, layer in zip(self.transformer.blocks, self.layers, strict=True):
            layer.rotary, layer.commit = rotary, commit
            if len(layer.past) > keep:
                del layer.past[sink : len(layer.past) - keep + sink]
            block.attn1.processor = layer
        times = torch.full((len(x),), timestep, device=x.device)
        return self.transformer(x, times, text, return_dict=False)[0]


def rotation(transformer: WanTransformer3DModel, frames: torch.Tensor, height: int, width: int) -> Rotation:
    """Wan's rotary angles for temporal positions `frames` [B, S, c] on a token grid of height x width."""
    head = transformer.config.attention_head_dim
    side = 2 * (head // 6)
    t = frames.flatten(1).double()[:, :, None, None, None]
    y = torch.arange(height, device=t.device).double()[None, None, :, None, None]
    x = torch.arange(width, device=t.device).double()[None, None, None, :, None]
    shape = (*t.shape[:2], height, width)
    angles = [
        (place * 10000.0 ** (-torch.arange(0, dim, 2, device=t.device).double() / dim)).expand(*shape, dim // 2)
        for place, dim in ((t, head - 2 * side), (y, side), (x, side))
    ]
    angle = torch.cat(angles, -1).flatten(1, 3)[:, :, None]
    return angle.cos().float(), angle.sin().float()


def release(transformer: WanTransformer3DModel) -> None:
    """Give the stock attention processors back."""
    for block in transformer.blocks:
        block.attn1.processor, block.attn2.processor = WanAttnProcessor(), WanAttnProcessor()


class _TeacherForced:
    """Self-attention over n - 1 clean and m noisy chunks that arrive as batch entries: clean chunk i looks at clean
    chunks up to i, a noisy chunk at the clean chunks before it and at itself."""

    def __init__(self, n: int, m: int, rotary: Rotation) -> None:
        self.n, self.m, self.rotary = n, m, rotary

    def __call__(self, attn: WanAttention, hidden: torch.Tensor, *_: object) -> torch.Tensor:
        groups, size = self.n - 1 + self.m, hidden.shape[1]
        q, k, v = _project(attn, hidden, groups, self.rotary)
        parts = []
        for g in range(groups):
            before = g if g < self.n - 1 else g - self.m + 1
            own, past = slice(g * size, (g + 1) * size), slice(0, before * size)
            keys, values = (torch.cat([x[:, :, past], x[:, :, own]], 2) for x in (k, v))
            parts.append(_attend(q[:, :, own], keys, values))
        return attn.to_out[0](torch.cat(parts, 2).transpose(1, 2).flatten(2).reshape(hidden.shape))


class _Cached:
    """Self-attention of one chunk over the committed chunks of one layer and itself."""

    def __init__(self) -> None:
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.rotary: Rotation | None = None
        self.commit = False

    def __call__(self, attn: WanAttention, hidden: torch.Tensor, *_: object) -> torch.Tensor:
        assert self.rotary is not None
        q, k, v = _project(attn, hidden, 1, self.rotary)
        if self.commit:
            self.past.append((k, v))
        seen = self.past if self.commit else [*self.past, (k, v)]
        keys, values = (torch.cat(parts, 2) for parts in zip(*seen, strict=True))
        out = functional.scaled_dot_product_attention(q, keys, values)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    # Spelled out: for short sequences the backward pass of the fused CPU kernel takes several times as long.
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(-1) @ v


def _attend_text(attn: WanAttention, hidden: torch.Tensor, text: torch.Tensor, *_: object) -> torch.Tensor:
    q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
    q, k, v = (x.to(v.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
    return attn.to_out[0](_attend(q, k, v).transpose(1, 2).flatten(2))


def _project(
    attn: WanAttention, hidden: torch.Tensor, groups: int, rotary: Rotation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # [B S, N / S, H D] -> [B, H, N, D]
    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, groups * x.shape[1], attn.heads, x.shape[2] // attn.heads)

    q, k = heads(attn.norm_q(attn.to_q(hidden))), heads(attn.norm_k(attn.to_k(hidden)))
    v = heads(attn.to_v(hidden)).transpose(1, 2)
    return _rotate(q, rotary).to(v.dtype).transpose(1, 2), _rotate(k, rotary).to(v.dtype).transpose(1, 2), v


def _rotate(x: torch.Tensor, rotary: Rotation) -> torch.Tensor:
    cos, sin = rotary
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _chunks(x: torch.Tensor, n: int) -> torch.Tensor:
    return x.unflatten(2, (n, -1)).transpose(1, 2)  # [B, Z, F, h, w] -> [B, n, Z, c, h, w]

"""Full history as Lumos-1's authors run it, to be measured against: the same weights, sampler and tokens.

Cached keys lie rotated and grow by concatenation in every layer and forward, to be cropped afterwards; key heads are
copied once per query head; attention gets a dense float mask, cast in every layer, although every row of it is zero
while a frame is decoded. Kinder than the original in three ways: of the mask only the rows of the frame in flight are
built (theirs is tokens × tokens, at 17 bytes an element while it is made), logits are made as our sampler makes them,
and angles are computed once a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hosts.base import TextState
from ..hosts.lumos import Lumos
from ..rope import RotaryTable
from ..samplers.base import Sampling
from ..samplers.masked import MaskedSampler


@dataclass
class ConcatenatedLayer:
    """One layer's cache of a stream: `keys`, `values` [B, Hk, T, D], keys rotated."""

    rotary: RotaryTable
    keys: Tensor
    values: Tensor
    phases: Tensor | None = None
    mask: Tensor | None = None  # [1, 1, N, T + N], fp32

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        assert self.phases is not None and self.mask is not None and not causal
        q, k = self.rotary.rotate(q, self.phases), self.rotary.rotate(k, self.phases)
        self.keys = torch.cat((self.keys, k.transpose(1, 2)), 2)
        self.values = torch.cat((self.values, v.transpose(1, 2)), 2)
        groups = q.shape[2] // k.shape[2]
        keys, values = (x.repeat_interleave(groups, 1) for x in (self.keys, self.values))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=self.mask.to(q.dtype))
        return out.transpose(1, 2)

    def crop(self, tokens: int) -> None:
        self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]


@dataclass
class AuthorsLike:
    """An image-to-video take of one prompt. `ids` [1, T] of the prompt, `given` the codes [1, 1, 1, h, w] of its image,
    `noise` as `MaskedSampler.noise` makes it; `next_frame` makes one latent frame after another."""

    host: Lumos
    ids: Tensor
    given: Tensor
    noise: Any
    guidance: float
    sampler: MaskedSampler
    frame: int = 0
    layers: dict[str, list[ConcatenatedLayer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        host = self.host
        self.geometry = host.geometry()
        texts = {"cond": self.ids, "uncond": host.unconditional(self.ids)}
        self.texts: dict[str, TextState] = {name: self.host.text_state(ids) for name, ids in texts.items()}
        for name, text in self.texts.items():
            at = self.host.prefix(text)[0].to(self.host.device)
            phases = self.host.rotary.phases(at)
            self.layers[name] = [
                ConcatenatedLayer(host.rotary, host.rotary.rotate(k, phases).transpose(1, 2), v.transpose(1, 2))
                for k, v in zip(text.k, text.v, strict=True)
            ]  # fmt: skip
        self._write(self.given, given=True)
        self.frame = 1

    @property
    def nbytes(self) -> int:
        """Bytes held between two frames: K/V, the masks of the frame before, and the prompt's K/V."""
        masks = [stream[0].mask for stream in self.layers.values()]
        held = [*self._kv(), *(m for m in masks if m is not None)]
        return sum(t.untyped_storage().nbytes() for t in held) + sum(text.nbytes for text in self.texts.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of K/V of the tokens in the cache, no mask among them."""
        return sum(t.nbytes for t in self._kv())

    @property
    def tokens(self) -> int:
        """Keys held by the stream with text."""
        return self.layers["cond"][0].keys.shape[2]

    @torch.no_grad()
    def next_frame(self) -> Tensor:
        """Codes [1, 1, 1, h, w] of the next latent frame, whose K/V are kept."""
        self._masks()

        def forward(x: Tensor, t: float, step: int) -> Tensor:
            cond, uncond = (self._pass(name, x, keep=False) for name in ("cond", "uncond"))
            return uncond.float() + self.guidance * (cond.float() - uncond.float())

        codes = self.sampler.sample(Sampling(
            self.host, self.geometry, 1, self.sampler.schedule, self.frame - 1, self.noise, forward
        ))  # fmt: skip
        self._write(codes)
        self.frame += 1
        return codes

    def _kv(self) -> list[Tensor]:
        return [t for stream in self.layers.values() for layer in stream for t in (layer.keys, layer.values)]

    def _write(self, codes: Tensor, given: bool = False) -> None:
        self._masks()
        for name in self.layers:
            self._pass(name, self.sampler.commit_input(codes, self.geometry, name, given)[0], keep=True)

    def _masks(self) -> None:
        n, at = self.geometry.tokens_per_frame, self.host.stream_positions(self.geometry, self.frame, 1, self.texts)
        for name, stream in self.layers.items():
            keys = stream[0].keys.shape[2] + n
            allowed = torch.ones(n, keys, dtype=torch.bool, device=self.host.device)  # all, while a frame is decoded
            mask = torch.zeros(1, 1, n, keys, device=self.host.device).masked_fill(
                ~allowed, torch.finfo(torch.float32).min
            )
            phases = self.host.rotary.phases(at[name][0].to(self.host.device))
            for layer in stream:
                layer.mask, layer.phases = mask, phases

    def _pass(self, name: str, content: Tensor, *, keep: bool) -> Tensor:
        stream: Sequence[Any] = self.layers[name]
        before = stream[0].keys.shape[2]
        hidden = self.host.forward(content, 0.0, self.texts[name], stream)  # type: ignore[arg-type]  # it attends, too
        if not keep:
            for layer in stream:
                layer.crop(before)
        return hidden

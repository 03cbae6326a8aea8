"""Floating-point operations of forwards, by counting matrix products: 1 multiply-add is 2 FLOPs; norms, softmax, text
encoder and VAE are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Flops:
    """What forwards cost: every token through the weights, self-attention to keys, attention to text."""

    linear: int = 0
    attention: int = 0
    cross: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.cross

    @property
    def peta(self) -> float:
        """PFLOPs."""
        return self.total / 1e15

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention, self.cross + other.cross)

    def __sub__(self, other: Flops) -> Flops:
        return self + other * -1

    def __mul__(self, times: int) -> Flops:
        return Flops(self.linear * times, self.attention * times, self.cross * times)

    def as_dict(self) -> dict[str, int]:
        return {"linear": self.linear, "attention": self.attention, "cross": self.cross, "total": self.total}


@dataclass(frozen=True)
class FlopShape:
    """The sizes of a video transformer that its cost depends on."""

    layers: int
    width: int  # query heads × channels of one
    weights: int  # of a block's matrices that every video token passes
    outer: int = 0  # of embedding and head
    text_weights: int = 0  # of a block's matrices that text tokens pass, once per prompt where their K/V are kept

    def forward(self, tokens: int, keys: int, text: int = 0) -> Flops:
        """One forward of `tokens` that attend to `keys`, their own among them, and to `text` text tokens."""
        return Flops(
            2 * tokens * (self.layers * self.weights + self.outer),
            4 * tokens * keys * self.width * self.layers,
            4 * tokens * text * self.width * self.layers,
        )

    def outside(self, tokens: int) -> Flops:
        """Embedding and head alone."""
        return Flops(2 * tokens * self.outer)

    def text(self, tokens: int) -> Flops:
        """K/V of `tokens` text tokens in all layers."""
        return Flops(cross=2 * tokens * self.text_weights * self.layers)

    @classmethod
    def of_wan(cls, layers: int, hidden: int, ffn: int, patch: int, head: int | None = None) -> Self:
        """Wan and SkyReels-V2: four matrices of self-attention, query and output of cross-attention, two of the MLP.
        `patch` and `head` are the values a token is embedded from and read out to."""
        weights = 6 * hidden * hidden + 2 * hidden * ffn
        return cls(layers, hidden, weights, hidden * (patch + (patch if head is None else head)), 2 * hidden * hidden)

    @classmethod
    def of_magi(cls, layers: int, hidden: int, ffn: int, kv_width: int, patch: int) -> Self:
        """MAGI-1 (4.5B): queries of self- and cross-attention, shared K and V, one output of both, two of the MLP."""
        weights = 2 * hidden * hidden + 2 * hidden * kv_width + 2 * hidden * hidden + 2 * hidden * ffn
        return cls(layers, hidden, weights, 2 * hidden * patch, hidden * 2 * kv_width)

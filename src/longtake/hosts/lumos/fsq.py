"""Finite scalar quantisation: a code is a number with one digit per channel, rounded there from the channel's value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import LongtakeError

_MARGIN = 1e-3  # by which the range of a channel exceeds its outermost values


class FSQ:
    """Channel i has `levels[i]` values in [−1, 1] and is digit i of the code, the first channel the lowest."""

    def __init__(self, levels: Sequence[int]) -> None:
        if not levels or min(levels) < 2:
            raise LongtakeError(f"FSQ levels {list(levels)}: give at least one, each 2 or more")
        self.levels = tuple(int(level) for level in levels)
        self.basis = tuple(math.prod(self.levels[:i]) for i in range(len(self.levels)))

    @property
    def codes(self) -> int:
        return math.prod(self.levels)

    def digits(self, codes: Tensor) -> Tensor:
        """Codes [...] → digits [..., channels]."""
        return codes[..., None].long() // self._row(self.basis, codes) % self._row(self.levels, codes)

    def index(self, digits: Tensor) -> Tensor:
        """Digits [..., channels] → codes [...]."""
        return (digits.long() * self._row(self.basis, digits)).sum(-1)

    def values(self, codes: Tensor) -> Tensor:
        """Codes [...] → what a decoder is fed [..., channels]: (digit − ⌊levels / 2⌋) / ⌊levels / 2⌋."""
        half = self._half(codes)
        return (self.digits(codes) - half) / half

    def nearest(self, values: Tensor) -> Tensor:
        """Values [..., channels] as `values` gives them, or near → codes [...]."""
        half = self._half(values)
        digits = (values.float() * half).round().long() + half
        return self.index(torch.minimum(digits.clamp(min=0), self._row(self.levels, values) - 1))

    def quantise(self, z: Tensor) -> Tensor:
        """Anything [..., channels] → the nearest values; gradients pass as if nothing had been rounded."""
        levels, half = self._row(self.levels, z).to(z), self._half(z).to(z)
        reach = (levels - 1) * (1 + _MARGIN) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).to(z)
        bounded = torch.tanh(z + torch.atanh(offset / reach)) * reach - offset
        return (bounded + (bounded.round() - bounded).detach()) / half

    def _half(self, like: Tensor) -> Tensor:
        return self._row([level // 2 for level in self.levels], like)

    @staticmethod
    def _row(numbers: Sequence[int], like: Tensor) -> Tensor:
        return torch.tensor(numbers, device=like.device)

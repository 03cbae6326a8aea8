"""How far a chunk has moved since its previous step: the relative L1 of FlowCache §3 and TeaCache, in fp32.

The reference is the *previous* step's feature, computed or reused, so the sum over steps is the length of a path. In
bf16 the measure has a resolution of 0.4 %, which is more than a small step moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """Mean |F − F_before| and mean |F_before| over `count` elements, for each take in lockstep."""

    moved: tuple[float, ...]
    size: tuple[float, ...]
    count: int

    @property
    def relative(self) -> float:
        """moved / size; of takes in lockstep the largest, since they are computed or reused together."""
        return max(_ratio(moved, size) for moved, size in zip(self.moved, self.size, strict=True))

    @classmethod
    def between(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Change]:
        """The change of each (feature, feature before), both [B, …]: one transfer from the device for all of them."""
        if not pairs:
            return []
        means = []
        for now, old in pairs:
            now, old = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (now, old))
            means.append(torch.stack([x.abs().flatten(1).mean(1) for x in (now - old, old)]))
        values = torch.stack(means).tolist()
        return [
            cls(tuple(moved), tuple(size), now[0].numel())
            for (moved, size), (now, _) in zip(values, pairs, strict=True)
        ]

    @classmethod
    def joint(cls, changes: Sequence[Change]) -> Change:
        """One change of several chunks, as if their features were one."""
        count = sum(change.count for change in changes)
        takes = range(len(changes[0].moved))
        moved, size = (
            tuple(sum(getattr(c, name)[b] * c.count for c in changes) / count for b in takes)
            for name in ("moved", "size")
        )
        return cls(moved, size, count)


def _ratio(moved: float, size: float) -> float:
    """In fp32, as the means are: a change of exactly a threshold must come out as that, and compute."""
    if size == 0:
        return 0.0 if moved == 0 else float("inf")
    return float(np.float32(moved) / np.float32(size))

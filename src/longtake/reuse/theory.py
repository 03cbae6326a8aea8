"""FlowCache's relative L1 on paper: a straight path from Gaussian noise to Gaussian data of standard deviation s.

On X(σ) = (1 − σ)·x₀ + σ·ε the velocity ε − x₀ is constant, so a step from σ_k to σ_{k+1} moves X, relative to itself,
by

    L1rel(k) = (σ_k − σ_{k+1}) · √(1 + s²) / √((1 − σ_k)²·s² + σ_k²)

For σ = u^p, u falling evenly from 1, L1rel rises over the whole way exactly if p ≤ 2 / (1 + √(1 + s²)). (The published
theorem says "for every p"; that is the limit s → 0.) What a real model's features do is measured, not predicted:
`longtake analyze reuse`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from .base import ReuseState, Turn
from .flowcache import FlowCacheReuse
from .metric import Change


def magi_levels(steps: int) -> list[float]:
    """Noise levels 1 − t of MAGI-1, `steps` + 1 of them: t = y / (3 − 2y), y = (k / steps)²."""
    squares = [(k / steps) ** 2 for k in range(steps + 1)]
    return [1 - y / (3 - 2 * y) for y in squares]


def skyreels_levels(steps: int, shift: float = 8.0) -> list[float]:
    """Noise levels of SkyReels-V2: σ = s·b / (1 + (s − 1)·b) over b from 0.999 down to 0."""
    base = [0.999 * (1 - k / steps) for k in range(steps + 1)]
    return [shift * b / (1 + (shift - 1) * b) for b in base]


def power_levels(steps: int, p: float) -> list[float]:
    """σ = ((steps − k) / steps)^p."""
    return [((steps - k) / steps) ** p for k in range(steps + 1)]


def relative_l1(levels: Sequence[float], s: float) -> list[float]:
    """L1rel of every step between the noise levels, for data of standard deviation `s` (noise: 1)."""
    speed = math.sqrt(1 + s * s)
    return [(now - after) * speed / math.sqrt((1 - now) ** 2 * s * s + now * now) for now, after in pairwise(levels)]


def steepest_power(s: float) -> float:
    """The largest p for which L1rel of σ = u^p rises over the whole way."""
    return 2 / (1 + math.sqrt(1 + s * s))


def rises(values: Sequence[float]) -> bool:
    """Whether every value is at least as large as the one before."""
    return all(b >= a for a, b in pairwise(values))


def predicted_reuse(policy: FlowCacheReuse, changes: Sequence[float]) -> list[int]:
    """The steps of a chunk that `policy` reuses if step k + 1 sees a change of `changes[k]`: a model, no data."""
    steps, state, reused = len(changes), ReuseState(), []
    for k in range(steps):
        turn = Turn(0, k, steps, float(k), 0.0, 0.0)
        change = None if k == 0 else Change((changes[k - 1],), (1.0,), 1)
        if policy.one(turn, state, change).reused:
            reused.append(k)
    return reused

"""The slope of a measure over time, with an interval that knows that neighbouring frames are alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LEAST = 5  # blocks, to speak of a slope


@dataclass(frozen=True)
class Trend:
    """`slope` per minute, or another unit, and its 95 % interval; None where too few of the clip's blocks are
    independent to tell."""

    slope: float
    low: float | None
    high: float | None
    mean: float


def trend(values: np.ndarray, fps: float) -> Trend | None:
    """Least-squares slope per minute of a value per frame [T]; None for less than five seconds. Frames are averaged
    over whole seconds first."""
    return line(values, max(1, round(fps)), 60 * fps)


def line(values: np.ndarray, block: int, unit: float) -> Trend | None:
    """Least-squares slope per `unit` values of values [T], averaged over whole blocks of `block` first; None for less
    than five blocks.

    The interval takes the residuals as autoregressive of first order: of n blocks with lag-one correlation r,
    n (1 − r) / (1 + r) are independent (Santer et al. 2000, J. Geophys. Res. 105, D6).
    """
    n = len(values) // block
    if n < LEAST:
        return None
    y = values[: n * block].reshape(n, block).mean(1)
    x = (np.arange(n) + 0.5) * block / unit
    x = x - x.mean()
    spread = float((x * x).sum())
    slope = float((x * y).sum()) / spread
    rest = y - y.mean() - slope * x
    half = _half(rest, spread)
    low, high = (None, None) if half is None else (slope - half, slope + half)
    return Trend(slope, low, high, float(y.mean()))


def _half(rest: np.ndarray, spread: float) -> float | None:
    """Half the width of the slope's interval."""
    energy = float((rest * rest).sum())
    if energy < 1e-12:  # a straight line
        return 0.0
    r = max(0.0, float((rest[:-1] * rest[1:]).sum()) / energy)
    independent = len(rest) * (1 - r) / (1 + r)
    if independent <= 3:
        return None
    return t_quantile(independent - 2) * math.sqrt(energy / (independent - 2) / spread)


def t_quantile(freedom: float) -> float:
    """97.5 % quantile of Student's t by its expansion in 1 / freedom (Abramowitz & Stegun 26.7.5); within 1 % from
    three degrees of freedom on, too small below."""
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))

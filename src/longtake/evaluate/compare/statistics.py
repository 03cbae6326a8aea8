"""Statistics of comparisons: seeds are drawn anew, never single events, since the events of one scene are kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95

Hits = Mapping[int, Sequence[float]]  # seed → outcomes of its events


def mean(hits: Hits) -> float:
    """Mean over all events; NaN without any."""
    values = np.concatenate([np.asarray(v, float) for v in hits.values()]) if hits else np.empty(0)
    return float(values.mean()) if len(values) else float("nan")


def interval(hits: Hits, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, clustered by seed."""
    sums, counts = _sums(hits, sorted(hits))
    if not counts.sum():
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(counts), (RESAMPLES, len(counts)))
    means = sums[draws].sum(1) / np.maximum(counts[draws].sum(1), 1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def paired(first: Hits, second: Hits, seed: int = 0) -> tuple[float, tuple[float, float], float]:
    """Difference of means (first - second) over the seeds that both have, its 95 % interval, two-sided bootstrap p."""
    seeds = sorted(set(first) & set(second))
    (a, n), (b, m) = _sums(first, seeds), _sums(second, seeds)
    if not n.sum() or not m.sum():
        return float("nan"), (float("nan"), float("nan")), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(seeds), (RESAMPLES, len(seeds)))
    gaps = a[draws].sum(1) / np.maximum(n[draws].sum(1), 1) - b[draws].sum(1) / np.maximum(m[draws].sum(1), 1)
    low, high = np.quantile(gaps, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    p = 2 * min((np.sum(gaps <= 0) + 1) / (RESAMPLES + 1), (np.sum(gaps >= 0) + 1) / (RESAMPLES + 1))
    return float(a.sum() / n.sum() - b.sum() / m.sum()), (float(low), float(high)), float(min(1.0, p))


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected by Holm's step-down rule, in the order given; NaN stays."""
    order = sorted((p, i) for i, p in enumerate(ps) if not np.isnan(p))
    corrected, worst = [float("nan")] * len(ps), 0.0
    for rank, (p, i) in enumerate(order):
        worst = max(worst, min(1.0, p * (len(order) - rank)))
        corrected[i] = worst
    return corrected


def _sums(hits: Hits, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([float(np.sum(hits[seed])) for seed in seeds]),
        np.array([len(hits[seed]) for seed in seeds], dtype=float),
    )

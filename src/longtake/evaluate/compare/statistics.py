"""Statistics of comparisons: seeds are drawn anew, never single events, since the events of one scene are kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
EXACT = 14  # up to so many seeds, every exchange is counted
EXCHANGES = 2**EXACT  # … and above, so many drawn ones

Hits = Mapping[int, Sequence[float]]  # seed → outcomes of its events


def mean(hits: Hits) -> float:
    """Mean over all events; NaN without any."""
    values = np.concatenate([np.asarray(v, float) for v in hits.values()]) if hits else np.empty(0)
    return float(values.mean()) if len(values) else float("nan")


def interval(hits: Hits, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, clustered by seed; NaN where fewer than two seeds have events."""
    sums, counts = _sums(hits, sorted(hits))
    if np.count_nonzero(counts) < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(counts), (RESAMPLES, len(counts)))
    means = sums[draws].sum(1) / np.maximum(counts[draws].sum(1), 1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def paired(first: Hits, second: Hits, seed: int = 0) -> tuple[float, tuple[float, float], float]:
    """Difference of means (first - second) over the seeds that both have, its 95 % bootstrap interval, and the p of a
    two-sided permutation test: had the two names been exchanged in any of the seeds, how often would the difference be
    as large? Exact for few seeds, so that n of them never give less than 2 / 2^n."""
    seeds = sorted(set(first) & set(second))
    (a, n), (b, m) = _sums(first, seeds), _sums(second, seeds)
    nothing = float("nan")
    if not n.sum() or not m.sum():
        return nothing, (nothing, nothing), nothing
    gap = float(a.sum() / n.sum() - b.sum() / m.sum())
    low = high = nothing
    if np.count_nonzero(n + m) > 1:
        draws = np.random.default_rng(seed).integers(0, len(seeds), (RESAMPLES, len(seeds)))
        gaps = a[draws].sum(1) / np.maximum(n[draws].sum(1), 1) - b[draws].sum(1) / np.maximum(m[draws].sum(1), 1)
        low, high = map(float, np.quantile(gaps, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)))
    swap = _exchanges(len(seeds), seed)
    ours, theirs = np.where(swap, b, a).sum(1), np.where(swap, a, b).sum(1)
    of_ours, of_theirs = np.where(swap, m, n).sum(1), np.where(swap, n, m).sum(1)
    gaps = ours / np.maximum(of_ours, 1) - theirs / np.maximum(of_theirs, 1)
    return gap, (low, high), float(np.mean(np.abs(gaps) >= abs(gap) - 1e-12))


def _exchanges(seeds: int, seed: int) -> np.ndarray:
    """Booleans [exchanges, seeds], nothing exchanged among them: all there are, or many."""
    if seeds <= EXACT:
        return (np.arange(2**seeds)[:, None] >> np.arange(seeds)) % 2 == 1
    drawn = np.random.default_rng(seed).random((EXCHANGES, seeds)) < 0.5
    drawn[0] = False
    return drawn


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

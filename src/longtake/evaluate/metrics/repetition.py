"""Whether a clip repeats itself."""

from __future__ import annotations

import numpy as np

from .light import luma

SIDE = 16  # pixels of a thumbnail
SHORTEST = 0.5  # seconds, of a lag that counts as repetition
STILL = 0.25  # grey levels² a pixel: with less change over the whole clip it stands still


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """Luma averaged over a grid of at most 16 × 16 fields: float32 [T, fields]."""
    y = luma(frames)
    for axis in (1, 2):
        edges = np.linspace(0, y.shape[axis], min(SIDE, y.shape[axis]) + 1).round().astype(int)
        widths = np.diff(edges).astype(np.float32)
        y = np.add.reduceat(y, edges[:-1], axis) / widths.reshape((-1, 1) if axis == 1 else (-1,))
    return y.reshape(len(y), -1)


def similarity(small: np.ndarray) -> np.ndarray:
    """Likeness of a clip of thumbnails [T, fields] to itself at lags 0 … T // 2: the correlation over all pairs of
    frames so far apart, once what never changes is taken away. A clip that stands still is like itself at every lag."""
    z = small.astype(np.float64) - small.mean(0, dtype=np.float64)
    lags = len(z) // 2 + 1
    if np.square(z).mean() < STILL:
        return np.ones(lags)
    energy = np.square(z).sum(1)
    found = [1.0]
    for lag in range(1, lags):
        scale = np.sqrt(energy[:-lag].sum() * energy[lag:].sum())
        found.append(float((z[:-lag] * z[lag:]).sum() / scale) if scale else 1.0)
    return np.array(found)


def repetition(likeness: np.ndarray, fps: float) -> float | None:
    """How much likeness comes back at a lag of half a second or more after it was lost, 0 … 1: 1 for a loop and for a
    clip that stands still, 0 for one that ever moves away from what it was. None for clips of less than a second."""
    first = max(1, round(SHORTEST * fps))
    if len(likeness) <= first:
        return None
    level = np.maximum(likeness, 0.0)
    if level.min() > 1 - 1e-9:
        return 1.0
    lowest = np.minimum.accumulate(level)
    return float(np.max(level[first:] - lowest[first:]))

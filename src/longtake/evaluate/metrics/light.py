"""Light: what slowly drifts in a long take, and what flickers. In grey levels, 0 … 255."""

from __future__ import annotations

import numpy as np

_LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601, of gamma-coded values


def luma(frames: np.ndarray) -> np.ndarray:
    """float32 [T, H, W] of uint8 [T, H, W, 3]."""
    return frames.astype(np.float32) @ _LUMA


def brightness(frames: np.ndarray) -> np.ndarray:
    """Mean luma of every frame [T]."""
    return luma(frames).mean((1, 2), dtype=np.float64)


def contrast(frames: np.ndarray) -> np.ndarray:
    """Standard deviation of luma within every frame [T]."""
    return luma(frames).std((1, 2), dtype=np.float64)


def sharpness(frames: np.ndarray) -> np.ndarray:
    """Standard deviation of the luma's Laplacian (four neighbours) within every frame [T]: its variance is the usual
    measure of focus (Pech-Pacheco et al. 2000)."""
    y = luma(frames)
    laplacian = 4 * y[:, 1:-1, 1:-1] - y[:, :-2, 1:-1] - y[:, 2:, 1:-1] - y[:, 1:-1, :-2] - y[:, 1:-1, 2:]
    return laplacian.std((1, 2), dtype=np.float64)


def flicker(frames: np.ndarray) -> np.ndarray:
    """How far pixels go away and come back, mean over a frame's pixels: [T − 2], of the frames between the first and
    the last. Where the luma's two changes have opposite signs it is the smaller of them; a fade, or an edge that moves
    past, changes a pixel one way and counts for nothing."""
    change = np.diff(luma(frames), axis=0)
    before, after = change[:-1], change[1:]
    back = np.minimum(np.abs(before), np.abs(after)) * (before * after < 0)
    return back.mean((1, 2), dtype=np.float64)

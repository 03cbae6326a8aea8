"""Measures of pictures: likeness to the lawful one, and slow drift of light."""

from __future__ import annotations

import numpy as np

from ...zoo import lanes, readback
from ..metrics.likeness import ssim_map


def psnr(video: np.ndarray, lawful: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 videos in decibels."""
    error = np.square(video.astype(np.float64) - lawful.astype(np.float64)).mean()
    return round(float(10 * np.log10(255.0**2 / max(error, 1e-9))), 3)


def off_actor_ssim(video: np.ndarray, scene: lanes.Scene, start: int, every: int = 16) -> float:
    """Mean similarity to the lawful background where no actor can be, over every 16th frame."""
    scores = []
    for t in range(0, len(video), every):
        free = readback.off_actors(scene, start + t, 1)
        scores.append(float(ssim_map(video[t : t + 1], scene.render(1, start + t))[free].mean()))
    return round(float(np.mean(scores)), 4)


def slopes(video: np.ndarray) -> dict[str, float]:
    """Least-squares slope of mean luma and of contrast (standard deviation of luma), grey levels per 1,000 latent
    frames."""
    luma = video.astype(np.float32) @ np.array((0.299, 0.587, 0.114), np.float32)
    time = np.arange(len(video)) / lanes.STRIDE / 1000.0
    fit = lambda y: round(float(np.polyfit(time, y, 1)[0]), 3) if len(video) > 1 else 0.0
    return {"luma_slope": fit(luma.mean((1, 2))), "contrast_slope": fit(luma.std((1, 2)))}

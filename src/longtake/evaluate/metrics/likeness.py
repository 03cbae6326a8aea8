"""How like two videos are, frame by frame. Only for videos that should be equal: the same noise, or the given truth."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

CAP = 100.0  # decibels of equal frames


def psnr_frames(video: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal to noise ratio of every frame in decibels [T], at most 100: 10 log10(255² / mean squared error over
    pixels and channels)."""
    error = np.square(video.astype(np.float32) - reference.astype(np.float32)).mean((1, 2, 3), dtype=np.float64)
    return np.minimum(CAP, 10 * np.log10(255.0**2 / np.maximum(error, 1e-12)))


def ssim_frames(video: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Structural similarity of every frame [T], 1 for equal ones: the mean of `ssim_map`."""
    return np.array(
        [float(ssim_map(a[None], b[None]).mean()) for a, b in zip(video, reference, strict=True)], np.float64
    )


def ssim_map(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Structural similarity [T, H, W] of videos [T, H, W, 3] at every pixel (Wang et al. 2004: Gaussian of 11 x 11,
    sigma 1.5; grey)."""
    grid = torch.arange(11, dtype=torch.float32) - 5
    line = torch.exp(-(grid**2) / (2 * 1.5**2))
    kernel = torch.outer(line, line)
    kernel = (kernel / kernel.sum())[None, None]
    x, y = (torch.from_numpy(v.astype(np.float32)).mean(-1)[:, None] for v in (first, second))
    blur = lambda z: functional.conv2d(functional.pad(z, (5, 5, 5, 5), mode="reflect"), kernel)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    a, b = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + a) * (2 * cov + b) / ((mx * mx + my * my + a) * (vx + vy + b)))[:, 0].numpy()

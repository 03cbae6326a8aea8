"""How much moves: optical flow after Lucas and Kanade (1981), on a pyramid (Bouguet 2001), in a page of torch."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .light import luma

WIDTH = 160  # pixels to which frames are reduced, at most
LEAST = 16  # pixels, of the coarsest level's shorter side
WINDOW = 9  # pixels: what moves alike
ROUNDS = 3  # at every level
STILL = 4.0  # grey levels² a pixel: with less structure in its window, nothing can be said to move there
FASTEST = 0.05  # share of the pixels, as in VBench's dynamic degree


def speeds(frames: np.ndarray, fps: float) -> np.ndarray:
    """Mean speed of the fastest twentieth of the pixels between neighbouring frames [T − 1], in frame widths per second
    (VBench's dynamic degree thresholds the same mean, of RAFT's flow)."""
    if len(frames) < 2:
        return np.empty(0)
    grey = torch.from_numpy(luma(frames))[:, None]  # [T, 1, H, W]
    if grey.shape[-1] > WIDTH:
        size = (max(1, round(grey.shape[-2] * WIDTH / grey.shape[-1])), WIDTH)
        grey = F.interpolate(grey, size=size, mode="bilinear", antialias=True)
    pace = flow(grey[:-1], grey[1:]).norm(dim=1).flatten(1)  # [T − 1, pixels]
    fastest = pace.topk(max(1, math.ceil(FASTEST * pace.shape[1])), dim=1).values.mean(1)
    return (fastest * fps / grey.shape[-1]).double().numpy()


def flow(first: Tensor, second: Tensor) -> Tensor:
    """Displacement (x, y) in pixels [N, 2, H, W] of what stands at every pixel of `first` [N, 1, H, W] on its way to
    `second`; 0 where there is no structure to follow, and where moving does not explain what changed."""
    levels = [(first, second)]
    while min(levels[-1][0].shape[-2:]) >= 2 * LEAST:
        levels.append((F.avg_pool2d(levels[-1][0], 2), F.avg_pool2d(levels[-1][1], 2)))
    found = torch.zeros(first.shape[0], 2, *levels[-1][0].shape[-2:])
    for a, b in reversed(levels):
        if found.shape[-2:] != a.shape[-2:]:
            scale = torch.tensor([a.shape[-1] / found.shape[-1], a.shape[-2] / found.shape[-2]]).view(1, 2, 1, 1)
            found = F.interpolate(found, size=a.shape[-2:], mode="bilinear", align_corners=False) * scale
        for _ in range(ROUNDS):
            found = _round(a, b, found)
        found = _explained(a, b, found)
    return found


def _explained(a: Tensor, b: Tensor, found: Tensor) -> Tensor:
    """The displacements that stay inside the frame and halve their window's error of standing still; 0 for others."""
    error = lambda moved: _blur((moved - a) ** 2)
    height, width = a.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = xs + found[:, 0], ys + found[:, 1]
    inside = ((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))[:, None]
    return torch.where(inside & (error(_warp(b, found)) < 0.5 * error(b)), found, torch.zeros_like(found))


def _round(a: Tensor, b: Tensor, guess: Tensor) -> Tensor:
    """One Newton step of every window: solve the 2 × 2 system of its gradients."""
    moved = _warp(b, guess)
    gx, gy = _gradients((a + moved) / 2)
    gt = moved - a
    xx, yy, xy = _blur(gx * gx), _blur(gy * gy), _blur(gx * gy)
    xt, yt = _blur(gx * gt), _blur(gy * gt)
    # the weaker direction of a straight edge cannot be seen: a little of nothing moves keeps the system solvable
    xx, yy = xx + STILL / 4, yy + STILL / 4
    det = xx * yy - xy * xy
    step = torch.cat(((xy * yt - yy * xt) / det, (xy * xt - xx * yt) / det), 1).clamp(-WINDOW / 2, WINDOW / 2)
    return torch.where(xx + yy > STILL, guess + step, torch.zeros_like(guess))


def _blur(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, WINDOW, 1, WINDOW // 2, count_include_pad=False)


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def _warp(x: Tensor, by: Tensor) -> Tensor:
    """What stands at every pixel plus `by` [N, 2, H, W]."""
    height, width = x.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack((xs + by[:, 0], ys + by[:, 1]), -1)  # [N, H, W, 2]
    size = torch.tensor([max(1, width - 1), max(1, height - 1)])
    return F.grid_sample(x, 2 * at / size - 1, mode="bilinear", padding_mode="border", align_corners=True)

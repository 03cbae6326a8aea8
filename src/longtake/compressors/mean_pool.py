"""The simplest compressor: latents averaged over 2 × 4 × 4 tokens' worth of cells, then the model's patch embedding.

Training-free, without pixels or state. The mean of latents is not the latent of a mean picture: what PackForcing's
low-resolution branch (`DualBranch`) does through pixels is closer to what the model has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from ..geometry import Geometry
from .base import STRIDE, Compressor, Embedder, TakeState, check_settings


@dataclass(frozen=True)
class MeanPool(Compressor):
    """Average-pooled latents. See `Compressor` for `carry` and `where`."""

    carry: str = "blocks"
    where: str = "midpoint"

    name: ClassVar[str] = "mean-pool"

    def __post_init__(self) -> None:
        check_settings(self.carry, self.where)

    def compress(
        self, latents: Tensor, pixels: Tensor | None, state: TakeState, model: Embedder, geometry: Geometry
    ) -> tuple[Tensor, TakeState]:
        frames, rows, columns = self.grid(geometry, latents.shape[2])
        return model.embed(pooled(latents, (frames, rows, columns), geometry)), state


def pooled(latents: Tensor, grid: tuple[int, int, int], geometry: Geometry) -> Tensor:
    """Latents [B, C, F, h, w] averaged to one patch of cells per compressed token of `grid`; rows and columns that
    fill no compressed token are left out, as they are of its positions."""
    _, height, width = geometry.patch
    kept = [min(n, STRIDE[1 + i] * grid[1 + i]) for i, n in enumerate(geometry.grid)]
    latents = latents[..., : kept[0] * height, : kept[1] * width]
    return functional.adaptive_avg_pool3d(latents, (grid[0], grid[1] * height, grid[2] * width))

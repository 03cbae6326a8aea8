"""PackForcing's low-resolution branch (§3.3): decoded pixels, averaged to a quarter of their height and width and half
their number of frames, encoded again by the video encoder, and put through the model's own patch embedding.

Its tokens are a small video in the form the model was trained on, so it works without training. The pixels are those
the take decodes anyway; the encoder's state goes with the take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from ..errors import LongtakeError
from ..geometry import Geometry
from .base import STRIDE, Compressor, Embedder, TakeState, check_settings


@dataclass(frozen=True)
class LowResolution(Compressor):
    """Pooled pixels, encoded. `streaming` carries the encoder's features from chunk to chunk; without it every chunk is
    encoded like the first one of a video. See `Compressor` for `carry` and `where`."""

    carry: str = "blocks"
    where: str = "midpoint"
    streaming: bool = True

    name: ClassVar[str] = "low-resolution"
    wants_pixels = True

    def __post_init__(self) -> None:
        check_settings(self.carry, self.where)

    def compress(
        self, latents: Tensor, pixels: Tensor | None, state: TakeState, model: Embedder, geometry: Geometry
    ) -> tuple[Tensor, TakeState]:
        if pixels is None:
            raise LongtakeError("this compressor sees pixels: give it the chunk's decoded frames")
        grid = self.grid(geometry, latents.shape[2])
        before = state if self.streaming else TakeState()
        small, after = model.encoder().encode(shrunk(pixels, grid, geometry, before.frames == 0), before)
        rows, columns = (n * p for n, p in zip(grid[1:], geometry.patch[1:], strict=True))
        return model.embed(small[..., :rows, :columns]), after if self.streaming else state


def shrunk(pixels: Tensor, grid: tuple[int, int, int], geometry: Geometry, first: bool) -> Tensor:
    """uint8 frames [B, T, H, W, 3] averaged to a small video in [-1, 1] that encodes to one latent frame per frame of
    `grid` and to at least a patch of cells per compressed token: [B, 3, t, H′, W′].

    A whole picture is pooled 4 × 4; its last cells that fill no compressed token (480 pixels make 15 cells, 7 tokens)
    are encoded with the rest and left out afterwards, as published."""
    sizes, pooled = [], []
    for side, n, stride, patch, factor in zip(
        pixels.shape[2:4], grid[1:], geometry.stride[1:], geometry.patch[1:], STRIDE[1:], strict=True
    ):
        small = max(n * patch * stride, side // factor // stride * stride)
        pooled.append(small)
        sizes.append(min(side, small * factor))
    frames = (grid[0] - 1) * geometry.stride[0] + 1 if first else grid[0] * geometry.stride[0]
    video = pixels[:, :, : sizes[0], : sizes[1]].permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
    return functional.adaptive_avg_pool3d(video, (frames, pooled[0], pooled[1]))

"""Latent grid arithmetic: pixel frames ↔ latent frames ↔ tokens, and the chunks a take is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import LongtakeError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The sizes of one take. Every number comes from a model's configuration or the user's request.

    A causal video VAE turns the first pixel frame into one latent frame and every further `stride[0]` pixel frames into
    one more; a patch of `patch` latent cells is one token.
    """

    height: int  # pixels
    width: int  # pixels
    channels: int  # latent channels
    chunk_frames: int  # latent frames generated together
    fps: float
    stride: tuple[int, int, int] = (4, 8, 8)  # pixels per latent cell: time, height, width
    patch: tuple[int, int, int] = (1, 2, 2)  # latent cells per token: time, height, width

    def __post_init__(self) -> None:
        for side, pixels, axis in (("height", self.height, 1), ("width", self.width, 2)):
            unit = self.stride[axis] * self.patch[axis]
            if pixels <= 0 or pixels % unit:
                above = max(1, pixels // unit + 1) * unit
                near = f"{above - unit} or {above}" if above > unit else f"{above}"
                raise LongtakeError(f"{side} {pixels} does not fit this model: use a multiple of {unit}, e.g. {near}")
        if self.chunk_frames < 1:
            raise LongtakeError(f"chunk of {self.chunk_frames} latent frames: a chunk has at least 1")
        if self.patch[0] != 1:
            raise LongtakeError(
                f"temporal patch {self.patch[0]} is not supported: causal chunks need a temporal patch of 1"
            )

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latent grid, in cells."""
        return self.height // self.stride[1], self.width // self.stride[2]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in one latent frame."""
        h, w = self.latent_size
        return h // self.patch[1], w // self.patch[2]

    @property
    def tokens_per_frame(self) -> int:
        return math.prod(self.grid)

    @property
    def packable(self) -> range | Tensor | None:
        """Tokens of a chunk that a policy may drop one by one; None: all."""
        return None

    @property
    def structural(self) -> range | Tensor:
        """Tokens of a chunk that frame its content."""
        return range(0)

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames that `latent_frames` from the start of a video decode to."""
        return 0 if latent_frames == 0 else 1 + (latent_frames - 1) * self.stride[0]

    def latent_frames(self, pixel_frames: int) -> int:
        """The fewest latent frames that decode to at least `pixel_frames`."""
        return 0 if pixel_frames <= 0 else 1 + math.ceil((pixel_frames - 1) / self.stride[0])

    def chunks(self, seconds: float, given: int = 0) -> int:
        """The fewest chunks that last `seconds`, when `given` latent frames (a first image) exist already."""
        if not seconds > 0 or not math.isfinite(seconds):
            raise LongtakeError(f"{seconds} seconds: ask for a finite length above 0")
        missing = self.latent_frames(round(seconds * self.fps)) - given
        return max(1, math.ceil(missing / self.chunk_frames))

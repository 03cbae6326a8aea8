"""The contract of a compressor.

A compressor turns a finished chunk into a low-resolution chunk: one token for `stride` = 2 × 4 × 4 tokens of time,
height and width (PackForcing §3.3; ⌊F/2⌋·⌊rows/4⌋·⌊columns/4⌋ tokens), in the space the model's own patch embedding
leads to. The session carries these tokens through the model in the commit pass and keeps their K/V as the form
"compressed" of the block.

Letters: B takes, C latent channels, F latent frames, h, w latent cells, n tokens, d model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import LongtakeError
from ..geometry import Geometry

STRIDE = (2, 4, 4)  # tokens that one compressed token stands for: time, height, width
CARRIES = ("blocks", "projection")  # how compressed tokens get their K/V
POSITIONS = ("midpoint", "raster", "phasor")


class Embedder(Protocol):
    """What a compressor may use of the model; every host has it."""

    def embed(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] → tokens [B, n, d] by the model's patch embedding."""

    def encoder(self) -> Any:
        """The model's video encoder, a piece at a time (`compressors.encoding.StreamingEncoder`)."""


@dataclass(frozen=True)
class TakeState:
    """What a compressor remembers of one take: the features its own video encoder carries from piece to piece. A value:
    compressing returns a new one and leaves the old one as it was."""

    slots: tuple[Tensor | None, ...] = ()
    frames: int = 0  # frames the encoder has seen

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots if slot is not None)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors for safetensors and metadata for JSON."""
        tensors = {f"{i:03d}": slot.contiguous() for i, slot in enumerate(self.slots) if slot is not None}
        # strides can steer which convolution kernel runs: kept, so that a restored take runs the same ones
        strides = [None if slot is None else list(slot.stride()) for slot in self.slots]
        return tensors, {"frames": self.frames, "strides": strides}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], device: torch.device) -> TakeState:
        """The state that `state_dict` wrote down, on `device`."""
        slots: list[Tensor | None] = []
        for i, stride in enumerate(meta["strides"]):
            if stride is None:
                slots.append(None)
                continue
            stored = tensors[f"{i:03d}"]
            slot = torch.empty_strided(stored.shape, stride, dtype=stored.dtype, device=device)
            slots.append(slot.copy_(stored))
        return cls(tuple(slots), int(meta["frames"]))


class Compressor(ABC):
    """Makes the compressed form of chunks. Holds weights and settings; what it remembers of a take is a `TakeState`.

    `carry` says how its tokens get K/V: "blocks" carries them through every transformer block at t = 0, with text and
    the same past as the chunk's own commit pass; "projection" puts them straight through each layer's key and value
    projections, which saves a pass and needs training.
    `positions` says where a token stands that covers a stretch of full-resolution positions: "midpoint" is the floored
    middle (t = f₀ + 2i + 1, y = 4j + 2, x = 4k + 2), "raster" the index in the small grid, and "phasor" the direction
    of the mean of the covered unit phasors, which for stretches of up to six positions is their exact centre.
    """

    name: ClassVar[str] = ""  # for the command line; trained ones go by their folder
    carry: str = "blocks"
    where: str = "midpoint"  # one of POSITIONS
    wants_pixels: bool = False  # whether `compress` needs the decoded frames

    @abstractmethod
    def compress(
        self, latents: Tensor, pixels: Tensor | None, state: TakeState, model: Embedder, geometry: Geometry
    ) -> tuple[Tensor, TakeState]:
        """Tokens [B, n, d] of a chunk, frame-major, and the state after it.

        latents [B, C, F, h, w] as the sampler made them; pixels uint8 [B, T, H, W, 3], what they decode to in the
        take (None unless `wants_pixels`). Called for every chunk of a take, in order."""

    def grid(self, geometry: Geometry, span: int | None = None) -> tuple[int, int, int]:
        """Frames, rows and columns of compressed tokens for a chunk of `span` latent frames (default: a whole one)."""
        sizes = (geometry.chunk_frames if span is None else span, *geometry.grid)
        frames, rows, columns = (max(1, n // s) for n, s in zip(sizes, STRIDE, strict=True))
        return frames, rows, columns

    def tokens(self, geometry: Geometry, span: int | None = None) -> int:
        """How many tokens a chunk of `span` latent frames is compressed to (default: a whole chunk)."""
        frames, rows, columns = self.grid(geometry, span)
        return frames * rows * columns

    def positions(self, base: Tensor, step: Tensor, geometry: Geometry, span: int) -> tuple[Tensor, Tensor]:
        """Position and step per frame of shift [n, axes] of the compressed tokens of a chunk whose full-resolution
        tokens, frame-major, stand at `base` and `step` [span · tokens_per_frame, axes]."""
        full = (span, *geometry.grid)
        frames, *small = self.grid(geometry, span)
        in_plane = zip(geometry.grid, small, STRIDE[1:], strict=True)
        stretches = [in_time(span, frames), *(in_space(n, parts, stride) for n, parts, stride in in_plane)]
        base, step = (x.unflatten(0, full) for x in (base, step))
        if self.where == "phasor":
            for axis, parts in enumerate(stretches):
                base, step = (
                    torch.stack([x.narrow(axis, a, b - a).mean(axis) for a, b in parts], axis) for x in (base, step)
                )
        else:
            for axis, parts in enumerate(stretches):
                at = [i if self.where == "raster" else a + (b - a) // 2 for i, (a, b) in enumerate(parts)]
                base, step = (x.index_select(axis, torch.tensor(at, device=x.device)) for x in (base, step))
        return base.flatten(0, 2), step.flatten(0, 2)

    def check(self, host: Any) -> None:  # noqa: B027 (one that was not trained fits any model)
        """Raise LongtakeError if this compressor is not for this model."""

    def describe(self) -> dict[str, Any]:
        """What a snapshot says of it: a continuation needs the same."""
        return {"kind": type(self).__name__, "carry": self.carry, "positions": self.where}


def in_time(frames: int, parts: int) -> list[tuple[int, int]]:
    """The latent frames that each of `parts` compressed ones stands for; none of a chunk's is left out."""
    return [(i * frames // parts, (i + 1) * frames // parts) for i in range(parts)]


def in_space(n: int, parts: int, stride: int) -> list[tuple[int, int]]:
    """The rows or columns that each of `parts` compressed ones stands for; a remainder is left out (30 rows give 7)."""
    size = min(n, stride)
    return [(i * size, (i + 1) * size) for i in range(parts)]


def check_settings(carry: str, positions: str) -> None:
    """Raise LongtakeError for a setting that no compressor has."""
    if carry not in CARRIES:
        raise LongtakeError(f"carry {carry!r}: use one of {', '.join(CARRIES)}")
    if positions not in POSITIONS:
        raise LongtakeError(f"positions {positions!r}: use one of {', '.join(POSITIONS)}")

"""What the planner is asked: a model's shape, a size, a length, and what is done with the past."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import LongtakeError
from ..geometry import Geometry
from ..policies import KVPolicy

if TYPE_CHECKING:
    from .wan_sizes import WanSizes

MOST = {"seconds": 86_400, "frames": 2_000_000, "chunks": 100_000}  # of a take that is counted chunk by chunk
_TOO_LONG = "give at most {:,}; a bounded policy costs the same per chunk however long the take is"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of one named model; a family adds its own constants as fields."""

    name: str
    about: str
    width: int  # pixels, where the request names no size
    height: int
    fps: float
    frame_stride: int = 4  # pixel frames of a latent frame
    head_dim: int = 128
    itemsize: int = 2  # bytes of one K or V element, of an activation, and of most weights
    own: str = "full"  # the policy it is run with if the user names none, as the command line has it
    planned: str = "full"  # the policy of a plan that names none: what others are compared with
    training_frames: int | None = None  # latent frames of a training clip, if known
    decay: float | None = None  # measured fall of attention per latent frame of distance, if it was
    sizes: tuple[tuple[int, int], ...] = ()  # others it is asked for: width, height


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """One question to the planner. What is None is left to the family's defaults; of `frames` (pixel frames),
    `seconds` and `chunks` at most one is given."""

    model: str
    size: tuple[int, int] | None = None  # width, height in pixels
    frames: int | None = None
    seconds: float | None = None
    chunks: int | None = None
    shape: ModelShape | None = None  # of a model that is not among the named ones
    policy: KVPolicy | None = None
    residency: str = "resident"  # where the view lives: or "scratch"
    head_bytes: int | None = None  # of one token's K, or V, of one head as the past is kept; None: as it is computed
    decode: bool = True  # whether pixels are wanted
    endless: bool = False  # the session is not told where the take ends
    chunk: int | None = None  # latent frames generated together
    steps: int | None = None  # denoising (or mask-decoding) forwards of a chunk

    def __post_init__(self) -> None:
        lengths = {"--frames": self.frames, "--seconds": self.seconds, "--chunks": self.chunks}
        given = [name for name, value in lengths.items() if value is not None]
        if len(given) != 1:
            raise LongtakeError(
                f"{' and '.join(given) or 'no length'}: say how long the video is with one of {', '.join(lengths)}"
            )
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise LongtakeError(f"{self.seconds:g} seconds: ask for a finite length above 0")
        if self.seconds is not None and self.seconds > MOST["seconds"]:
            raise LongtakeError(f"{self.seconds:g} seconds: {_TOO_LONG.format(MOST['seconds'])}")
        for name in ("frames", "chunks", "chunk", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LongtakeError(f"--{name} {value}: give at least 1")
            if value is not None and value > MOST.get(name, value):
                raise LongtakeError(f"--{name} {value}: {_TOO_LONG.format(MOST[name])}")

    @property
    def held(self) -> dict[str, int]:
        """What a `HistoryShape` is to know of how the past is kept."""
        return {} if self.head_bytes is None else {"head_bytes": self.head_bytes}

    def pixel_frames(self, fps: float) -> int | None:
        """Pixel frames asked for by `frames` or `seconds`; None if the length is given in chunks."""
        return self.frames if self.seconds is None else max(1, round(self.seconds * fps))

    def pixels(self, shape: ModelShape, unit: int) -> tuple[int, int]:
        """Width and height, multiples of `unit`; the shape's own where the request names none."""
        size = self.size or (shape.width, shape.height)
        if any(side < unit or side % unit for side in size):
            near = "x".join(str(max(1, round(side / unit)) * unit) for side in size)
            raise LongtakeError(f"size {size[0]}x{size[1]}: {shape.name} needs multiples of {unit} pixels, e.g. {near}")
        return size

    def take(self, shape: WanSizes) -> tuple[Geometry, int]:
        """The take's geometry, and its latent frames; where chunks are asked for, whole ones."""
        width, height = self.pixels(shape, shape.unit())
        geometry = shape.geometry(height, width, self.chunk)
        asked = self.pixel_frames(shape.fps)
        if asked is None:
            return geometry, (self.chunks or 0) * geometry.chunk_frames
        return geometry, geometry.latent_frames(asked)

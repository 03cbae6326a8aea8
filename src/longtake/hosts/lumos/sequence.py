"""How text, header and frames become one sequence of ids, and where each token stands.

    BOS text SEPARATOR   VIDEO_BEGIN seconds fps   FRAME_0 FRAME_1 …
    FRAME = FRAME_BEGIN height/32 width/32  (a row of width/8 codes, NEWLINE) × height/8  FRAME_END

Codes and newlines are a frame's content, the other four its structure. With p0 the index of the first content token
of the first frame: content of frame f, row a, column b stands at (p0 + 4f, p0 + 8a, p0 + 8b), everything else at its
index in the sequence, on every axis.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...errors import LongtakeError
from ...geometry import Geometry
from ...plan import TokenSet

MASKED, FIXED = -1, -2  # what a cell of a content grid can be beside a code: to be drawn, or never drawn (a newline)
SIZE_UNIT = 32  # pixels per unit of the two size tokens
OPENING = 3  # structural tokens before a frame's content; one more closes it
HEADER = 3  # tokens of the video header


@dataclass(frozen=True)
class Vocabulary:
    """Ids of everything that is not text; the published ones by default."""

    bos: int = 0
    frame_end: int = 8196
    frame_begin: int = 8197
    separator: int = 8710
    newline: int = 8803
    integer: int = 8804  # + n is the number n
    mask: int = 9003
    video_begin: int = 9004
    visual: int = 65_536  # + c is code c
    largest: int = 198  # integer that has an id

    @classmethod
    def of(cls, given: dict[str, Any] | None) -> Vocabulary:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(given or {}) - known)
        if unknown:
            names = ", ".join(sorted(known))
            raise LongtakeError(f"config.json: vocabulary names {', '.join(unknown)}; known: {names}")
        return cls(**(given or {}))

    def __contains__(self, word: int) -> bool:
        """Whether an id is one of these, and so no text."""
        named = {getattr(self, f.name) for f in fields(self)} - {self.largest}
        return word in named or self.integer <= word <= self.integer + self.largest


@dataclass(frozen=True)
class LumosGeometry(Geometry):
    """A frame of codes with a newline behind every row, between four structural tokens."""

    def __post_init__(self) -> None:
        for side, pixels in (("height", self.height), ("width", self.width)):
            if pixels <= 0 or pixels % SIZE_UNIT:
                near = max(1, round(pixels / SIZE_UNIT)) * SIZE_UNIT
                raise LongtakeError(
                    f"{side} {pixels} does not fit this model: use a multiple of {SIZE_UNIT}, e.g. {near}"
                )
        super().__post_init__()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of content tokens, the column of newlines included."""
        rows, columns = self.latent_size
        return rows, columns + 1

    @property
    def codes(self) -> int:
        """Visual tokens of a frame."""
        rows, columns = self.latent_size
        return rows * columns

    @property
    def tokens_per_frame(self) -> int:
        return super().tokens_per_frame + OPENING + 1

    @property
    def packable(self) -> TokenSet:
        return range(OPENING, self.tokens_per_frame - 1)

    @property
    def structural(self) -> TokenSet:
        return torch.tensor([*range(OPENING), self.tokens_per_frame - 1])


def frame_ids(content: Tensor, geometry: LumosGeometry, words: Vocabulary) -> Tensor:
    """Content grids [B, 1, 1, rows, columns + 1] of codes, MASKED and FIXED → ids [B, N] of a frame."""
    content = content.flatten(1)  # [B, c]
    named = torch.where(content == MASKED, words.mask, words.newline)
    size = [words.integer + side // SIZE_UNIT for side in (geometry.height, geometry.width)]
    around = content.new_tensor([words.frame_begin, *size, words.frame_end]).expand(len(content), -1)
    return torch.cat((around[:, :OPENING], torch.where(content < 0, named, content + words.visual), around[:, -1:]), 1)


def text_positions(tokens: int) -> tuple[Tensor, Tensor]:
    """Base and step [n, 3] of text and header: the index in the sequence on every axis, whatever the time."""
    base = torch.arange(tokens, dtype=torch.float64)[:, None].repeat(1, 3)
    return base, torch.zeros_like(base)


def frame_positions(geometry: LumosGeometry, prefix: int, frame: int) -> tuple[Tensor, Tensor]:
    """Base and step [N, 3] of latent frame `frame` behind `prefix` tokens of text and header."""
    rows, columns = geometry.grid
    n, (time, height, width) = geometry.tokens_per_frame, geometry.stride
    p0 = prefix + OPENING
    base = torch.arange(prefix, prefix + n, dtype=torch.float64)[:, None].repeat(1, 3)
    step = torch.full_like(base, n)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    content = slice(OPENING, n - 1)
    base[content, 0] = p0
    base[content, 1] = p0 + height * row.flatten().double()
    base[content, 2] = p0 + width * column.flatten().double()
    step[content] = torch.tensor([time, 0, 0], dtype=torch.float64)
    return base + frame * step, step


def length(geometry: Geometry, frames: int, words: Vocabulary) -> tuple[int, int]:
    """Seconds and frames per second, as the header gives them, of a take of `frames` latent frames; an image is one
    frame in one second."""
    if frames == 1:
        return 1, 1
    fps = round(geometry.fps)
    seconds = round(geometry.pixel_frames(frames) / geometry.fps)
    return min(max(1, seconds), words.largest), min(fps, words.largest)


def header(seconds: int, fps: int, words: Vocabulary) -> list[int]:
    return [words.video_begin, words.integer + seconds, words.integer + fps]

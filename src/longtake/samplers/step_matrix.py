"""Which chunk takes which step in which row, when several are denoised at once, each noisier than the one before.

Chunk c enters `lag` rows after chunk c − 1 (SkyReels-V2 calls it `ar_step`; MAGI-1's is steps / window, its "stage")
and then takes one step a row, so in row r it takes step r − c·lag. A lag of `steps` or more is one chunk at a time, a
lag of 0 is all chunks together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import LongtakeError


@dataclass(frozen=True)
class StepMatrix:
    """`steps` denoising steps per chunk, every chunk `lag` steps behind the one before it."""

    steps: int
    lag: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise LongtakeError(f"{self.steps} steps: a chunk needs at least 1")
        if self.lag < 0:
            raise LongtakeError(
                f"lag {self.lag}: use 0 (all chunks together) to {self.steps} (one after the other); diffusers: ar_step"
            )

    def start(self, chunk: int) -> int:
        """The row of a chunk's first step; chunks are counted from the first one that is generated."""
        return chunk * min(self.lag, self.steps)

    def step(self, row: int, chunk: int) -> int | None:
        """The step a chunk takes in a row; None while it has not entered and when it is done."""
        step = row - self.start(chunk)
        return step if 0 <= step < self.steps else None

    def rows(self, chunks: int) -> int:
        """Rows until `chunks` chunks are done."""
        return self.start(chunks - 1) + self.steps if chunks else 0

    def in_flight(self, chunks: int | None) -> int:
        """Most chunks at once, of `chunks` (None: of any number)."""
        if self.lag == 0:
            if chunks is None:
                raise LongtakeError("with lag 0 all chunks are made together: say how many (chunks=, num_frames=)")
            return chunks
        most = math.ceil(self.steps / min(self.lag, self.steps))
        return most if chunks is None else max(1, min(most, chunks))

    def counters(self, chunks: int, ready: int = 0) -> list[list[int]]:
        """The published table: steps taken by every chunk after every row, 0 before it enters, steps + 1 once it is
        done and for the first `ready` chunks, which are given."""
        done = self.steps + 1
        return [
            [done] * ready
            + [min(max(row + 1 - self.start(chunk), 0), done) for chunk in range(chunks - ready)]
            for row in range(self.rows(chunks - ready))
        ]  # fmt: skip

    def check(self, chunks: int, window: int) -> None:
        """Raise LongtakeError if more chunks would be in flight than a model made for `window` chunks can see."""
        least = math.ceil(self.steps / window)
        if chunks > window and self.lag < least:
            raise LongtakeError(
                f"lag {self.lag} with {self.steps} steps puts more chunks in flight than the {window} this model sees: "
                f"use lag={least} or more"
            )

"""MAGI-1's KV ranges: a chunk sees its last few predecessors, fewer as it becomes cleaner.

`ranges` are numbers of chunks, the chunk itself included, for equal parts of its denoising: with 5/4/3/2 a chunk in its
first quarter sees four before it, in its last quarter one. What no chunk can see any more is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import LongtakeError
from ..plan import BlockTable, Drop, Entry, HistoryShape, Plan, Signals
from .base import KVPolicy


@dataclass(frozen=True)
class KVRange(KVPolicy):
    """`ranges`: chunks seen, itself included, by progress. `clean`: chunks a finished one sees when it is read once
    more."""

    ranges: str = "5/4/3/2"
    clean: int = 1

    name: ClassVar[str] = "kv-range"

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = self.ranges.split("/")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or self.clean < 1:
            raise LongtakeError(
                f"KV ranges {self.ranges!r}, clean {self.clean}: give numbers of chunks from 1 up, e.g. 5/4/3/2"
            )

    @property
    def chunks(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.ranges.split("/"))

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        newest = table.live[-1]
        chunk = max(block.span for block in table.live)
        first = newest.frame - (max(self.chunks) - 1) * chunk  # what the newest chunk may see begins here
        gone = [block for block in table.blocks if block.end <= first and block.role != "anchor"]
        seen = [block for block in table.blocks if block not in gone]
        return Plan(tuple(Entry(block.id) for block in seen), tuple(Drop(block.id) for block in gone))

    def reach(self, step: int, steps: int) -> int:
        """Chunks seen at step `step` of `steps`, itself included; at step `steps` the chunk is finished."""
        if step >= steps:
            return self.clean
        return self.chunks[step * len(self.chunks) // steps]

    def capacity(self, shape: HistoryShape) -> int:
        return max(self.chunks) * shape.chunk_tokens

    def check(self, shape: HistoryShape) -> None:
        if max(self.chunks) < shape.live_chunks:
            raise LongtakeError(
                f"KV ranges {self.ranges!r}: {shape.live_chunks} chunks are in flight at once, so let the first range "
                f"be {shape.live_chunks} or more"
            )

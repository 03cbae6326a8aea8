"""Full history: keep and see everything. The reference every other policy is measured against; its cost grows with the
take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import BlockTable, Entry, HistoryShape, Plan, Signals
from .base import KVPolicy


@dataclass(frozen=True)
class FullHistory(KVPolicy):
    """See every committed block. Memory and time per chunk grow without bound."""

    name: ClassVar[str] = "full"

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        return Plan(tuple(Entry(block.id) for block in table.blocks))

    def capacity(self, shape: HistoryShape) -> int | None:
        return None if shape.frames is None else shape.frames * shape.tokens_per_frame

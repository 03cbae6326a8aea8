"""Decisions written down, and followed again: to compare carries, policies or machines on exactly the same schedule."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from ..errors import LongtakeError
from .base import CARRIES, Decision, ReusePolicy, ReuseState, Turn, check_choice
from .metric import Change

FORMAT = 1


def write_log(path: Any, decisions: Iterable[Decision], about: dict[str, Any] | None = None) -> None:
    """Write decisions as JSON, for `ReplayReuse`; `about` says what they were made by. Raises LongtakeError."""
    content = {"format": FORMAT, "about": about or {}, "decisions": [asdict(d) for d in decisions]}
    try:
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")
    except OSError as error:
        raise LongtakeError(f"the reuse log cannot be written to {path}: {error}") from error


def read_log(path: Any) -> list[Decision]:
    """The decisions of a log. Raises LongtakeError if it is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return [Decision(**decision) for decision in content["decisions"]]
    except OSError as error:
        raise LongtakeError(f"reuse log {path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LongtakeError(f"{path} is no reuse log: give a file that --reuse-log or write_log wrote") from error


@dataclass(frozen=True)
class ReplayReuse(ReusePolicy):
    """Do again what a log says; steps that it does not know are computed."""

    log: str = ""  # a file that `write_log` wrote
    carry: str = "velocity"
    decisions: tuple[Decision, ...] = field(default=(), repr=False)

    name: ClassVar[str] = "replay"
    bare: ClassVar[str | None] = "log"

    def __post_init__(self) -> None:
        check_choice("carry", self.carry, CARRIES)
        if not self.log and not self.decisions:
            raise LongtakeError("replay needs the log to follow: replay:FILE, or ReplayReuse.of(decisions)")
        if self.log:
            _ = self._reused  # a wrong file shows here, not in the middle of a take

    @classmethod
    def of(cls, decisions: Iterable[Decision], carry: str = "velocity") -> Self:
        """Replay decisions at hand, e.g. those of `chunk.stats.decisions`."""
        return cls(carry=carry, decisions=tuple(decisions))

    @cached_property
    def _reused(self) -> frozenset[tuple[int, int]]:
        known = self.decisions or read_log(self.log)
        return frozenset((d.chunk, d.index) for d in known if d.reused)

    def carries(self) -> str:
        return self.carry

    def one(self, turn: Turn, state: ReuseState, change: Change | None) -> Decision:
        reused = turn.index > 0 and (turn.chunk, turn.index) in self._reused
        return Decision(turn.chunk, turn.index, turn.timestep, None, 0.0, reused, "replayed")

"""A batch on Ray: each worker makes a line at a time, and a line whose worker dies goes to another.

Only the driver writes results, so that a line which two workers made (one of them taken for dead) is there once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import LongtakeError
from .batch import Outcome, made
from .connecting import first_line
from .jobs import Line
from .making import Maker
from .results import Results

ATTEMPTS = 3  # workers that may die of one line
_LOOK = 0.5  # seconds between two looks for somebody who asks for the end


@dataclass
class _Turn:
    """A line that a worker makes."""

    worker: Any
    line: Line
    attempt: int
    folder: Path
    cleaning: contextlib.ExitStack


class Farm:
    """Makes lines on `count` workers, each with `share` of Ray's resources; `options` are those of `Maker`.

    begun(line, attempt, worker): told before each turn.
    """

    def __init__(
        self, ray: Any, count: int, share: dict[str, float], options: dict[str, Any],
        begun: Callable[[Line, int, Any], None] = lambda line, attempt, worker: None,
    ) -> None:  # fmt: skip
        self._ray, self._count, self._begun = ray, count, begun
        self._kind = ray.remote(Maker).options(max_restarts=0, scheduling_strategy="SPREAD", **share)
        self._options = options
        self._idle: list[Any] = []
        self._turns: dict[Any, _Turn] = {}
        self._deaths, self._proven = 0, False

    def __call__(self, lines: Sequence[Line], results: Results, go_on: Callable[[], bool]) -> Iterator[Outcome]:
        """Raises LongtakeError if no worker can be started."""
        waiting = deque((line, 1) for line in lines)
        try:
            while (waiting or self._turns) and go_on():
                while waiting and len(self._turns) < self._count:
                    self._begin(*waiting.popleft(), results)
                done, _ = self._ray.wait(list(self._turns), num_returns=1, timeout=_LOOK)
                for answer in done:
                    turn = self._turns.pop(answer)
                    with turn.cleaning:
                        outcome = self._end(turn, answer, results)
                    if outcome is None:
                        waiting.appendleft((turn.line, turn.attempt + 1))
                    else:
                        yield outcome
        finally:
            for worker in [*self._idle, *(turn.worker for turn in self._turns.values())]:
                self._ray.kill(worker)
            for turn in self._turns.values():
                turn.cleaning.close()
            self._idle, self._turns = [], {}

    def _begin(self, line: Line, attempt: int, results: Results) -> None:
        worker = self._idle.pop() if self._idle else self._kind.remote(**self._options)
        cleaning = contextlib.ExitStack()
        folder = cleaning.enter_context(results.stage())
        answer = worker.answer.remote(line.job, folder.resolve(), results.token, Path.cwd())
        self._turns[answer] = _Turn(worker, line, attempt, folder, cleaning)
        self._begun(line, attempt, worker)

    def _end(self, turn: _Turn, answer: Any, results: Results) -> Outcome | None:
        """What came of a turn; None: the worker died, another is to try."""
        job = turn.line.job
        assert job is not None
        try:
            told = self._ray.get(answer)
        except self._ray.exceptions.RayActorError as error:
            self._deaths += 1
            if not self._proven and self._deaths >= ATTEMPTS:
                raise LongtakeError(f"workers die before they make anything: {first_line(error)}") from error
            if turn.attempt < ATTEMPTS:
                return None
            problem = f"its worker died, {ATTEMPTS} times; the memory of the workers' machine is a usual reason"
            return Outcome(turn.line.number, "failed", job.name, problem, attempts=turn.attempt)
        except self._ray.exceptions.RayError as error:  # an answer that was lost on its way
            self._idle.append(turn.worker)
            if turn.attempt < ATTEMPTS:
                return None
            return Outcome(turn.line.number, "failed", job.name, first_line(error), attempts=turn.attempt)
        self._idle.append(turn.worker)
        if "problem" in told:
            return Outcome(turn.line.number, "failed", job.name, told["problem"], attempts=turn.attempt)
        record = told["record"]
        if (theirs := record["worker"]["longtake"]) != __version__:
            raise LongtakeError(f"a worker runs longtake {theirs}, this is {__version__}: install the same everywhere")
        self._proven = True
        try:
            if told["video"] is None:
                first = results.commit(turn.folder, job)
            else:
                first = results.commit_bytes(told["video"], record, job)
        except LongtakeError as error:
            return Outcome(turn.line.number, "failed", job.name, str(error), attempts=turn.attempt)
        return made(turn.line, record, first, turn.attempt)

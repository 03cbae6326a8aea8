"""A file of takes, made one after the other in this process, or many at once (`farm`), each exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .jobs import Line
from .making import Maker, Stopped, problem_of
from .results import Results

STATUSES = ("made", "kept", "failed", "wrong", "stopped")


@dataclass(frozen=True)
class Outcome:
    """How a line ended: `made` now, `kept` from before (or the same as another line) with the figures of the run that
    made it, `failed`, or `wrong` as it stands, with what was wrong; `stopped` if it was not come to."""

    line: int
    status: str
    name: str | None = None
    problem: str | None = None
    frames: int | None = 0  # None of what follows: not known
    seconds: float | None = 0.0  # of work
    video_seconds: float | None = 0.0
    attempts: int | None = 1

    def row(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


Told = Callable[[Outcome], None]


class Runner(Protocol):
    """Makes lines: yields an outcome for each that it was given and came to."""

    def __call__(self, lines: Sequence[Line], results: Results, go_on: Callable[[], bool]) -> Iterator[Outcome]: ...


def run(lines: Sequence[Line], folder: Path, runner: Runner, go_on: Callable[[], bool], told: Told) -> list[Outcome]:
    """Make what is not there yet; every line's outcome, in the order of the file. Raises LongtakeError for a folder
    that cannot be used."""
    outcomes: dict[int, Outcome] = {}

    def note(outcome: Outcome) -> None:
        outcomes[outcome.line] = outcome
        told(outcome)

    with Results(folder) as results:
        wanted: dict[str, Line] = {}
        twins: list[tuple[Line, Line]] = []
        for line in lines:
            if line.job is None:
                note(Outcome(line.number, "wrong", problem=line.problem))
                continue
            try:
                found = results.record(line.job)
            except ValueError as error:
                note(Outcome(line.number, "wrong", line.job.name, str(error)))
                continue
            if found is not None:
                note(_kept(line.number, line.job.name, found))
            elif line.job.name in wanted:
                twins.append((line, wanted[line.job.name]))
            else:
                wanted[line.job.name] = line
        # takes of one model together, so that it is loaded once
        order = sorted(wanted.values(), key=lambda line: line.job.model if line.job else "")
        for outcome in runner(order, results, go_on):
            note(outcome)
        for line in wanted.values():
            if line.number not in outcomes:
                note(Outcome(line.number, "stopped", line.job.name if line.job else None))
        for line, first in twins:
            same = outcomes[first.number]
            status = "kept" if same.status == "made" else same.status
            note(replace(same, line=line.number, status=status))
        ordered = [outcomes[line.number] for line in lines]
        results.write_summary([outcome.row() for outcome in ordered])
    return ordered


def made(line: Line, record: dict[str, Any], first: bool, attempts: int = 1) -> Outcome:
    """The outcome of a line whose take is there now; `first`: this run's is the one that counts."""
    assert line.job is not None
    return Outcome(
        line.number, "made" if first else "kept", line.job.name, None, record["frames"], record["seconds"],
        record["video_seconds"], attempts,
    )  # fmt: skip


def _kept(line: int, name: str, record: dict[str, Any]) -> Outcome:
    """Of a take that an earlier run made, with its figures; how many attempts it took is not recorded."""
    frames, seconds, video = (record.get(key) for key in ("frames", "seconds", "video_seconds"))
    if not all(isinstance(figure, int | float) for figure in (frames, seconds, video)):
        return Outcome(line, "kept", name, "its take.json has no figures", None, None, None, None)
    return Outcome(line, "kept", name, None, frames, seconds, video, None)


class Here:
    """One take after the other, in this process."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker

    def __call__(self, lines: Sequence[Line], results: Results, go_on: Callable[[], bool]) -> Iterator[Outcome]:
        for line in lines:
            if not go_on():
                return
            assert line.job is not None
            try:
                with results.stage() as folder:
                    record = self.maker.make(line.job, folder, go_on)
                    outcome = made(line, record, results.commit(folder, line.job))
            except Stopped:
                return
            except Exception as error:  # whatever is wrong with one line, the others are made
                outcome = Outcome(line.number, "failed", line.job.name, problem_of(error))
            yield outcome

"""How far a take is: a bar on a terminal, a line now and then in a log. On stderr, always."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import TYPE_CHECKING

from .shell import bytes_text, say

if TYPE_CHECKING:
    from rich.progress import Progress

_LOG_SECONDS = 10  # between two lines where there is no terminal


class _Bar:
    """A progress bar on the terminal, gone when its work is done."""

    _bar: Progress

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone; the files are to be finished all the same
            self._bar.stop()


class TakeProgress(_Bar):
    """Counts the chunks of a take and tells chunks/s, realtime factor and bytes held.

    The realtime factor is seconds of video per second of work: from 1 on, a viewer would not have to wait.
    """

    def __init__(self, chunks: int, fps: float, label: str = "") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.chunks, self.fps, self.label = chunks, fps, label
        self.done, self.frames = 0, 0
        self._terminal = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("chunks"), TextColumn("{task.fields[rates]}", markup=False), TimeRemainingColumn(compact=True),
            console=console, disable=not self._terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=chunks, rates="")
        self._started = self._said = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall clock since the start."""
        return time.perf_counter() - self._started

    def step(self, frames: int, held: int) -> None:
        """A chunk of `frames` pixel frames is in its file; the take now holds `held` bytes."""
        self.done += 1
        self.frames += frames
        seconds = self.seconds
        realtime = self.frames / self.fps / seconds
        rates = f"{self.done / seconds:.2f} chunks/s, {realtime:.2f}x realtime, {bytes_text(held)} held"
        self._bar.update(self._task, completed=self.done, rates=rates)
        now = time.perf_counter()
        if not self._terminal and now - self._said > _LOG_SECONDS:
            self._said = now
            say(f"{self.label + ': ' if self.label else ''}{self.done}/{self.chunks} chunks, {rates}")

    def __enter__(self) -> TakeProgress:
        self._bar.start()
        self._started = self._said = time.perf_counter()
        return self


class DemoProgress(_Bar):
    """How far several takes are, which one is being made, and how long the rest will take."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._terminal = console.is_terminal
        self._bar = Progress(
            BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("chunks"), TimeRemainingColumn(compact=True),
            TextColumn("{task.description}", markup=False), console=console, disable=not self._terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("warming up", total=None)
        self._label = ""

    def tick(self, label: str, done: int, total: int) -> None:
        """`done` of `total` chunks of all takes are made, the last one under `label`."""
        self._bar.update(self._task, description=label, completed=done, total=total)
        if not self._terminal and label != self._label:
            say(f"{done - 1}/{total} chunks; {label}")
        self._label = label

    def __enter__(self) -> DemoProgress:
        self._bar.start()
        return self


class CountProgress(_Bar):
    """Counts finished things of one kind; where there is no terminal, a line every ten seconds."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.label, self._said, self._terminal = label, time.perf_counter(), console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[last]}", markup=False), TimeRemainingColumn(compact=True),
            console=console, disable=not self._terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=None, last="")

    def __enter__(self) -> CountProgress:
        self._bar.start()
        return self

    def __call__(self, done: int, total: int, last: str) -> None:
        """`done` of `total` are finished; `last` names the latest."""
        self._bar.update(self._task, completed=done, total=total, last=last)
        if not self._terminal and time.perf_counter() - self._said > _LOG_SECONDS:
            say(f"{self.label}: {done} of {total}")
            self._said = time.perf_counter()

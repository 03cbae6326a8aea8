"""What every benchmark does around its measuring: look who else is here, set threads, find the machine's ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import provenance, roofline
from .bench_report import Missing
from .machine import Clock, check_threads, cpu_threads, precision

Progress = Callable[[str, int, int], None]  # stage, done, of how many


def silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""


@dataclass(frozen=True)
class Stage:
    """Where a benchmark runs. `head` goes to its report, `settings` into the report's settings."""

    clock: Clock
    dtype: torch.dtype
    settings: dict[str, Any]
    head: dict[str, Any]
    progress: Progress

    @property
    def device(self) -> torch.device:
        return self.clock.device

    def others(self, shapes: Mapping[str, Any]) -> list[Missing]:
        """Rows for the named shapes (with a `device`) that are not for this kind of device."""
        here = self.device.type
        return [
            Missing(name, f"needs a {shape.device} device, this run was on {here}")
            for name, shape in shapes.items() if shape.device != here
        ]  # fmt: skip


@contextmanager
def staged(
    device: torch.device, dtype: str, *, threads: int | None = None, force: bool = False, command: str = "",
    progress: Progress | None = None, ceilings: Sequence[str] | None = None,
) -> Iterator[Stage]:  # fmt: skip
    """Within `with`: a quiet machine (watched to the end), threads set, no gradients, ceilings known.

    `ceilings` names the dtypes whose products are measured, by default `dtype` alone; none measures nothing. Raises
    LongtakeError for a dtype or threads that cannot be, and on a busy machine unless `force`.
    """
    kind = precision(dtype)
    check_threads(threads)
    progress = progress or silent
    progress("looking who else is here", 0, 1)
    busy = provenance.others_busy()
    provenance.refuse_if_busy(busy, force)
    progress("looking who else is here", 1, 1)
    with cpu_threads(threads) as running, torch.no_grad():
        clock = Clock(device)
        names = (dtype,) if ceilings is None else ceilings
        progress("ceilings", 0, 1)
        found = roofline.ceilings(clock, names) if names else None
        progress("ceilings", 1, 1)
        shares: dict[str, float | None] = {"before": busy, "during": None}
        head = {
            "command": command, "forced": force, "provenance": provenance.provenance(device), "others_busy": shares,
            "ceilings": found,
        }  # fmt: skip
        started = provenance.cpu_times()
        yield Stage(clock, kind, {"device": str(device), "dtype": dtype, "threads": running}, head, progress)
        ended = provenance.cpu_times()
        if started is not None and ended is not None:
            shares["during"] = started.others_until(ended)

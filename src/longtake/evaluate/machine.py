"""The machine that a benchmark runs on: its devices, threads and clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import LongtakeError
from .measure import rss_bytes

if TYPE_CHECKING:
    from ..hosts.base import Host

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RSS_EVERY = 0.005  # seconds between two looks at resident memory

S = TypeVar("S")


def named(shape: str | S, shapes: Mapping[str, S]) -> S:
    """The shape itself, or the one of that name. Raises LongtakeError for a name that is not there."""
    if not isinstance(shape, str):
        return shape
    if shape not in shapes:
        raise LongtakeError(f"no shape {shape!r}: use one of {', '.join(shapes)}")
    return shapes[shape]


def place(device: str, shape: str, instead: str) -> torch.device:
    """The device, if it is there. Raises LongtakeError, with `instead` as the shape that runs anywhere, if it is not.

    `shape` is the name of the shape that was asked for."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise LongtakeError(f"device {device!r}: use cpu or cuda") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise LongtakeError(f"shape {shape} on {found}: torch sees no CUDA device here; use --shape {instead}")
    return found


def precision(dtype: str) -> torch.dtype:
    """The dtype of that name. Raises LongtakeError for one that no benchmark runs in."""
    if dtype not in DTYPES:
        raise LongtakeError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_threads(count: int | None) -> None:
    """Raises LongtakeError for a number of threads that nothing runs on."""
    if count is not None and count < 1:
        raise LongtakeError(f"{count} threads: give 1 or more")


@contextmanager
def cpu_threads(count: int | None) -> Iterator[int]:
    """Within `with`, torch computes on `count` CPU threads, or on as many as before if that is None; gives how many."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def threads_for(host: Host, count: int | None) -> Iterator[int]:
    """`cpu_threads`, but where `count` is None one thread for an embedded model on a CPU: its operations take less time
    than waking a second thread on a busy machine."""
    from ..hosts.loading import embedded

    small = host.device.type == "cpu" and host.name in embedded()
    with cpu_threads(count or (1 if small else None)) as running:
        yield running


class Clock:
    """Wall clock with the device's queue drained, and the most memory held meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Seconds of `work`, the queue drained before and after."""
        started = self.now()
        work()
        return self.now() - started

    def empty(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def peak(self) -> Iterator[list[int | None]]:
        """Within it, the first element becomes the bytes held at most above those held at its beginning: by the
        allocator on a GPU, resident memory on a CPU; None where the system does not tell."""
        found: list[int | None] = [None]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            yield found
            found[0] = torch.cuda.max_memory_allocated(self.device) - before
            return
        start = rss_bytes()
        if start is None:
            yield found
            return
        over, highest = threading.Event(), [start]

        def look() -> None:
            while not over.wait(RSS_EVERY):
                highest[0] = max(highest[0], rss_bytes() or 0)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield found
        finally:
            over.set()
            watcher.join()
            found[0] = highest[0] - start

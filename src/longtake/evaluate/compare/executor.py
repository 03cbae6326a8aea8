"""Where the work of a comparison is done: in this process, in processes of this machine, or elsewhere.

A job is a picklable call without arguments that keeps its own result in the store. What one group of jobs shares (the
true frames of a scene, the takes of one prompt) is made once if they come to the same worker.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import LongtakeError
from ...policies import registry as policies
from ...reuse import registry as reuses

Prepare = Callable[[], None]


@dataclass(frozen=True)
class Job:
    """`work` returns "" or one line that says why it failed; what it raises ends the whole run."""

    number: int  # of the job in its list
    group: int  # jobs of a group should come to one worker
    work: Callable[[], str]


class Executor(ABC):
    """Runs jobs, each once."""

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        """Every job with what it returned, in whatever order they end. Raises what a job raised, and LongtakeError when
        a worker is lost."""


class Here(Executor):
    """One after the other, in this process."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        for job in jobs:
            yield job, job.work()


@dataclass(frozen=True)
class Processes(Executor):
    """`workers` processes of one thread each. `classes` are the policies and reuse policies that come from files;
    `prepare` is called once in every process."""

    workers: int
    classes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    prepare: Prepare | None = None

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        # A pool of one process for each worker: only so do all jobs of a group come to one of them.
        context = multiprocessing.get_context("spawn")
        groups = {group: place for place, group in enumerate(dict.fromkeys(job.group for job in jobs))}
        with ExitStack() as stack:
            options: dict[str, Any] = {
                "mp_context": context, "initializer": _begin, "initargs": (self.classes, self.prepare)
            }  # fmt: skip
            pools = [ProcessPoolExecutor(1, **options) for _ in range(min(self.workers, len(groups)))]
            for pool in pools:
                stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            futures: dict[Future[str], Job] = {
                pools[groups[job.group] % len(pools)].submit(job.work): job for job in jobs
            }
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool:
                raise LongtakeError(
                    "a worker process was killed, perhaps for want of memory: the same command goes on, with fewer "
                    "--workers if need be"
                ) from None


def know(classes: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    """Import the policies that come from files: cells are unpickled after this, and their classes have to be there."""
    for registry, specs in zip((policies, reuses), classes, strict=True):
        for spec in specs:
            if ".py:" in spec:
                registry.parse(spec)


def _begin(classes: tuple[tuple[str, ...], tuple[str, ...]], prepare: Prepare | None) -> None:
    """What a worker does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: finish the cell first
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    know(classes)
    if prepare is not None:
        prepare()


def _end_with_parent() -> None:
    # A pool's process does not notice that its parent was killed: it would wait for work for ever.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)

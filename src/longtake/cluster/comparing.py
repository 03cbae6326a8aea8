"""The work of a comparison on Ray: a worker takes one group of jobs at a time, and what a dead worker left goes to
another. Workers keep their results themselves, so the comparison's folder has to be one that all of them can write."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import LongtakeError
from ..evaluate.compare.executor import Executor, Job, Prepare, know
from ..evaluate.compare.writing import StoreError
from .connecting import first_line

ATTEMPTS = 3  # workers that may die of one job


class Worker:
    """The actor: one process with its models. `place` is the driver's folder, for names of files."""

    def __init__(
        self, place: Path, classes: tuple[tuple[str, ...], tuple[str, ...]], threads: int, prepare: Prepare | None
    ) -> None:
        import torch

        os.chdir(place)
        torch.set_num_threads(threads)
        know(classes)
        if prepare is not None:
            prepare()

    def do(self, work: bytes) -> tuple[str, bool]:
        """What a pickled job returned, or with True, why the folder cannot be written."""
        try:
            return pickle.loads(work)(), False
        except StoreError as error:
            return str(error), True

    def can_see(self, folder: Path) -> bool:
        return folder.is_dir()


class OnRay(Executor):
    """`count` workers, each with `share` of Ray's resources (`connecting.slots`), which all see `folder`."""

    def __init__(
        self, ray: Any, count: int, share: dict[str, float], folder: Path,
        classes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()), prepare: Prepare | None = None,
    ) -> None:  # fmt: skip
        self._ray, self._count, self._folder = ray, count, folder.resolve()
        self._kind = ray.remote(Worker).options(max_restarts=0, scheduling_strategy="SPREAD", **share)
        self._options = (Path.cwd(), classes, max(1, int(share.get("num_cpus", 1))), prepare)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        """See `Executor.run`. A job that three workers died of has failed; the others go on."""
        groups: dict[int, deque[tuple[Job, int]]] = {}
        for job in jobs:
            groups.setdefault(job.group, deque()).append((job, 1))
        waiting, idle, lost = deque(groups.values()), list[Any](), 0
        turns: dict[Any, tuple[Any, deque[tuple[Job, int]], Job, int]] = {}
        try:
            while waiting or turns:
                while waiting and len(turns) < self._count:
                    worker = idle.pop() if idle else self._new()
                    self._begin(worker, waiting.popleft(), turns)
                for answer in self._ray.wait(list(turns), num_returns=1)[0]:
                    worker, group, job, attempt = turns.pop(answer)
                    try:
                        line, full = self._ray.get(answer)
                    except self._ray.exceptions.RayActorError as error:
                        lost += 1
                        if attempt < ATTEMPTS:
                            group.appendleft((job, attempt + 1))
                        else:
                            yield job, f"its worker died, {ATTEMPTS} times, perhaps for want of memory"
                        if lost > ATTEMPTS * self._count:
                            raise LongtakeError(f"workers die one after the other: {first_line(error)}") from error
                        if group:
                            waiting.appendleft(group)
                        continue
                    if full:
                        raise StoreError(line)
                    if group:
                        self._begin(worker, group, turns)
                    else:
                        idle.append(worker)
                    yield job, line
        finally:
            for worker in [*idle, *(turn[0] for turn in turns.values())]:
                self._ray.kill(worker)

    def _new(self) -> Any:
        worker = self._kind.remote(*self._options)
        try:
            seen = self._ray.get(worker.can_see.remote(self._folder))
        except self._ray.exceptions.RayError as error:
            raise LongtakeError(f"a worker cannot begin: {first_line(error)}") from error
        if not seen:
            raise LongtakeError(f"a worker of this Ray does not see {self._folder}: give --out on a shared disk")
        return worker

    def _begin(self, worker: Any, group: deque[tuple[Job, int]], turns: dict[Any, Any]) -> None:
        job, attempt = group.popleft()
        turns[worker.do.remote(pickle.dumps(job.work))] = worker, group, job, attempt

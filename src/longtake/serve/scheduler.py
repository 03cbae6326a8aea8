"""The thread of one device. It makes one chunk of one session at a time, in turn, and between two chunks does what was
asked: so nothing touches a rollout while it runs, and no session waits for more than one chunk of every other. What is
long (a history made anew) is done a chunk at a time too, in turn with the sessions."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar

from ..errors import LongtakeError
from ..hosts.base import Host
from .admission import Constants, Ledger
from .errors import NoRoom, Refused
from .metrics import Metrics
from .naming import policy_named
from .settings import Settings
from .take import Take
from .together import Together

log = logging.getLogger("longtake.serve")
T = TypeVar("T")

_HOUSEKEEPING = 0.5  # seconds between two looks for idle sessions


@dataclass(eq=False)
class _Job:
    """What was asked of the thread, by whom, and how far it is."""

    work: Callable[[], Any]
    future: Future[Any]
    take: Take | None
    steps: Generator[None, None, Any] | None = None


class Worker:
    """A device: its models, its bytes, its sessions."""

    def __init__(
        self, hosts: dict[str, Host], constants: dict[str, Constants], budget: int, settings: Settings,
        metrics: Metrics, threads: int | None = None,
    ) -> None:  # fmt: skip
        self.hosts, self.constants, self.settings, self.metrics = hosts, constants, settings, metrics
        self.ledger = Ledger(budget)
        self.takes: dict[str, Take] = {}
        self.turned = time.monotonic()  # when the thread last came by
        self._ring: deque[str] = deque()  # sessions, and long jobs, in the order of their turns
        self._jobs: deque[_Job] = deque()
        self._long: dict[str, _Job] = {}  # begun, and not yet done
        self._numbers = count()  # of long jobs
        self._wake = threading.Condition()
        self._closing = False
        self._chunk_next = True
        self._looked = 0.0
        self._threads = threads
        device = next(iter(hosts.values())).device
        self.name = str(device)
        self._thread = threading.Thread(target=self._run, name=f"device-{device}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def call(self, work: Callable[[], T | Generator[None, None, T]], take: Take | None = None) -> Future[T]:
        """Do `work` on the device's thread between two chunks; wherever it yields, others have their turn. What is
        asked of a `take` whose history is being made anew waits until that is done."""
        job = _Job(work, Future(), take)
        with self._wake:
            if self._closing:
                raise Refused(503, "closing", "the server is shutting down", retry=10)
            self._jobs.append(job)
            self._wake.notify()
        return job.future

    def close(self) -> None:
        """Finish the chunk in flight and what was asked before, park every session, end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # --- on the thread ----------------------------------------------------------------------------------------------

    def enter(self, take: Take) -> None:
        """A session that is awake takes its turns."""
        self.takes[take.name] = take
        if take.name not in self._ring:
            self._ring.append(take.name)

    def leave(self, take: Take) -> None:
        self.takes.pop(take.name, None)
        if take.name in self._ring:
            self._ring.remove(take.name)

    def make_room(self, count: int, for_take: Take | None = None) -> None:
        """Park sessions nobody needs now, the longest idle first, while fewer than `count` bytes are free."""
        idle = [t for t in self.takes.values() if t is not for_take and t.session is not None and self._unneeded(t)]
        for take in sorted(idle, key=lambda t: -t.idle_seconds):
            if self.ledger.free >= count:
                return
            self._park(take)

    def admit(self, take: Take, policy: Any) -> str:
        """Reserve the bytes of a session, sending others to disk if need be; returns where its view lives."""
        try:
            need = take.footprint(policy, self.ledger.free)
        except NoRoom as error:
            self.make_room(error.needed, take)
            need = take.footprint(policy, self.ledger.free)
        self.ledger.reserve(take.name, need.total)
        return need.residency

    def wake(self, take: Take) -> None:
        """Bring a session back from disk if it is there. Raises NoRoom, or LongtakeError if it cannot come back."""
        if take.session is not None:
            return
        if take.deleted:
            raise Refused(404, "no_session", "the session was deleted")
        self.admit(take, policy_named(take.policy))
        try:
            take.wake()
        except BaseException as error:
            self.ledger.release(take.name)
            take.session = None
            if isinstance(error, LongtakeError) and not isinstance(error, Refused):
                take.wanted, take.error = "failed", "its snapshots cannot be read any more"
                log.error("session lost: %s", error, extra=take.log_extra)
                raise Refused(410, "failed", take.error) from error
            raise
        self.enter(take)

    def _run(self) -> None:
        if self._threads is not None:
            import torch

            torch.set_num_threads(self._threads)
        while (job := self._next()) is not None:
            try:
                job()
            except Exception:
                log.exception("a session's turn failed")
        for take in list(self.takes.values()):
            self._park(take)

    def _next(self) -> Callable[[], None] | None:
        """What to do now: a job and a chunk in turn where both are wanted; None at the end."""
        with self._wake:
            while True:
                now = self.turned = time.monotonic()
                if now - self._looked > _HOUSEKEEPING:
                    self._looked = now
                    return self._look_after
                due = {name: wait for name in self._ring if (wait := self._due(name, now)) is not None}
                ready = next((name for name in self._ring if due.get(name) == 0), None)
                job = next((job for job in self._jobs if job.take is None or not job.take.rebuilding), None)
                if job is not None and (ready is None or not self._chunk_next or self._closing):
                    self._chunk_next = True
                    self._jobs.remove(job)
                    return partial(self._begin, job)
                if ready is not None:
                    self._chunk_next = False
                    return self._turn(ready, [name for name, wait in due.items() if wait == 0])
                if self._closing:
                    return None
                self._wake.wait(min([_HOUSEKEEPING, *due.values()]))

    def _due(self, name: str, now: float) -> float | None:
        """Seconds until the next turn of a session, or of a long job; at the end only jobs have any."""
        if name in self._long:
            return 0.0
        return None if self._closing else self.takes[name].due(now)

    def _turn(self, name: str, ready: list[str]) -> Callable[[], None]:
        """The chunk of a session, and with it those of others that ask to be made together, or a step of a long job;
        they go to the end of the ring."""
        if name in self._long:
            self._ring.remove(name)
            return partial(self._go_on, name, self._long.pop(name))
        take = self.takes[name]
        others = [self.takes[o] for o in ready if o != name and o not in self._long] if take.request.batch else []
        round = [take, *(other for other in others if other.joins(take))][: self.settings.batch_most]
        for each in round:
            self._ring.remove(each.name)
            self._ring.append(each.name)
        return take.step if len(round) == 1 else lambda: self._make_together(round)

    def _make_together(self, takes: list[Take]) -> None:
        takes = [take for take in takes if take.prepare()]
        if not takes:
            return
        made = Together(takes[0].host).run([take.make for take in takes], self._threads)
        for take, outcome in zip(takes, made, strict=True):
            take.finish(outcome)

    def _begin(self, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        try:
            done = job.work()
        except BaseException as error:
            job.future.set_exception(error)
            return
        if isinstance(done, Generator):
            job.steps = done
            self._go_on(f"job {next(self._numbers)}", job)
        else:
            job.future.set_result(done)

    def _go_on(self, name: str, job: _Job) -> None:
        """A step of a job, which then waits for its next turn."""
        assert job.steps is not None
        try:
            next(job.steps)
        except StopIteration as end:
            job.future.set_result(end.value)
        except BaseException as error:
            job.future.set_exception(error)
        else:
            self._long[name] = job
            self._ring.append(name)

    def _look_after(self) -> None:
        for take in list(self.takes.values()):
            recording = take.wanted == "running" and take.channel.recording is not None
            if take.session is not None and not recording and take.idle_seconds > self.settings.idle_seconds:
                self._park(take)

    def _unneeded(self, take: Take) -> bool:
        return not take.channel.viewers and take.wanted != "running"

    def _park(self, take: Take) -> None:
        try:
            take.park()
        except Refused as error:
            self.metrics.park_failed.inc()
            take.touch()  # try again after another idle time
            take.error = str(error)
            log.error("session not parked: %s", error, extra=take.log_extra)
            return
        except Exception:
            self.metrics.park_failed.inc()
            log.exception("session not parked", extra=take.log_extra)
            return
        if take.name in self._ring:
            self._ring.remove(take.name)

"""A worker of a server on many machines: one device, its models, its bytes and its sessions, as a Ray actor.

Inside is the same `Service` that serves one machine, over a folder of its own. So everything that a killed server does
to come back, a killed worker does: Ray starts it again, it finds its sessions on disk, and those that were running go
on without being asked.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import os
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import LongtakeError
from ..serve.errors import NoRoom, Refused
from ..serve.protocol import Fits, SessionInfo
from ..serve.settings import Settings
from ..serve.stream import Item, Viewer

log = logging.getLogger("longtake.cluster")

_PULL_BYTES = 1 << 20  # of one answer to a viewer's pull
_RECORDS = 10_000  # of a worker's log that may wait
_FORMAT = logging.Formatter()
_LOCK_SECONDS = 30.0  # until a killed predecessor's files are free


@dataclass(frozen=True)
class Status:
    """How a worker stands. Bytes."""

    budget: int = 0
    free: int = 0
    sessions: dict[str, tuple[str, SessionInfo]] = field(default_factory=dict)  # owner, and how it stands, by name
    metrics: str = ""
    alive: bool = True
    place: dict[str, Any] = field(default_factory=dict)  # machine, process, version
    records: list[dict[str, Any]] = field(default_factory=list)  # of its log, since the last status
    problem: str | None = None  # why it cannot work at all


class Agent:
    """The actor. What is asked of the service goes through `ask`, so that a refusal arrives whole."""

    def __init__(
        self, sources: dict[str, str], settings: Settings, budget: int | None, device: str | None, dtype: str | None,
        threads: int | None,
    ) -> None:  # fmt: skip
        self._problem: str | None = None
        self._viewers: dict[int, tuple[Any, Viewer]] = {}
        self._numbers = itertools.count()
        self._records = _Records()
        logging.basicConfig(level=logging.INFO, handlers=[self._records], force=True)
        try:
            self._begin(sources, settings, budget, device, dtype, threads)
        except LongtakeError as error:
            self._problem = str(error)

    def _begin(
        self, sources: dict[str, str], settings: Settings, budget: int | None, device: str | None, dtype: str | None,
        threads: int | None,
    ) -> None:  # fmt: skip
        import ray

        from ..hosts.loading import load
        from ..serve.server import service_of

        hosts = {}
        for name, source in sources.items():
            host = load(source, device=device, dtype=dtype, text_encoder="keep" if device == "cpu" else "offload")
            for part in ("vae", "text_encoder"):
                if getattr(host, part, host) is None:
                    raise LongtakeError(f"{source} has no {part}/: name a complete folder")
            hosts[name] = host
        started = time.monotonic()
        while True:
            try:
                self.service = service_of([hosts], settings, budget, threads)
                break
            except LongtakeError as error:
                if "running server" not in str(error) or time.monotonic() - started > _LOCK_SECONDS:
                    raise
                time.sleep(0.2)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self.service.resume()

    async def status(self) -> Status:
        place = {"host": socket.gethostname(), "pid": os.getpid(), "longtake": __version__}
        if self._problem is not None:
            return Status(problem=self._problem, place=place, records=self._records.take())
        ledger = self.service.workers[0].ledger
        return Status(
            ledger.budget, ledger.free,
            {name: (take.owner, take.info()) for name, take in list(self.service.takes.items())},
            self.service.metrics.text().decode(), self.service.healthy, place, self._records.take(),
        )  # fmt: skip

    async def ask(self, what: str, *args: Any) -> dict[str, Any]:
        """{"done": what the service's method returns}, or {"refused": …} for `refusal`."""
        try:
            answer = getattr(self.service, what)(*args)
            return {"done": await answer if inspect.isawaitable(answer) else answer}
        except LongtakeError as error:
            return {"refused": _told(error)}

    async def watch(self, owner: str, name: str, kind: str) -> dict[str, Any]:
        """{"done": number} of a viewer of a session, for `pull` and `unwatch`."""
        try:
            take, viewer = await self.service.watch(owner, name, kind)
        except LongtakeError as error:
            return {"refused": _told(error)}
        number = next(self._numbers)
        self._viewers[number] = take, viewer
        return {"done": number}

    async def pull(self, number: int) -> list[Item] | None:
        """What waits for a viewer, at least one item; None at the end. What it does not pull, its bounded queue
        drops. Raises KeyError for a viewer of an earlier process."""
        viewer = self._viewers[number][1]
        first = await viewer.next()
        if first is None:
            return None
        items, size = [first], len(first.payload)
        while viewer.waiting and size < _PULL_BYTES:
            item = await viewer.next()
            if item is None:
                break
            items.append(item)
            size += len(item.payload)
        return items

    async def unwatch(self, number: int) -> None:
        if number in self._viewers:
            self.service.unwatch(*self._viewers.pop(number))

    async def read(self, path: Path, start: int, count: int) -> bytes:
        """A part of a recording."""
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(count)

    async def used(self, owner: str) -> int:
        """Bytes on disk of an owner's sessions."""
        mine = [take for take in list(self.service.takes.values()) if take.owner == owner]
        return await asyncio.to_thread(lambda: sum(take.place.size for take in mine))

    async def sweep(self) -> None:
        await asyncio.to_thread(self.service.sweep)

    async def drain(self) -> None:
        self.service.drain()

    async def close(self) -> None:
        """Finish the chunk in flight, park every session."""
        if self._problem is None:
            await asyncio.to_thread(self.service.close)


def refusal(told: dict[str, Any]) -> LongtakeError:
    """The error that `ask` told of."""
    if "needed" in told:
        fits = told["fits"]
        return NoRoom(told["needed"], told["free"], None if fits is None else Fits(**fits))
    if "status" in told:
        return Refused(told["status"], told["code"], told["message"], told["retry"])
    return LongtakeError(told["message"])


def _told(error: LongtakeError) -> dict[str, Any]:
    """An error as plain values: its class may not survive the way between processes."""
    if isinstance(error, NoRoom):
        fits = None if error.fits is None else error.fits.model_dump()
        return {"needed": error.needed, "free": error.free, "fits": fits}
    if isinstance(error, Refused):
        return {"status": error.status, "code": error.code, "message": str(error), "retry": error.retry}
    return {"message": str(error)}


class _Records(logging.Handler):
    """A worker's log on its way to the server's: its last lines, as values that travel."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: deque[dict[str, Any]] = deque(maxlen=_RECORDS)

    def emit(self, record: logging.LogRecord) -> None:
        trace = {"trace": _FORMAT.formatException(record.exc_info)} if record.exc_info else {}
        told = {key: value for key, value in vars(record).items() if key not in ("msg", "args", "exc_info")}
        plain = {key: value for key, value in told.items() if isinstance(value, str | int | float | None)}
        self._kept.append(plain | {"msg": record.getMessage()} | trace)

    def take(self) -> list[dict[str, Any]]:
        """What came since the last time."""
        return [self._kept.popleft() for _ in range(len(self._kept))]

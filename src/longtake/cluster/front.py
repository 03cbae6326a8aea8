"""The server of many machines: it knows which worker has which session, and asks there.

A session stays with its worker, whose folder holds its files. A new one goes to the worker with most free bytes, and
to the next if it does not fit there; each worker's own ledger decides, so two requests at once cannot both get the last
bytes. A worker that dies is started again by Ray, on any machine that sees the state folder.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import LongtakeError
from ..serve.access import Rate
from ..serve.errors import NoRoom, Refused
from ..serve.metrics import Metrics
from ..serve.parking import own_folder
from ..serve.protocol import Fork, ModelInfo, NewSession, SessionInfo
from ..serve.settings import Settings
from .agent import Agent, Status, refusal
from .figures import ClusterMetrics
from .viewing import FarViewer

log = logging.getLogger("longtake.cluster")

_LOOK = 1.0  # seconds between two looks at a worker
_START = 600.0  # seconds until every worker has loaded its models
_RETURN = 60.0  # seconds a question waits for a worker that is being started again
_DEAD = 5  # looks that find a worker dead, until it is taken for lost
_BLOCK = 1 << 18


@dataclass
class _Worker:
    """What the server knows of a worker."""

    number: int
    handle: Any
    status: Status = field(default_factory=Status)
    up: bool = True
    missed: int = 0  # looks in a row that found it dead
    gone: bool = False  # for good: Ray does not start it again

    @property
    def label(self) -> str:
        return str(self.number)


class Front:
    """Every session of a cluster, by its name: what `serve.app` needs of a service.

    Args:
        ray: the connected module.
        count, share: workers, and Ray's resources for each (`slots`).
        sources: models by the names that clients know.
        budget: bytes of sessions per worker; None: of a GPU what `longtake serve` takes by itself, of a CPU machine a
            quarter of its memory, shared among its workers.

    Raises LongtakeError if a worker cannot begin, or no machine has its share and its bytes.
    """

    def __init__(
        self, ray: Any, count: int, share: dict[str, float], sources: dict[str, str], settings: Settings,
        budget: int | None = None, device: str | None = None, dtype: str | None = None, threads: int | None = None,
    ) -> None:  # fmt: skip
        self._ray, self.settings, self.closing = ray, settings, False
        self.metrics: Metrics = ClusterMetrics(lambda: {w.label: w.status.metrics for w in self._workers})
        self._rate = Rate(settings.creations_per_minute)
        self._homes: dict[str, tuple[_Worker, str]] = {}  # session → worker, owner
        self._workers: list[_Worker] = []
        share = share | self._bytes(budget, share, count)
        self._lock = own_folder(settings.state)
        self._closed = threading.Event()
        folders = [settings.state / f"worker-{i:03d}" for i in range(count)]
        _distribute(settings.state, folders)
        if budget is None and not share.get("num_gpus"):
            budget = int(share["memory"])
        kind = ray.remote(Agent).options(
            max_restarts=-1, max_task_retries=0, max_concurrency=10_000, scheduling_strategy="SPREAD", **share
        )
        # what is counted over all workers is counted here
        theirs = replace(settings, creations_per_minute=10**9)
        for number, folder in enumerate(folders):
            handle = kind.remote(sources, replace(theirs, state=folder), budget, device, dtype, threads)
            self._workers.append(_Worker(number, handle))
        try:
            self._models: list[ModelInfo] = self._begin()
        except BaseException:
            self._end()
            raise
        self._watcher = threading.Thread(target=self._look_after, name="workers", daemon=True)
        self._watcher.start()

    # --- what the application asks ----------------------------------------------------------------------------------

    def models(self) -> list[ModelInfo]:
        return self._models

    async def create(self, owner: str, request: NewSession) -> SessionInfo:
        """Begin a session where it fits. Raises NoRoom with what would fit on the worker that has most."""
        await self._check_quota(owner)
        self._rate.count(owner)
        refused: NoRoom | None = None
        for worker in sorted((w for w in self._workers if w.up), key=lambda w: -w.status.free):
            try:
                info: SessionInfo = await self._ask(worker, "create", owner, request)
            except NoRoom as error:
                refused = max(refused or error, error, key=lambda e: e.free)
                continue
            self._settle(info.id, worker, owner)
            worker.status = replace(worker.status, free=worker.status.free - info.reserved_bytes)
            return info
        raise refused or Refused(503, "no_worker", "every worker is being started again", retry=5)

    async def info(self, owner: str, name: str) -> SessionInfo:
        found: SessionInfo = await self._ask(self._home(owner, name), "info", owner, name, patient=True)
        return found

    async def infos(self, owner: str) -> list[SessionInfo]:
        """Of a worker that is being started again, its sessions as they were last seen, on disk."""
        asked = [self._infos(worker, owner) for worker in self._workers]
        return [info for found in await asyncio.gather(*asked) for info in found]

    async def steer(self, owner: str, name: str, action: Any) -> dict[str, Any]:
        if action.type == "save":
            await self._check_disk(owner)
        done: dict[str, Any] = await self._ask(self._home(owner, name), "steer", owner, name, action)
        return done

    async def delete(self, owner: str, name: str) -> None:
        await self._ask(self._home(owner, name), "delete", owner, name)
        self._homes.pop(name, None)

    async def delete_snapshot(self, owner: str, name: str, snapshot: str) -> None:
        await self._ask(self._home(owner, name), "delete_snapshot", owner, name, snapshot)

    async def park(self, owner: str, name: str) -> SessionInfo:
        info: SessionInfo = await self._ask(self._home(owner, name), "park", owner, name)
        return info

    async def fork(self, owner: str, name: str, request: Fork) -> SessionInfo:
        """A new session beside this one, on its worker: they share files."""
        await self._check_quota(owner)
        worker = self._home(owner, name)
        self._rate.count(owner)
        info: SessionInfo = await self._ask(worker, "fork", owner, name, request)
        self._settle(info.id, worker, owner)
        return info

    async def recording(self, owner: str, name: str) -> tuple[int, AsyncIterator[bytes]]:
        """Bytes of the recording so far, and they themselves."""
        worker = self._home(owner, name)
        size, path = await self._ask(worker, "recorded", owner, name, patient=True)
        return size, self._file(worker, path, size)

    async def watch(self, owner: str, name: str, kind: str) -> tuple[_Worker, FarViewer]:
        worker = self._home(owner, name)
        number = await self._call(worker, "watch", owner, name, kind, patient=True)
        return worker, FarViewer(worker.handle, number, owner, self._ray.exceptions.RayError)

    def unwatch(self, worker: _Worker, viewer: FarViewer) -> None:
        viewer.close()
        worker.handle.unwatch.remote(viewer.number)

    # --- the whole --------------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """A worker that is being started again is no reason to end the server; one that cannot be is."""
        return all(not w.gone and w.status.alive for w in self._workers)

    def drain(self) -> None:
        """Say goodbye to every viewer, and take nothing new."""
        self.closing = True
        for worker in self._workers:
            worker.handle.drain.remote()

    def close(self) -> None:
        """Finish the chunks in flight, park every session, end the workers."""
        self.closing = True
        self._closed.set()
        self._watcher.join()
        for answer in [worker.handle.close.remote() for worker in self._workers if worker.up]:
            try:
                self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                log.error("a worker did not end in order: %s", error)
        self._end()

    def sweep(self) -> None:
        """Delete what nobody used for long, on every worker. Waits."""
        self._ray.get([worker.handle.sweep.remote() for worker in self._workers if worker.up])

    # --- within -----------------------------------------------------------------------------------------------------

    def _begin(self) -> list[ModelInfo]:
        """Wait for every worker, and learn what it has."""
        asked = {worker.handle.status.remote(): worker for worker in self._workers}
        _, missing = self._ray.wait(list(asked), num_returns=len(asked), timeout=_START)
        if missing:
            raise LongtakeError(
                f"{len(missing)} of {len(asked)} workers were not placed or not ready in {_START:g} s: ask for fewer "
                "--workers or less --memory"
            )
        for answer, worker in asked.items():
            try:
                worker.status = self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                raise LongtakeError(f"worker {worker.number} cannot begin: {_last_line(error)}") from error
            self._check(worker)
        answer = self._ray.get(self._workers[0].handle.ask.remote("models"))
        return list(answer["done"])

    def _check(self, worker: _Worker) -> None:
        status = worker.status
        if status.problem is not None:
            raise LongtakeError(f"worker {worker.number} on {status.place['host']}: {status.problem}")
        if status.place["longtake"] != __version__:
            raise LongtakeError(
                f"worker {worker.number} runs longtake {status.place['longtake']}, this is {__version__}: install the "
                "same everywhere"
            )
        for name, (owner, _) in status.sessions.items():
            self._settle(name, worker, owner)
        log.info("worker ready", extra={"worker": worker.number, **status.place, "budget": status.budget})

    def _bytes(self, budget: int | None, share: dict[str, float], count: int) -> dict[str, float]:
        """Ray's own account of host memory, so that it places no worker where its sessions do not fit."""
        if share.get("num_gpus"):
            return {}  # the sessions' bytes are on the GPU, which the worker has for itself
        nodes = [node["Resources"].get("memory", 0) for node in self._ray.nodes() if node["Alive"]]
        most = max(nodes, default=0)
        if budget is None:
            return {"memory": int(most / 4 / math.ceil(count / max(1, len(nodes))))}
        if sum(int(there // budget) for there in nodes) < count:
            raise LongtakeError(
                f"{count} workers of {budget} bytes each do not fit: the machines of this Ray have "
                f"{', '.join(str(int(there)) for there in nodes)}; ask for less --memory or fewer --workers"
            )
        return {"memory": budget}

    def _settle(self, name: str, worker: _Worker, owner: str) -> None:
        self._homes[name] = worker, owner

    async def _infos(self, worker: _Worker, owner: str) -> list[SessionInfo]:
        try:
            if worker.up:
                found: list[SessionInfo] = await self._ask(worker, "infos", owner)
                return found
        except Refused:  # it died meanwhile
            pass
        seen = [info for whose, info in worker.status.sessions.values() if whose == owner]
        return [info.model_copy(update={"state": "parked", "held_bytes": 0}) for info in seen]

    def _home(self, owner: str, name: str) -> _Worker:
        worker, whose = self._homes.get(name, (None, None))
        if worker is None or whose != owner:
            raise Refused(404, "no_session", "there is no such session")
        return worker

    async def _ask(self, worker: _Worker, what: str, *args: Any, patient: bool = False) -> Any:
        return await self._call(worker, "ask", what, *args, patient=patient)

    async def _call(self, worker: _Worker, method: str, *args: Any, patient: bool = False) -> Any:
        """What the worker answers. `patient`: a question that may be asked again, once a dead worker is back."""
        end = time.monotonic() + _RETURN
        while True:
            try:
                told = await getattr(worker.handle, method).remote(*args)
                break
            except self._ray.exceptions.RayActorError:
                worker.up = False
                if not patient or worker.gone or self.closing or time.monotonic() > end:
                    raise Refused(
                        503, "worker_lost", "the worker of this session died and is being started again; what it had "
                        "committed is kept: look how the session stands, then ask again", retry=3,
                    ) from None  # fmt: skip
                await asyncio.sleep(_LOOK / 4)
        if "refused" in told:
            raise refusal(told["refused"])
        return told["done"]

    async def _file(self, worker: _Worker, path: Path, size: int) -> AsyncIterator[bytes]:
        at = 0
        while at < size:
            block = await worker.handle.read.remote(path, at, min(_BLOCK, size - at))
            if not block:
                return
            at += len(block)
            yield block

    async def _check_quota(self, owner: str) -> None:
        if self.closing:
            raise Refused(503, "closing", "the server is shutting down", retry=10)
        own = sum(whose == owner for _, whose in self._homes.values())
        if own >= self.settings.sessions_per_token:
            raise Refused(429, "quota", f"{own} sessions are yours, which is the most: delete one first")
        if len(self._homes) >= self.settings.max_sessions:
            raise Refused(503, "full", f"{len(self._homes)} sessions are here, which is the most", retry=60)
        await self._check_disk(owner)

    async def _check_disk(self, owner: str) -> None:
        asked = [worker.handle.used.remote(owner) for worker in self._workers if worker.up]
        found = await asyncio.gather(*asked, return_exceptions=True)
        used = sum(count for count in found if isinstance(count, int))
        if used > self.settings.disk_bytes_per_token:
            raise Refused(507, "disk_quota", f"your sessions take {used} bytes on disk: delete some, or snapshots")

    def _look_after(self) -> None:
        """Once a second: how every worker stands, and whether one that died is back."""
        while not self._closed.wait(_LOOK):
            for worker in self._workers:
                try:
                    status: Status = self._ray.get(worker.handle.status.remote(), timeout=10 * _LOOK)
                except self._ray.exceptions.RayActorError as error:
                    self._miss(worker, error)
                except self._ray.exceptions.RayError:  # late
                    continue
                else:
                    self._meet(worker, status)

    def _miss(self, worker: _Worker, error: BaseException) -> None:
        if worker.up:
            log.error("worker died", extra={"worker": worker.number, **worker.status.place})
        final = isinstance(error, self._ray.exceptions.ActorDiedError)  # also said in passing, before a new start
        worker.up, worker.missed = False, worker.missed + 1 if final else 0
        if worker.missed == _DEAD:
            worker.gone = True
            log.error("worker lost for good: %s", _last_line(error), extra={"worker": worker.number})

    def _meet(self, worker: _Worker, status: Status) -> None:
        back = worker.status.place.get("pid") != status.place.get("pid")
        for name in set(worker.status.sessions) - set(status.sessions):  # deleted, or expired
            self._homes.pop(name, None)
        worker.status, worker.up, worker.missed = status, status.problem is None, 0
        worker.gone = not worker.up
        for told in status.records:
            record = logging.makeLogRecord(told | {"worker": worker.number})
            logging.getLogger(record.name).handle(record)
        for name, (owner, _) in status.sessions.items():
            self._settle(name, worker, owner)
        if back:
            log.warning("worker back", extra={"worker": worker.number, **status.place, "problem": status.problem})

    def _end(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker.handle)
        os.close(self._lock)


def _distribute(state: Path, folders: Sequence[Path]) -> None:
    """Every session's folder into a worker's: those of a server on one machine, and of workers there are no more."""
    for folder in folders:
        folder.mkdir(mode=0o700, exist_ok=True)
    homeless = [path.parent for path in state.glob("*/session.json")]
    homeless += [path.parent for path in state.glob("worker-*/*/session.json") if path.parent.parent not in folders]
    for turn, folder in enumerate(sorted(homeless)):
        os.rename(folder, folders[turn % len(folders)] / folder.name)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[-1].split()) if lines else type(error).__name__

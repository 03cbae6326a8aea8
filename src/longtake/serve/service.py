"""The sessions of a server: whose they are, where they run, what their owners may."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ..errors import LongtakeError
from ..named import spec
from ..session import default_policy
from ..switching import SWITCHES
from .access import Rate
from .errors import NoRoom, Refused
from .metrics import Metrics
from .naming import policy_named, reuse_named
from .parking import Place, own_folder, private_folder
from .pictures import first_image
from .protocol import MAX_CHUNKS, Bye, Changed, Fork, ModelInfo, NewSession, SessionInfo, SetPrompt, Welcome
from .scheduler import Worker
from .settings import Settings
from .stream import Viewer
from .take import Take

log = logging.getLogger("longtake.serve")
T = TypeVar("T")

_MANIFEST = 1  # version of session.json
_BLOCK = 1 << 18  # of a recording that is sent


class Service:
    """Every session, by its name. Methods that wait for a device are coroutines."""

    def __init__(self, workers: list[Worker], settings: Settings, metrics: Metrics) -> None:
        self.workers, self.settings, self.metrics = workers, settings, metrics
        self.takes: dict[str, Take] = {}
        self.closing = False
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._rate = Rate(settings.creations_per_minute)
        self._lock = threading.Lock()
        self._folder_lock = own_folder(self.settings.state)
        metrics.add(self._gauges)
        self._find_sessions()
        for worker in workers:
            worker.start()

    # --- models -----------------------------------------------------------------------------------------------------

    def models(self) -> list[ModelInfo]:
        found = []
        for name, host in self.workers[0].hosts.items():
            geometry, config = host.geometry(), host.config
            modes = list(SWITCHES if config.sampler == "chunked" else ("keep",))
            found.append(ModelInfo(
                name=name, width=geometry.width, height=geometry.height, fps=geometry.fps,
                chunk_frames=geometry.chunk_frames,
                chunk_seconds=geometry.chunk_frames * geometry.stride[0] / geometry.fps, prompts=list(config.prompts),
                about=config.about, policy=spec(default_policy(host)), modes=modes,
            ))  # fmt: skip
        return found

    # --- sessions ---------------------------------------------------------------------------------------------------

    async def create(self, owner: str, request: NewSession) -> SessionInfo:
        """Begin a session. Raises NoRoom, Refused or LongtakeError."""
        self._check_quota(owner)
        name = request.model or next(iter(self.workers[0].hosts))
        if name not in self.workers[0].hosts:
            raise LongtakeError(f"no model of that name here; there are: {', '.join(self.workers[0].hosts)}")
        request = request.model_copy(update={"model": name})
        host = self.workers[0].hosts[name]
        geometry = host.geometry(request.height, request.width)
        if geometry.height * geometry.width > self.settings.max_pixels:
            raise LongtakeError(f"{geometry.width}x{geometry.height}: at most {self.settings.max_pixels} pixels")
        policy = policy_named(request.policy) if request.policy else default_policy(host)
        reuse_named(request.reuse)
        if request.batch and host.config.sampler != "chunked":
            raise LongtakeError(f"batch: {name} does not make one chunk at a time: leave it out")
        image = None
        if request.image is not None:
            image = await asyncio.to_thread(first_image, request.image, geometry, self.settings)
            request = request.model_copy(update={"image": ""})  # that there was one
        self._rate.count(owner)
        return await self._on_some(lambda worker: self._begin(worker, owner, request, policy, image))

    def _begin(self, worker: Worker, owner: str, request: NewSession, policy: Any, image: Any) -> SessionInfo:
        self._check_quota(owner)
        take = self._new_take(worker, owner, request)
        try:
            residency = worker.admit(take, policy)
            if image is not None:
                take.place.write_image(image)
            take.begin(policy, residency)
        except BaseException:
            take.delete()
            raise
        worker.enter(take)
        self.takes[take.name] = take
        self.metrics.created.inc()
        log.info("session begun", extra=take.log_extra | {"policy": take.policy, "model": request.model})
        return take.info()

    def find(self, owner: str, name: str) -> Take:
        """A session of this owner. Raises Refused for another's as for one that is not there."""
        take = self.takes.get(name)
        if take is None or take.owner != owner:
            raise Refused(404, "no_session", "there is no such session")
        return take

    async def info(self, owner: str, name: str) -> SessionInfo:
        return self.find(owner, name).info()

    async def infos(self, owner: str) -> list[SessionInfo]:
        return [take.info() for take in list(self.takes.values()) if take.owner == owner]

    async def steer(self, owner: str, name: str, action: Any) -> dict[str, Any]:
        """Do something to a session at its next chunk border, waking it if it is parked."""
        take, worker = self._home(owner, name)
        if action.type == "save":
            self._check_disk(owner)

        def act() -> Generator[None, None, dict[str, Any]]:
            take.check(action)
            worker.wake(take)
            return (yield from take.apply(action))

        result = await _wait(worker.call(act, take))
        log.info("steered", extra=take.log_extra | {"action": action.type})
        return result

    async def delete(self, owner: str, name: str) -> None:
        take, worker = self._home(owner, name)

        def remove() -> None:
            self.takes.pop(name, None)
            worker.leave(take)
            take.channel.close(Bye(reason="deleted"))
            take.delete()

        await _wait(worker.call(remove, take))
        log.info("session deleted", extra=take.log_extra)

    async def delete_snapshot(self, owner: str, name: str, snapshot: str) -> None:
        take, worker = self._home(owner, name)
        await _wait(worker.call(lambda: self._drop_snapshot(take, snapshot), take))

    async def park(self, owner: str, name: str) -> SessionInfo:
        """Send a session to disk now."""
        take, worker = self._home(owner, name)
        if take.channel.viewers:
            raise Refused(409, "watched", "somebody watches the session: it stays awake")
        await _wait(worker.call(take.park, take))
        return take.info()

    async def fork(self, owner: str, name: str, request: Fork) -> SessionInfo:
        """A new session from a saved snapshot of this one, or from where it stands: with `request.chunks` chunks to
        come, or as many as this one had before it."""
        self._check_quota(owner)
        self._check_disk(owner)
        take, worker = self._home(owner, name)
        self._rate.count(owner)

        def split() -> Generator[None, None, SessionInfo]:
            self._check_quota(owner)
            if request.snapshot is None:
                worker.wake(take)
                track, base = take.standing()
            else:
                track = take.saved(request.snapshot)
                base = track.bases()[-1]
            length = take.length if request.chunks is None else request.chunks
            total = None if length is None else base.chunk + length
            if total is not None and total > MAX_CHUNKS:
                raise LongtakeError(f"{length} chunks after {base.chunk}: {MAX_CHUNKS} are the most, ask for less")
            told = take.request.model_copy(update={"paused": request.paused, "record": False, "chunks": total})
            child = self._new_take(worker, owner, told)
            try:
                image = take.place.image()
                if image is not None:
                    child.place.write_image(image)
                copy = track.branch(child.place.next_track(), base)
                policy, prompt = take.policy, take.prompt
                child.place.write(track=copy.folder.name, policy=policy, prompt=prompt, wanted=child.wanted,
                                  created=child.created, chunk=base.chunk, since=base.chunk, frame=0,
                                  length=length)  # fmt: skip
                child.policy, child.prompt, child.chunk = policy, prompt, base.chunk
                worker.wake(child)
                self.takes[child.name] = child
                yield from child.lengthen()
                if request.prompt is not None:
                    yield from child.apply(SetPrompt(text=request.prompt))
            except BaseException:
                self.takes.pop(child.name, None)
                worker.leave(child)
                child.delete()
                raise
            self.metrics.created.inc()
            return child.info()

        return await _wait(worker.call(split, take))

    def recorded(self, owner: str, name: str) -> tuple[int, Path]:
        """Bytes of a session's recording that are whole by now, and its file."""
        take = self.find(owner, name)
        live, path = take.channel.recording, take.place.recording
        if not path.exists() or (live is not None and not live.frames):
            raise Refused(404, "no_recording", "nothing has been recorded: steer it with {type: record, on: true}")
        return path.stat().st_size if live is None else live.size, path

    async def recording(self, owner: str, name: str) -> tuple[int, Iterator[bytes]]:
        size, path = self.recorded(owner, name)
        return size, _blocks(path, size)

    # --- watching ---------------------------------------------------------------------------------------------------

    async def watch(self, owner: str, name: str, kind: str) -> tuple[Take, Viewer]:
        """A viewer of a session, which is woken if it was parked."""
        take, worker = self._home(owner, name)
        if take.channel.viewers >= self.settings.viewers_per_session:
            raise Refused(503, "viewers", f"{take.channel.viewers} viewers watch this session, more cannot", retry=10)
        viewer = Viewer(asyncio.get_running_loop(), kind, self.settings.viewer_bytes, owner)

        def attach() -> None:
            worker.wake(take)
            take.touch()
            mime = take.channel.mime if kind == "mp4" else "image/jpeg"
            take.channel.attach(viewer, Welcome(session=take.info(), format=kind, mime=mime, timeline=take.timeline))

        await _wait(worker.call(attach, take))
        return take, viewer

    def unwatch(self, take: Take, viewer: Viewer) -> None:
        take.channel.detach(viewer)
        take.touch()
        viewer.close()

    # --- the whole --------------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        return all(worker.alive for worker in self.workers)

    def resume(self) -> None:
        """Let the sessions that were running when their process was killed go on, without waiting to be asked."""
        for take in list(self.takes.values()):
            if take.wanted == "running" and take.place.manifest.get("awake", True):
                self._worker_of(take).call(lambda t=take: self._go_on(t), take)  # type: ignore[misc]

    def drain(self) -> None:
        """Say goodbye to every viewer, and take nothing new; safe in a signal handler's thread."""
        self.closing = True
        for take in list(self.takes.values()):
            take.channel.close(Bye(reason="the server is shutting down"))

    def close(self) -> None:
        """Finish the chunks in flight, park every session, end the threads."""
        self.drain()
        for worker in self.workers:
            worker.close()
        self._publisher.shutdown()
        os.close(self._folder_lock)

    def sweep(self) -> None:
        """Delete parked sessions and saved snapshots whose time has come. Off the event loop: it walks folders."""
        now = time.time()
        for take in list(self.takes.values()):
            worker, told = self._worker_of(take), take.place.manifest
            for saved in told.get("saved", []):
                if now - saved["created"] > self.settings.ttl_seconds:
                    worker.call(lambda t=take, s=saved: self._drop_snapshot(t, s["id"]), take).result()  # type: ignore[misc]
                    self.metrics.expired.inc()
            if take.session is None and now - told.get("used", now) > self.settings.ttl_seconds:
                worker.call(lambda t=take: self._expire(t), take).result()  # type: ignore[misc]

    # --- within -----------------------------------------------------------------------------------------------------

    def _go_on(self, take: Take) -> None:
        try:
            self._worker_of(take).wake(take)
        except LongtakeError as error:
            log.warning("session stays on disk: %s", error, extra=take.log_extra)

    def _home(self, owner: str, name: str) -> tuple[Take, Worker]:
        take = self.find(owner, name)
        return take, self._worker_of(take)

    def _worker_of(self, take: Take) -> Worker:
        return next(w for w in self.workers if w.hosts.get(take.request.model or "") is take.host)

    async def _on_some(self, job: Callable[[Worker], T]) -> T:
        """Run a job on the device with most room; on the next if it does not fit there."""
        refusal: NoRoom | None = None
        for worker in sorted(self.workers, key=lambda w: -w.ledger.free):
            try:
                return await _wait(worker.call(lambda w=worker: job(w)))  # type: ignore[misc]
            except NoRoom as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _new_take(self, worker: Worker, owner: str, request: NewSession) -> Take:
        name = secrets.token_urlsafe(16)
        folder = self.settings.state / name
        private_folder(folder)
        place = Place(folder, {})
        try:
            place.write(format=_MANIFEST, id=name, owner=owner, request=request.model_dump(), used=time.time())
        except Refused:
            place.delete()
            raise
        return self._take(worker, name, owner, request, place)

    def _take(self, worker: Worker, name: str, owner: str, request: NewSession, place: Place) -> Take:
        model = request.model or ""
        return Take(
            name, owner, request, worker.hosts[model], worker.constants[model], place, self.settings, worker.ledger,
            self._publisher, self.metrics,
        )  # fmt: skip

    def _drop_snapshot(self, take: Take, snapshot: str) -> None:
        folder = take.saved(snapshot).folder
        kept = [s for s in take.place.manifest["saved"] if s["id"] != snapshot]
        take.place.write(saved=kept)
        shutil.rmtree(folder, ignore_errors=True)
        take.channel.tell(Changed(session=take.info()))

    def _expire(self, take: Take) -> None:
        if take.session is None:
            self.takes.pop(take.name, None)
            self._worker_of(take).leave(take)
            take.delete()
            self.metrics.expired.inc()
            log.info("session expired", extra=take.log_extra)

    def _check_quota(self, owner: str) -> None:
        if self.closing:
            raise Refused(503, "closing", "the server is shutting down", retry=10)
        own = sum(take.owner == owner for take in self.takes.values())
        if own >= self.settings.sessions_per_token:
            raise Refused(429, "quota", f"{own} sessions are yours, which is the most: delete one first")
        if len(self.takes) >= self.settings.max_sessions:
            raise Refused(503, "full", f"{len(self.takes)} sessions are here, which is the most", retry=60)
        self._check_disk(owner)

    def _check_disk(self, owner: str) -> None:
        used = sum(take.place.size for take in list(self.takes.values()) if take.owner == owner)
        if used > self.settings.disk_bytes_per_token:
            raise Refused(507, "disk_quota", f"your sessions take {used} bytes on disk: delete some, or snapshots")

    def _find_sessions(self) -> None:
        """What an earlier process left, whether it ended well or was killed."""
        for folder in sorted(path for path in self.settings.state.iterdir() if path.is_dir()):
            place = Place.open(folder)
            told = {} if place is None else place.manifest
            worker = self.workers[secrets.randbelow(len(self.workers))]
            try:
                request = NewSession.model_validate(told.get("request"))
                if place is None or told.get("format") != _MANIFEST or request.model not in worker.hosts:
                    raise ValueError
                take = self._take(worker, told["id"], told["owner"], request, place)
            except (ValueError, KeyError):
                log.warning("folder %s is not a session of these models: left alone", folder.name)
                continue
            track = place.track
            take.chunk = max([track.bases()[-1].chunk, *(index + 1 for index in track.chunks())])
            self.takes[take.name] = take
            worker.takes[take.name] = take
        log.info("sessions found", extra={"count": len(self.takes)})

    def _gauges(self) -> Iterable[tuple[str, str, str, dict[str, float]]]:
        takes = list(self.takes.values())
        states = dict.fromkeys(("running", "paused", "ended", "parked", "failed"), 0.0)
        for take in takes:
            states[take.state] += 1
        by_device = lambda value: {w.name: float(value(w)) for w in self.workers}
        yield "longtake_sessions", "Sessions by state", "state", states
        yield "longtake_budget_bytes", "Bytes sessions may take", "device", by_device(lambda w: w.ledger.budget)
        yield "longtake_reserved_bytes", "Bytes reserved", "device", by_device(lambda w: w.ledger.reserved)
        held = by_device(lambda w: sum(t.held_bytes for t in w.takes.values()))
        yield "longtake_held_bytes", "Bytes that sessions hold, measured", "device", held
        yield "longtake_viewers", "Viewers", "", {"": float(sum(t.channel.viewers for t in takes))}
        drops = {"": float(sum(t.channel.drops for t in takes))}
        yield "longtake_dropped_fragments", "Fragments slow viewers missed", "", drops


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(_BLOCK, size))):
            size -= len(block)
            yield block


async def _wait(future: Any) -> Any:
    return await asyncio.wrap_future(future)

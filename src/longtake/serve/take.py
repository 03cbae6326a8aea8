"""One session of the server: its rollout while it is awake, its files, its stream. Everything that changes it runs on
the thread of its device (`scheduler`); `info` may be read from any."""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from ..chunk import Chunk
from ..errors import LongtakeError, NonFiniteError
from ..geometry import Geometry
from ..hosts.base import Host
from ..named import spec
from ..policies import KVPolicy
from ..samplers.chunked import ChunkedSampler
from ..session import Session
from .admission import Constants, Footprint, Ledger, fitting, footprint, shape_of
from .errors import NoRoom, Refused
from .metrics import Metrics
from .naming import policy_named, reuse_named
from .parking import Base, Place, Track, noise_state, replayable
from .protocol import Changed, ChunkMade, Moment, NewSession, Recovery, SavedSnapshot, SessionInfo
from .recording import Recording
from .settings import Settings
from .stream import Channel
from .strip import Sight

log = logging.getLogger("longtake.serve")

_MOMENTS = 100  # of a timeline that are kept
_FOR_LATER = {"prompt": "prompt", "policy": "policy", "record": "recording", "resume": "resume"}  # need chunks to come


class Take:
    """A session. States: running, paused, ended (all chunks made), failed (its files are there, its rollout cannot go
    on), parked (on disk only; `wanted` is what it will be when it wakes)."""

    def __init__(
        self, name: str, owner: str, request: NewSession, host: Host, constants: Constants, place: Place,
        settings: Settings, ledger: Ledger, publisher: ThreadPoolExecutor, metrics: Metrics,
    ) -> None:  # fmt: skip
        self.name, self.owner, self.request, self.host, self.place = name, owner, request, host, place
        self.settings, self.ledger, self.metrics = settings, ledger, metrics
        self.constants = constants
        self.geometry: Geometry = host.geometry(request.height, request.width)
        self.session: Session | None = None
        told = place.manifest
        self.wanted: str = told.get("wanted", "paused" if request.paused else "running")
        self.policy: str = told.get("policy") or ""
        self.prompt: str = told.get("prompt") or request.prompt
        self.chunk: int = told.get("chunk", 0)
        self.error: str | None = None
        self.recovery: Recovery | None = None
        self.timeline = [Moment.model_validate(moment) for moment in told.get("timeline", [])]
        self.used = time.monotonic()
        self.created: float = told.get("created") or time.time()
        self.channel = Channel(
            self.geometry.width, self.geometry.height, self.geometry.fps, settings.keyframe_seconds, place.frame,
        )  # fmt: skip
        self._publisher = publisher
        self._publishing: Future[None] | None = None
        self._unlogged: Chunk | None = None
        self._track: Track | None = None
        self._sight: Sight | None = None  # of the rollout's history
        self._based = -1  # chunk of the newest full snapshot
        self._ahead_since = 0.0  # when the stream's clock would have been at 0
        self._frames = self.channel.frame  # handed to the stream
        self._stats: dict[str, Any] = {}
        self._held: dict[str, int] = {}
        self.deleted = False
        self.rebuilding = False  # its history is made anew, between the turns of others

    # --- what others see --------------------------------------------------------------------------------------------

    @property
    def log_extra(self) -> dict[str, Any]:
        return {"session": self.name, "owner": self.owner}

    @property
    def state(self) -> Any:
        here = self.session is not None or self.rebuilding
        return self.wanted if here or self.wanted == "failed" else "parked"

    @property
    def length(self) -> int | None:
        """Chunks it was to have when it was created, or forked: those of a parent not among them."""
        told: int | None = self.place.manifest.get("length", self.request.chunks)
        return told

    @property
    def held_bytes(self) -> int:
        """As measured after the last chunk."""
        return self._held.get("total", 0)

    @property
    def idle_seconds(self) -> float:
        """How long nobody has looked at it or asked something of it."""
        return 0.0 if self.channel.viewers else time.monotonic() - self.used

    def touch(self) -> None:
        self.used = time.monotonic()

    def info(self) -> SessionInfo:
        """How it stands, for its owner."""
        recording = self.channel.recording
        return SessionInfo(
            id=self.name, model=self.host.name if self.request.model is None else self.request.model, state=self.state,
            prompt=self.prompt, policy=self.policy, reuse=self.request.reuse or "none", seed=self.request.seed,
            width=self.geometry.width, height=self.geometry.height, fps=self.geometry.fps, pace=self.request.pace,
            batch=self.request.batch, chunk=self.chunk, chunks=self.request.chunks, frames=self.channel.frame,
            viewers=self.channel.viewers,
            reserved_bytes=self.ledger.of(self.name), held_bytes=self.held_bytes, memory=self._held,
            stats=self._stats, recording=recording is not None and not recording.full,
            recorded_frames=recording.frames if recording else self.place.manifest.get("recorded", 0),
            snapshots=[SavedSnapshot(**s) for s in self.place.manifest.get("saved", [])],
            recovery=self.recovery, error=self.error, created=self.created,
        )  # fmt: skip

    def joins(self, other: Take) -> bool:
        """Whether both ask to be made together, and can be: the same model at the same size."""
        return self.request.batch and self.host is other.host and self.geometry == other.geometry

    # --- its bytes --------------------------------------------------------------------------------------------------

    def footprint(self, policy: KVPolicy, free: int) -> Footprint:
        """What it will hold under `policy`: with a view of its own in every layer if that fits into `free` bytes, else
        with one layer's. Raises NoRoom, with what would fit."""
        request, host = self.request, self.host
        shape = shape_of(
            host, self.geometry, self.constants, request.guidance_scale, request.num_inference_steps, None,
            0 if request.image is None else 1,
        )  # fmt: skip
        if policy.capacity(shape) is None and request.chunks is not None:  # it grows, up to an end that is known
            shape = replace(shape, frames=request.chunks * self.geometry.chunk_frames + 1)
        policy = policy.settle(shape)
        policy.check(shape)
        kept, reuse = self._keeps_latents, reuse_named(request.reuse)
        for residency in ("resident", "scratch"):
            need = footprint(host, self.geometry, policy, shape, self.constants, kept, residency, reuse)
            if need.total <= free:
                return need
        raise NoRoom(need.total, free, fitting(host, self.geometry, policy, shape, self.constants, kept, free, reuse))

    @property
    def _keeps_latents(self) -> bool:
        """For prompts that rewrite the past; only takes of one chunk at a time can."""
        return self.host.config.sampler == "chunked"

    # --- life: all of it on the device's thread ---------------------------------------------------------------------

    def begin(self, policy: KVPolicy, residency: str) -> None:
        """Make the rollout, and its first snapshot."""
        session = self._new_session(policy, residency)
        self._adopt(session, Track.begin(self.place.next_track()))
        track = self._awake_track
        self._based = track.save(session).chunk
        self.place.write(track=track.folder.name, policy=self.policy, prompt=self.prompt, wanted=self.wanted,
                         created=self.created, chunk=0, frame=0, timeline=self._happened("begin"))  # fmt: skip
        if self.request.record:
            self._record(True)

    def wake(self) -> None:
        """Come back from disk; the bytes are reserved by now."""
        track = self.place.track
        session, recovery = track.restore(self.host)
        if self.request.batch and recovery.replayed_chunks:
            recovery = recovery.model_copy(update={"exact": False})  # they were committed in a round
        recovered = recovery.replayed_chunks + recovery.remade_chunks > 0 or bool(self.place.manifest.get("awake"))
        self._adopt(session, track)
        self._based = recovery.snapshot_chunk
        self.prompt, self.recovery, self.error = str(session.prompt) or self.prompt, recovery, None
        self._unlogged = None
        if self.wanted == "failed":
            self.wanted = "paused"
        if self._complete:  # a process may be killed between its last chunk and the word of it
            self.wanted = "ended"
        if recovered:
            self.metrics.recovered.inc()
            self.metrics.recovery_seconds.observe(recovery.seconds)
        log.info("session awake", extra=self.log_extra | recovery.model_dump())
        self._mark(awake=True, **({} if self.timeline else {"timeline": self._happened("begin")}))
        if self.place.manifest.get("recording"):
            self._record(True)

    def park(self) -> None:
        """Go to disk. Raises Full, and stays awake, if the disk is."""
        if self.session is None:
            return
        self._log_late()
        self._flush_stream()
        self._awake_track.save(self.session)
        recording = self.channel.recording
        self._mark(awake=False, frame=self.channel.frame, recording=recording is not None,
                   recorded=recording.frames if recording else self.place.manifest.get("recorded", 0))  # fmt: skip
        self.channel.record(None)
        self.channel.rest()
        self.session, self._track, self._sight, self._held = None, None, None, {}
        self.ledger.release(self.name)
        self.metrics.parked.inc()
        log.info("session parked", extra=self.log_extra | {"chunk": self.chunk})

    def delete(self) -> None:
        self.deleted = True
        self._flush_stream()
        self.channel.record(None)
        self.session, self._track, self._sight = None, None, None
        self.ledger.release(self.name)
        self.place.delete()

    def due(self, now: float) -> float | None:
        """Seconds until its next chunk is wanted; 0: now; None: none is."""
        if self.session is None or self.wanted != "running":
            return None
        if self.request.pace == "free":
            return 0.0
        ahead = self._frames / self.geometry.fps - (now - self._ahead_since)
        return max(0.0, ahead - self.settings.lead_seconds)

    def step(self) -> None:
        """Make a chunk: log it, then show it."""
        if self.prepare():
            try:
                made: Chunk | BaseException = self.make()
            except Exception as error:
                made = error
            self.finish(made)

    def prepare(self) -> bool:
        """Whether a chunk can be made: the one before it has been logged."""
        now = time.monotonic()
        played = self._frames / self.geometry.fps
        self._ahead_since = max(self._ahead_since, now - played)  # a late stream does not catch up by hurrying
        try:
            self._log_late()
        except Refused as error:
            self._stop(str(error))
            return False
        return self.session is not None and self.wanted == "running"

    def make(self, seat: Any = None) -> Chunk:
        """The next chunk; `seat` stands for the host in a round of several (`together`)."""
        session, rollout = self._awake, self._awake.rollout
        if seat is None:
            return next(session)
        rollout.host, own = seat, rollout.host
        try:
            return next(session)
        finally:
            rollout.host = own

    def finish(self, made: Chunk | BaseException) -> None:
        """Log and show what `make` returned, or stand still for what it raised."""
        if isinstance(made, Chunk):
            self._unlogged = made
            try:
                self._log_late()
            except Refused as error:
                self._stop(str(error))
        elif isinstance(made, NonFiniteError | LongtakeError):
            self._stop(str(made))
        else:  # out of memory, a defect: the others go on
            log.error("chunk failed", extra=self.log_extra, exc_info=made)
            self._stop("the chunk could not be made; resume tries again")

    def check(self, action: Any) -> None:
        """Raise Refused for what would change nothing, because the take has all its chunks."""
        if self.wanted != "ended" or action.type not in _FOR_LATER or (action.type == "record" and not action.on):
            return
        raise Refused(
            409, "ended",
            f"the take is at its end, all its {self.request.chunks} chunks are made, so a {_FOR_LATER[action.type]} "
            "would change nothing: fork it, create a new session, or seek back to a snapshot",
        )  # fmt: skip

    def apply(self, action: Any) -> Generator[None, None, dict[str, Any]]:
        """Do what was asked; the answer is for whoever asked. Others may have their turn wherever it yields. Raises
        LongtakeError, and changes nothing then."""
        assert self.session is not None
        self.touch()
        self._log_late()
        self.check(action)
        before = self.timeline
        done = getattr(self, f"_{action.type}")(action)
        result: dict[str, Any] = ((yield from done) if isinstance(done, Generator) else done) or {}
        told = None if self.timeline is before else self.timeline
        self.channel.tell(Changed(session=self.info(), timeline=told))
        return result

    # --- actions ----------------------------------------------------------------------------------------------------

    def _prompt(self, action: Any) -> dict[str, Any]:
        session, track = self._awake, self._awake_track
        mode = action.mode or session.prompt_switch
        session.switch(action.text, mode)
        try:
            track.note({"at": session.index, "text": action.text, "mode": mode})
        except Refused:  # what is not in the log is not in force
            self._adopt(track.restore(self.host)[0], track)
            raise
        self.prompt = action.text
        self._mark(prompt=self.prompt, timeline=self._happened("prompt", mode))
        return {"mode": mode, "chunk": session.index}

    def _pause(self, action: Any) -> None:
        if self.wanted == "running":
            self.wanted = "paused"
            self._mark(wanted=self.wanted)

    def _resume(self, action: Any) -> None:
        if self.wanted == "paused":
            self.wanted, self.error = "running", None
            self._mark(wanted=self.wanted)

    def _save(self, action: Any) -> dict[str, Any]:
        session, track = self._awake, self._awake_track
        kept = self.place.manifest.get("saved", [])
        if len(kept) >= self.settings.saved_per_session:
            raise Refused(429, "too_many_snapshots", f"{len(kept)} snapshots are kept: delete one first")
        name = secrets.token_urlsafe(16)
        copy = track.branch(self.place.folder / "saved" / name, track.save(session))
        size = copy.bases()[0].path.stat().st_size
        saved = SavedSnapshot(
            id=name, chunk=session.index, prompt=self.prompt, bytes=size, created=time.time(), frame=self._frames
        )
        try:
            self.place.write(saved=[*kept, saved.model_dump()])
        except Refused:
            shutil.rmtree(copy.folder, ignore_errors=True)
            raise
        return {"snapshot": saved.model_dump()}

    def _seek(self, action: Any) -> dict[str, Any]:
        source = self.saved(action.snapshot)
        base = source.bases()[-1]
        track = source.branch(self.place.next_track(), base)
        session = Session.restore(base.path, self.host)
        if session.policy != self._awake.policy:
            self._reserve(session.policy)
        self.place.jump(track, chunk=session.index, since=session.index, frame=self._frames)
        self._adopt(session, track)
        self._based = base.chunk
        self.prompt = str(session.prompt)
        if self._complete or self.wanted == "ended":
            self.wanted = "ended" if self._complete else "paused"
        self._mark(prompt=self.prompt, policy=self.policy, wanted=self.wanted, timeline=self._happened("seek"))
        return {"chunk": session.index}

    def _policy(self, action: Any) -> Generator[None, None, dict[str, Any]]:
        started = time.perf_counter()
        yield from self._rebuild(policy_named(action.policy))
        self._mark(timeline=self._happened("policy"))
        return {"policy": self.policy, "chunk": self._awake.index, "seconds": time.perf_counter() - started}

    def lengthen(self) -> Generator[None, None, None]:
        """Make room for the chunks of a fork, where its parent's history was as long as the parent."""
        if self._awake.chunks not in (None, self.request.chunks):
            yield from self._rebuild(policy_named(self.policy))

    def _rebuild(self, policy: KVPolicy) -> Generator[None, None, None]:
        """Make the history anew from the log, a chunk at a time. Until the last step the track before stays in force
        on disk; meanwhile nothing else may touch the session (`scheduler` sees to it). Raises Refused, NoRoom or
        LongtakeError, and the take stands as before then."""
        session, old_track = self._awake, self._awake_track
        index = session.index
        if not isinstance(session.sampler, ChunkedSampler):
            raise Refused(409, "not_replayable", "chunks of this model are in flight together: its policy stays")
        if index > self.settings.replay_chunks or set(range(index)) - set(old_track.chunks()):
            raise Refused(
                409, "not_replayable",
                f"the take has {index} chunks; its history can be made anew while all are logged, at most "
                f"{self.settings.replay_chunks}: fork an earlier snapshot, or begin a new session",
            )  # fmt: skip
        before, noise = self.ledger.of(self.name), noise_state(session)
        old_track.save(session)
        need = self._reserve(policy)
        self.ledger.correct(self.name, max(before, need.total))  # what it had is free only once it is not wanted back
        self.rebuilding = True
        self.session, self._sight = None, None  # its bytes are what the new one gets
        del session
        try:
            fresh = self._new_session(policy, need.residency)
            for _ in old_track.replaying(fresh, 0):
                yield
            fresh.noise.restore(noise)
            track = old_track.rebase(self.place.next_track(), fresh)
            self.place.jump(track, policy=spec(fresh.policy))
        except BaseException:
            self.ledger.correct(self.name, before)
            again = old_track.restore(self.host)[0]
            again.noise.restore(noise)
            self._adopt(again, old_track)
            raise
        finally:
            self.rebuilding = False
        self.ledger.correct(self.name, need.total)
        self._adopt(fresh, track)
        self._based = fresh.index

    def _record(self, action: Any) -> None:
        on = action if isinstance(action, bool) else action.on
        self._flush_stream()
        running = self.channel.recording is not None
        if on and not running:
            self.channel.record(Recording(self.place.recording, self.settings.record_bytes))
        elif not on and running:
            self.place.write(recorded=self.channel.recording.frames if self.channel.recording else 0)
            self.channel.record(None)
        self._mark(recording=on)

    def standing(self) -> tuple[Track, Base]:
        """A full snapshot of the take as it stands, and its track. Raises Full."""
        self._log_late()
        return self._awake_track, self._awake_track.save(self._awake)

    def saved(self, name: str) -> Track:
        """A saved snapshot. Raises Refused if this session has none of that name."""
        if name not in {s["id"] for s in self.place.manifest.get("saved", [])}:
            raise Refused(404, "no_snapshot", "this session has no such snapshot")
        return self.place.saved(name)

    # --- within -----------------------------------------------------------------------------------------------------

    @property
    def _awake(self) -> Session:
        assert self.session is not None
        return self.session

    @property
    def _awake_track(self) -> Track:
        assert self._track is not None
        return self._track

    def _new_session(self, policy: KVPolicy, residency: str) -> Session:
        request = self.request
        shape = shape_of(self.host, self.geometry, self.constants, request.guidance_scale,
                         request.num_inference_steps, None)  # fmt: skip
        return Session(
            self.host, policy, reuse=reuse_named(request.reuse), prompt=request.prompt,
            negative_prompt=request.negative_prompt, seed=request.seed, height=request.height, width=request.width,
            num_inference_steps=request.num_inference_steps, guidance_scale=request.guidance_scale,
            image=self.place.image(), residency=residency, keep_latents=self._keeps_latents,
            chunks=request.chunks if policy.capacity(shape) is None else None,
        )  # fmt: skip

    def _adopt(self, session: Session, track: Track) -> None:
        self.session, self._track = session, track
        self._sight = Sight(session)
        self.policy, self.chunk = spec(session.policy), session.index
        self._held = session.memory()

    def _reserve(self, policy: KVPolicy) -> Footprint:
        need = self.footprint(policy, self.ledger.free + self.ledger.of(self.name))
        self.ledger.reserve(self.name, need.total)
        return need

    def _happened(self, what: Any, mode: str | None = None) -> list[dict[str, Any]]:
        """Put what is in force from the next chunk on into the timeline; returns all of it."""
        now = Moment(
            frame=self._frames, chunk=self._awake.index, what=what, prompt=self.prompt, policy=self.policy, mode=mode
        )
        kept = self.timeline
        if kept and what == "prompt" == kept[-1].what and kept[-1].frame == now.frame:
            kept = kept[:-1]  # it never came into force
        self.timeline = [*kept[:1], *kept[1:][-(_MOMENTS - 2) :], now]
        return [moment.model_dump() for moment in self.timeline]

    def _mark(self, **changes: Any) -> None:
        """Note how it stands, if the disk lets us: what matters for coming back is in the track."""
        try:
            self.place.write(chunk=self.chunk, used=time.time(), **changes)
        except Refused as error:
            log.warning("session description not written: %s", error, extra=self.log_extra)

    def _stop(self, reason: str) -> None:
        self.wanted, self.error = "paused", reason
        log.warning("session paused: %s", reason, extra=self.log_extra)
        self.channel.tell(Changed(session=self.info()))

    def _log_late(self) -> None:
        """Log the chunk that has been made and not yet been logged, then show it. Raises Full."""
        if self._unlogged is None:
            return
        session, track, chunk = self._awake, self._awake_track, self._unlogged
        frames = 0 if chunk.frames is None else len(chunk.frames)
        track.append(chunk.index, chunk.latents[None], noise_state(session), self._frames + frames)
        # a chunk that was made in a round cannot be made again by itself, bit for bit
        lasting = not self.request.batch or replayable(session)
        if session.index - self._based >= (self.settings.snapshot_every if lasting else 1):
            self._based = track.save(session).chunk
            track.trim(self.settings.log_bytes)
        self._unlogged = None
        self.chunk = session.index
        self._measure(session)
        self._show(session, chunk)
        if self._complete:
            self._flush_stream()  # its last frames come before the news
            self.wanted = "ended"
            self._mark(wanted=self.wanted)
            self.channel.tell(Changed(session=self.info()))

    @property
    def _complete(self) -> bool:
        """Whether all its chunks are made."""
        return self.request.chunks is not None and self._awake.index >= self.request.chunks

    def _measure(self, session: Session) -> None:
        self._held = session.memory()
        if self._held["total"] > self.ledger.of(self.name):  # what arithmetic left out: score tables, encoder state
            self.ledger.correct(self.name, self._held["total"])

    def _show(self, session: Session, chunk: Chunk) -> None:
        assert chunk.frames is not None
        stats, frames = chunk.stats, np.asarray(chunk.frames)
        video = len(frames) / self.geometry.fps
        self._stats = {
            "seconds": stats.seconds, "forward_seconds": stats.forward_seconds, "decode_seconds": stats.decode_seconds,
            "chunks_per_second": 1 / stats.seconds, "realtime_factor": video / stats.seconds,
            "attended_tokens": stats.attended_tokens, "history_bytes": stats.history_bytes,
            "held_bytes": self._held["total"], "forwards": stats.forwards, "reused": stats.reused,
        }  # fmt: skip
        self.metrics.chunks.labels(self.host.name).inc()
        self.metrics.chunk_seconds.labels(self.host.name).observe(stats.seconds)
        self._flush_stream()  # at most one chunk waits for the encoder
        told = ChunkMade(
            index=chunk.index, frame=self.channel.frame, frames=len(frames), prompt=self.prompt, policy=self.policy,
            stats=self._stats, strip=[] if self._sight is None else self._sight.row(),
        )  # fmt: skip
        log.debug("chunk", extra=self.log_extra | {"chunk": chunk.index, "seconds": stats.seconds})
        self._frames += len(frames)
        self._publishing = self._publisher.submit(self._publish, told, frames)

    def _publish(self, told: ChunkMade, frames: Any) -> None:
        self.channel.tell(told)
        self.channel.publish(frames)

    def _flush_stream(self) -> None:
        if self._publishing is not None:
            self._publishing.result()
            self._publishing = None

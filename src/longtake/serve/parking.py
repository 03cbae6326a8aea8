"""A session on disk: full snapshots, a log of chunks and prompts between them, and the way back.

    <state>/<session>/session.json      who owns it, what was asked for, how it stands
                      image.safetensors its first image, if one was given
                      record.mp4        its recording
                      t000001/          the track in force: see `Track`
                      saved/<id>/       a track with one snapshot, kept at the owner's wish

A track is replaced as a whole when a take jumps (seek, fork, another policy), by hard links where nothing changes, so
that at every moment either the old or the new one is there. Everything is for the server's user alone (0700, 0600).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import LongtakeError
from ..hosts.base import Host
from ..policies import KVPolicy
from ..samplers.chunked import ChunkedSampler, NoiseSource
from ..session import Session
from .errors import Refused
from .protocol import Recovery

_KEPT = 2  # full snapshots of a track: the newest, and one before it


class Full(Refused):
    """The disk, or what may be used of it, is full."""

    def __init__(self, what: str, error: BaseException) -> None:
        reason = getattr(error, "strerror", None) or "no space"
        super().__init__(507, "storage_full", f"{what} could not be written ({reason}): delete sessions or snapshots")


@dataclass(frozen=True)
class Base:
    """A full snapshot: after so many chunks, and so many events of the track."""

    chunk: int
    events: int
    path: Path


class Track:
    """A folder from which a take comes back: snapshots `base-CHUNK-EVENTS`, one file per chunk, `events.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[dict[str, Any]] = []
        if (log := folder / "events.jsonl").exists():
            for line in log.read_text().splitlines():
                try:
                    self.events.append(json.loads(line))
                except ValueError:  # the last line of a killed process
                    break

    @classmethod
    def begin(cls, folder: Path) -> Track:
        private_folder(folder)
        return cls(folder)

    def bases(self) -> list[Base]:
        """Newest last."""
        found = []
        for path in self.folder.glob("base-*.safetensors"):
            _, chunk, events = path.stem.split("-")
            found.append(Base(int(chunk), int(events), path))
        return sorted(found, key=lambda base: (base.chunk, base.events))

    def chunks(self) -> dict[int, Path]:
        return {int(path.stem.split("-")[1]): path for path in self.folder.glob("chunk-*.safetensors")}

    def append(self, index: int, latents: Tensor, noise: list[Tensor], frame: int) -> None:
        """Log a committed chunk: latents [B, C, f, h, w], the random state after it, and the frame of the stream that
        follows its own. Raises Full."""
        tensors = {"latents": latents.cpu().contiguous()} | {f"rng/{i}": state for i, state in enumerate(noise)}
        tensors["frame"] = torch.tensor(frame)
        write_private(self.folder / f"chunk-{index:08d}.safetensors", save(tensors), "the chunk")

    def note(self, event: dict[str, Any]) -> None:
        """Log what was asked of the take before its next chunk. Raises Full."""
        line = json.dumps(event) + "\n"
        whole = "".join(json.dumps(e) + "\n" for e in self.events) + line
        write_private(self.folder / "events.jsonl", whole.encode(), "the log")
        self.events.append(event)

    def save(self, session: Session) -> Base:
        """A full snapshot of the take as it stands. Raises Full; what there was before is kept then."""
        base = self._base(session.index, len(self.events))
        if not base.path.exists():
            try:
                session.snapshot(base.path)
                base.path.chmod(0o600)
            except (OSError, LongtakeError) as error:
                raise Full("the snapshot", error.__cause__ or error) from error
            for old in self.bases()[:-_KEPT]:
                old.path.unlink(missing_ok=True)
        return base

    def trim(self, limit: int) -> None:
        """Let the oldest chunks go, of those that a full snapshot stands for, while the log takes more than `limit`."""
        bases = self.bases()
        sizes = {index: path.stat().st_size for index, path in self.chunks().items()}
        total = sum(sizes.values())
        for index in sorted(sizes):
            if total <= limit or index >= bases[0].chunk:
                break
            (self.folder / f"chunk-{index:08d}.safetensors").unlink(missing_ok=True)
            total -= sizes[index]

    def branch(self, folder: Path, base: Base) -> Track:
        """Another track that begins where `base` stands, with the log up to there."""
        private_folder(folder)
        try:
            os.link(base.path, folder / base.path.name)
            for index, path in self.chunks().items():
                if index < base.chunk:
                    os.link(path, folder / path.name)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise Full("the snapshot", error) from error
        other = Track(folder)
        kept = self.events[: base.events]
        write_private(folder / "events.jsonl", "".join(json.dumps(e) + "\n" for e in kept).encode(), "the log")
        other.events = list(kept)
        return other

    def rebase(self, folder: Path, session: Session) -> Track:
        """Another track with the same log, and the snapshot of a session that has been made of all of it."""
        private_folder(folder)
        other = Track(folder)
        other.events = list(self.events)
        try:
            other.save(session)
            lines = "".join(json.dumps(e) + "\n" for e in self.events)
            write_private(folder / "events.jsonl", lines.encode(), "the log")
            for path in self.chunks().values():
                os.link(path, folder / path.name)
        except (OSError, Full) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise Full("the log", error) from error
        return other

    def restore(self, host: Host) -> tuple[Session, Recovery]:
        """The take as it stood after the last chunk and event in the log: from the newest readable snapshot, by the
        commit passes of what came after it, or, where those do not lead to the same history, by making it again. Raises
        LongtakeError if no snapshot can be read."""
        started = time.perf_counter()
        reason: LongtakeError | None = None
        for base in reversed(self.bases()):
            try:
                session = Session.restore(base.path, host)
            except LongtakeError as error:
                reason = error
                continue
            replayed = remade = 0
            exact = True
            if replayable(session):
                replayed = self.replay(session, base.events)
            else:
                remade, exact = self.remake(session, base.events)
            if not exact and isinstance(session.sampler, ChunkedSampler):  # what was shown counts, not what is made now
                session = Session.restore(base.path, host)
                remade, replayed = 0, self.replay(session, base.events)
            return session, Recovery(
                snapshot_chunk=base.chunk, replayed_chunks=replayed, remade_chunks=remade, exact=exact,
                seconds=time.perf_counter() - started,
            )  # fmt: skip
        raise LongtakeError("none of the session's snapshots can be read any more") from reason

    def remake(self, session: Session, events: int) -> tuple[int, bool]:
        """Make the logged chunks again from the session's own on, with what was asked between them: how many, and
        whether each came out as it is in the log, bit for bit."""
        logged, first = self.chunks(), session.index
        waiting = self.events[events:]
        while True:
            waiting = _obey(session, waiting)
            try:
                latents = _read(logged[session.index])[0]
            except (KeyError, OSError, ValueError):  # the end, or a file that the system lost
                return session.index - first, True
            made = next(session).latents[None]
            if not torch.equal(made.cpu(), latents):
                return session.index - first, False

    def replay(self, session: Session, events: int) -> int:
        """Commit the logged chunks from the session's own on, with what was asked between them; returns how many.
        `events`: of the track's events, those the session has obeyed."""
        return sum(1 for _ in self.replaying(session, events))

    def replaying(self, session: Session, events: int) -> Iterator[int]:
        """The same a chunk at a time: its number, once it is committed. The noise is right when all are."""
        logged, noise = self.chunks(), None
        waiting = self.events[events:]
        while True:
            waiting = _obey(session, waiting)
            if session.index not in logged:
                break
            try:
                latents, noise = _read(logged[session.index])
            except (OSError, ValueError):  # a file that the system lost: what is whole before it counts
                break
            session.extend(latents)
            yield session.index - 1
        if noise is not None and isinstance(session.noise, NoiseSource):
            session.noise.restore(noise)

    def _base(self, chunk: int, events: int) -> Base:
        return Base(chunk, events, self.folder / f"base-{chunk:08d}-{events:06d}.safetensors")


class Place:
    """The folder of one session."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: Path) -> Place | None:
        """A session that an earlier process left; None if its folder is not whole."""
        try:
            manifest = json.loads((folder / "session.json").read_text())
        except (OSError, ValueError):
            return None
        place = cls(folder, manifest)
        for stray in folder.glob("t*"):  # of a jump that was not finished
            if stray.name != manifest["track"]:
                shutil.rmtree(stray, ignore_errors=True)
        return place if place.track.bases() else None

    @property
    def track(self) -> Track:
        return Track(self.folder / self.manifest["track"])

    @property
    def frame(self) -> int:
        """The next frame of the stream: a killed process leaves what its last chunk says. Chunks before `since` are
        those of a fork's parent, or from before a seek."""
        told: int = self.manifest.get("frame", 0)
        chunks = self.track.chunks() if "track" in self.manifest else {}
        newest = max(chunks, default=-1)
        if newest < self.manifest.get("since", 0):
            return told
        try:
            return int(_tensors(chunks[newest])["frame"])
        except (KeyError, ValueError):
            return told

    @property
    def recording(self) -> Path:
        return self.folder / "record.mp4"

    def write(self, **changes: Any) -> None:
        """Change the manifest. Raises Full."""
        changed = self.manifest | changes
        write_private(self.folder / "session.json", json.dumps(changed).encode(), "the session's description")
        self.manifest = changed

    def next_track(self) -> Path:
        """A folder for the track that is to come into force."""
        number = int(self.manifest.get("track", "t000000")[1:]) + 1
        folder = self.folder / f"t{number:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def jump(self, track: Track, **changes: Any) -> None:
        """Let a finished track come into force in place of the one before."""
        before = self.manifest.get("track")
        self.write(track=track.folder.name, **changes)
        if before:
            shutil.rmtree(self.folder / before, ignore_errors=True)

    def saved(self, name: str) -> Track:
        return Track(self.folder / "saved" / name)

    def write_image(self, image: Tensor) -> None:
        write_private(self.folder / "image.safetensors", save({"image": image.contiguous()}), "the image")

    def image(self) -> Tensor | None:
        path = self.folder / "image.safetensors"
        return _tensors(path)["image"] if path.exists() else None

    @property
    def size(self) -> int:
        """Bytes on disk; files that several folders name are shared among them."""
        return sum(s.st_size // max(1, s.st_nlink) for s in _stats(self.folder))

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def replayable(session: Session) -> bool:
    """Whether the commit passes of the logged latents alone lead to the same history: one chunk at a time, and a policy
    that looks at no scores of denoising forwards. Other takes come back by making their chunks again."""
    return isinstance(session.sampler, ChunkedSampler) and type(session.policy).score is KVPolicy.score


def noise_state(session: Session) -> list[Tensor]:
    return session.noise.state() if isinstance(session.noise, NoiseSource) else []


def own_folder(state: Path) -> int:
    """Make the folder of a server's sessions, for its owner alone, and hold it: two servers must not write the same
    sessions. The descriptor to close in the end. Raises LongtakeError."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        state.chmod(0o700)
        descriptor = os.open(state / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise LongtakeError(f"state folder {state} cannot be used: {error}; give another with --state") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise LongtakeError(f"state folder {state} belongs to a running server: give another (--state)") from None
    return descriptor


def private_folder(folder: Path) -> None:
    """Make a folder, and those above it that lack, for this user alone. Raises Full."""
    if not folder.parent.exists():
        private_folder(folder.parent)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise Full("a folder", error) from error


def write_private(path: Path, content: bytes, what: str) -> None:
    """Write a file of mode 0600, whole or not at all. Raises Full. It survives a killed process, not a power cut."""
    hidden = path.with_name(f".{path.name}.part")
    try:
        descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(hidden, path)
    except OSError as error:
        hidden.unlink(missing_ok=True)
        raise Full(what, error) from error


def _read(path: Path) -> tuple[Tensor, list[Tensor]]:
    tensors = _tensors(path)
    states = sum(name.startswith("rng/") for name in tensors)
    return tensors["latents"], [tensors[f"rng/{i}"] for i in range(states)]


def _obey(session: Session, waiting: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do what was asked before the session's next chunk; returns what was asked later."""
    due = [event for event in waiting if event["at"] <= session.index]
    for event in due:
        session.switch(event["text"], event["mode"])
    return waiting[len(due) :]


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except Exception as error:  # safetensors' own error is no OSError
        raise ValueError(f"{path.name} is damaged") from error


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.stat(os.path.join(root, name), follow_symlinks=False)
            except OSError:
                continue

"""A batch's folder: a result appears in it whole, once, or not at all.

    <DIR>/takes/<name>/take.mp4, take.json   one take; the folder gets its name when both are on disk
    <DIR>/results.jsonl                      how every line of the last run ended
    <DIR>/.work/                             what is being made

The rename of a folder is the one step that counts, and it fails if the name is taken: so a take is never there in part,
and never twice, whoever is killed at whatever moment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import LongtakeError
from .jobs import Job
from .making import RECORD, TOKEN, VIDEO


class Results:
    """The folder, while one program writes into it. Raises LongtakeError if another does, or it cannot be made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.takes, self._work = folder, folder / "takes", folder / ".work"
        try:
            self.takes.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise LongtakeError(f"{folder} cannot be used for results: {error.strerror}; give another -o") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise LongtakeError(f"{folder}: another batch is writing there; wait for it, or give another -o") from None
        shutil.rmtree(self._work, ignore_errors=True)  # of a run that was killed
        self._work.mkdir(exist_ok=True)
        self.token = secrets.token_hex(16)  # by which a worker knows that it sees this folder
        (self._work / TOKEN).write_text(self.token)

    def close(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, job: Job) -> dict[str, Any] | None:
        """As `found` in this folder."""
        return found(self.folder, job)

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        """A folder to make a take in, which is removed unless it was committed."""
        folder = Path(tempfile.mkdtemp(dir=self._work))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, staged: Path, job: Job) -> bool:
        """Give a finished take its name; False if there is one of that name by now. Raises LongtakeError."""
        try:
            for name in (VIDEO, RECORD):
                _to_disk(staged / name)
            _to_disk(staged)
            staged.chmod(0o755)
            os.rename(staged, self.takes / job.name)
            _to_disk(self.takes)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise LongtakeError(f"{job.name} cannot be written: {error.strerror}") from error
        return True

    def commit_bytes(self, video: bytes, record: dict[str, Any], job: Job) -> bool:
        """The same for a take that was made elsewhere."""
        with self.stage() as folder:
            try:
                (folder / VIDEO).write_bytes(video)
                (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False))
            except OSError as error:
                raise LongtakeError(f"{job.name} cannot be written: {error.strerror}") from error
            return self.commit(folder, job)

    def write_summary(self, rows: list[dict[str, Any]]) -> None:
        """`results.jsonl`: one line per line of the batch's file."""
        hidden = self._work / "results.jsonl"
        try:
            hidden.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            os.replace(hidden, self.folder / "results.jsonl")
        except OSError as error:
            raise LongtakeError(f"results.jsonl cannot be written: {error.strerror}") from error


def found(folder: Path, job: Job) -> dict[str, Any] | None:
    """The record of a take that is there, or None. Raises LongtakeError if its name belongs to another take."""
    path = folder / "takes" / job.name / RECORD
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise LongtakeError(f"{path} cannot be read: delete its folder, and the take is made again")
    if record.get("digest") != job.digest:
        raise LongtakeError(f"id {job.name!r} names another take in {folder / 'takes'}: give this line another id")
    return record


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

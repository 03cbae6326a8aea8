"""A session's MP4 on disk: appended to frame by frame, playable at every moment, whatever ends the process."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from .fmp4 import Track


class Recording:
    """Appends fragments to a file. What a killed process left half-written is cut off when it is opened again."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self.frames, self.size = _whole(path)
        self.full = False  # the limit or the disk: it takes no more
        self._begun = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o600)
        os.ftruncate(self._file, self.size)
        os.lseek(self._file, self.size, os.SEEK_SET)

    def write(self, track: Track, data: bytes, key: bool) -> None:
        """Append one frame; what comes before the first key frame is left out."""
        if self.full or not (key or self._begun):
            return
        self._begun = True
        head = b"" if self.size else track.header()
        fragment = head + track.fragment(data, key, self.frames)
        if self.size + len(fragment) > self.limit:
            self.full = True
            return
        try:
            written = os.write(self._file, fragment)
        except OSError:
            written = 0
        if written < len(fragment):  # a full disk: the file ends with the last whole frame
            os.ftruncate(self._file, self.size)
            os.lseek(self._file, self.size, os.SEEK_SET)
            self.full = True
            return
        self.size += written
        self.frames += 1

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _whole(path: Path) -> tuple[int, int]:
    """Frames of the file's whole fragments, and the bytes up to the end of the last."""
    frames = end = at = 0
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            while at + 8 <= length:
                file.seek(at)
                size, kind = struct.unpack(">I4s", file.read(8))
                if size < 8 or at + size > length:
                    break
                at += size
                if kind in (b"moov", b"mdat"):
                    end, frames = at, frames + (kind == b"mdat")
    except FileNotFoundError:
        pass
    return frames, end

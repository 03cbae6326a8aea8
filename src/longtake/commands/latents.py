"""The latents of a take as one safetensors file, written chunk by chunk, so that no take is too long for memory."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import LongtakeError

_HEADER_BYTES = 4096  # reserved, and padded with spaces, which the format allows


class LatentsWriter:
    """One tensor `latents`, fp32 [F, C, h, w], frame-major so that it can be appended to.

    A hidden file in the same folder until `close` names it; leaving `with` by Ctrl-C closes it too, any other
    exception removes it. Raises LongtakeError if the file cannot be written.
    """

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self.path, self.metadata = path, metadata
        self.frames = 0
        self._cell: list[int] = []  # [C, h, w]
        self._hidden = path.with_name(f".longtake-{secrets.token_hex(6)}.part")
        try:
            self._file = open(self._hidden, "xb")  # noqa: SIM115 - closed by close or discard
            self._file.write(b" " * (8 + _HEADER_BYTES))
        except OSError as error:
            raise self._failed(error) from error

    def write(self, latents: Any) -> None:
        """Append a chunk's latents [C, f, h, w]."""
        frames = latents.detach().float().cpu().transpose(0, 1).contiguous().numpy().astype("<f4", copy=False)
        try:
            self._file.write(frames.tobytes())
        except OSError as error:
            raise self._failed(error) from error
        self.frames += len(frames)
        self._cell = list(frames.shape[1:])

    def close(self) -> None:
        """Write the header and give the file its name."""
        size = self._file.tell() - 8 - _HEADER_BYTES
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        header["latents"] = {"dtype": "F32", "shape": [self.frames, *self._cell], "data_offsets": [0, size]}
        text = json.dumps(header).encode()
        if len(text) > _HEADER_BYTES:  # a very long prompt: the tensor matters more than its label
            text = json.dumps({"latents": header["latents"]}).encode()
        try:
            self._file.seek(0)
            self._file.write(_HEADER_BYTES.to_bytes(8, "little") + text.ljust(_HEADER_BYTES))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._hidden, self.path)
        except OSError as error:
            raise self._failed(error) from error

    def discard(self) -> None:
        """Remove what was written, if it has no name yet."""
        with contextlib.suppress(OSError):  # a full disk fails the last flush too, but the descriptor is closed
            self._file.close()
        self._hidden.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> LongtakeError:
        if hasattr(self, "_file"):
            self.discard()
        return LongtakeError(f"cannot write latents to {self.path}: {error.strerror or error}")

    def __enter__(self) -> LatentsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.frames and (kind is None or issubclass(kind, KeyboardInterrupt)):
            self.close()
        else:
            self.discard()

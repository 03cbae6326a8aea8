"""The out folder is whole or absent: it is built beside its place and renamed when it is done."""

import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...errors import LongtakeError
from .wording import first_line


def check_out(out: Path, overwrite: bool, inputs: list[Path]) -> None:
    """`out` is free, or an earlier conversion that may go and that none of the inputs stands in."""
    if not out.exists():
        return
    if not overwrite:
        raise LongtakeError(f"{out} exists; choose another folder, or pass overwrite=True (--overwrite) to replace it")
    if out.is_symlink() or not (out / "longtake.json").is_file():
        raise LongtakeError(f"{out} was not written by longtake convert and is not replaced; choose another folder")
    for path in inputs:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise LongtakeError(f"{out} holds the input {path} and is not replaced; choose another folder")


class Staging:
    """A folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""

    def __init__(self, out: Path):
        self.out = out
        token = secrets.token_hex(4)
        self.folder, self.old = (out.with_name(f".{out.name}.{token}.{end}") for end in ("partial", "old"))

    def __enter__(self) -> Path:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
        except OSError as error:
            raise LongtakeError(f"cannot create {self.out} ({first_line(error)}); choose another folder") from None
        return self.folder

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                self._publish()
        except OSError as failure:
            error = failure
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise LongtakeError(
                f"writing {self.out} failed ({first_line(error)}) and left nothing behind; "
                "free some space or choose another disk"
            ) from None

    def _publish(self) -> None:
        replaced = self.out.exists()
        if replaced:
            self.out.rename(self.old)
        try:
            self.folder.rename(self.out)
        except OSError:
            if replaced:
                self.old.rename(self.out)
            raise
        shutil.rmtree(self.old, ignore_errors=True)

"""Cells that survive: each finished one is a file, and a folder where it has more to keep, written whole or not at all,
and never made again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ...digest import file_sha256
from ...errors import LongtakeError
from ...hosts.base import CONFIG_NAME
from ...hosts.loading import find
from ..decay_note import without_decay
from ..provenance import read_json, write_atomically
from .arms import Arm
from .protocols import Setting
from .takes import TakeSetting
from .writing import writing

FORMAT = 1  # of outcomes
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "compressor")
_READ = (".json", ".safetensors")


@dataclass(frozen=True)
class Cell:
    """One arm under one seed of one model; its key is a hash of all that decides its outcome."""

    model: str
    weights: str  # hash of the model's files
    dtype: str
    arm: Arm
    seed: int
    setting: Setting | TakeSetting

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the outcome."""
        return {
            "format": FORMAT, "model": self.model, "weights": self.weights, "dtype": self.dtype,
            "arm": self.arm.as_dict(), "seed": self.seed, "setting": self.setting.as_dict(),
        }  # fmt: skip

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits. What the model is called, and the arm, decides nothing."""
        arm = {**self.arm.as_dict(), "name": ""}
        arm.pop("reuse_name", None)
        facts = {**self.facts, "arm": arm}
        del facts["model"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Store:
    """A folder of finished cells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cells"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LongtakeError(f"cannot make folder {self.folder}: {error.strerror}; give another --out") from error

    def __contains__(self, cell: Cell) -> bool:
        return self._path(cell).exists()

    def put(self, cell: Cell, outcome: dict[str, Any], origin: dict[str, Any], made: Path | None = None) -> None:
        """Keep a finished cell with its origin (date, machine, versions, commit), and the files in the folder `made`
        (see `workshop`), which are then listed in its outcome. Raises StoreError if that cannot be written."""
        with writing():
            if made is not None:
                outcome = {**outcome, "files": _manifest(made)}
                if cell in self:  # made by another run meanwhile
                    return
                shutil.rmtree(self.files(cell), ignore_errors=True)  # a run was killed before it wrote the cell's file
                os.replace(made, self.files(cell))
            content = {"key": cell.key, **cell.facts, "outcome": outcome, "origin": origin}
            write_atomically(self._path(cell), json.dumps(content, indent=1, default=str).encode())

    def get(self, cell: Cell) -> dict[str, Any]:
        """A finished cell's content. Raises LongtakeError if the file is damaged."""
        return read_json(self._path(cell))

    def finished(self, cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
        """The content of those cells that are finished, by key, each file read once. Raises LongtakeError as `get`."""
        return {cell.key: self.get(cell) for cell in cells if cell in self}

    def files(self, cell: Cell) -> Path:
        """The folder of a cell's files."""
        return self.folder / cell.key

    def all(self) -> list[dict[str, Any]]:
        """Every finished cell of the folder, whatever plan it belongs to; damaged ones are left out."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(LongtakeError):
                content = read_json(path)
                if isinstance(content, dict) and content.get("key") == path.stem and "outcome" in content:
                    found.append(content)
        return found

    def damage(self, cell: Cell) -> str:
        """What is wrong with a finished cell: its file cannot be read, or a file it lists is not what it was; "" if it
        is sound."""
        try:
            content = read_json(self._path(cell))
            if content["key"] != cell.key:
                return f"it holds the cell {content['key']}"
            listed = content["outcome"].get("files", {})
            _ = content["origin"]["seconds"]
        except (LongtakeError, KeyError, TypeError, AttributeError):
            return "its file cannot be read"
        for name, told in listed.items():
            path = self.files(cell) / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != told["bytes"] or file_sha256(path) != told["sha256"]:
                return f"{name} has changed"
        return ""

    def set_aside(self, cell: Cell) -> str:
        """Move a damaged cell out of the way; the name it is kept under."""
        mark = f".damaged-{secrets.token_hex(3)}"
        with writing():
            for path in (self._path(cell), self.files(cell)):
                if path.exists():
                    os.replace(path, path.with_name(path.name + mark))
        return f"{cell.key}{mark}"

    @contextlib.contextmanager
    def workshop(self, cell: Cell) -> Iterator[Path]:
        """A hidden folder to make a cell's files in, on the same disk; removed at the end unless `put` took it."""
        for old in self.folder.glob(f".{cell.key}.*"):
            host, _, process = old.name.removeprefix(f".{cell.key}.").rpartition("-")
            if host == socket.gethostname() and not _alive(process):  # of a run that was killed
                shutil.rmtree(old, ignore_errors=True)
        made = self.folder / f".{cell.key}.{socket.gethostname()}-{os.getpid()}"
        with writing():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key}.json"


def label_of(cell: Cell) -> str:
    """An arm's name with its budget in KiB and its reuse."""
    arm = cell.arm
    label = arm.name if arm.budget is None else f"{arm.name} @ {arm.budget // 1024} KiB"
    return f"{label} + {arm.reuse_name}" if arm.reuse_name else label


def fingerprint(folder: Path, compressor: bool = True) -> str:
    """Hash of what a model folder computes with: its description and its parts, with or without its compressor; notes
    of the training do not count, nor does the measured decay of attention in the description."""
    digest = hashlib.sha256()
    parts = [part for part in PARTS if compressor or part != "compressor"]
    files = [folder / "longtake.json", *(path for part in parts for path in (folder / part).rglob("*"))]
    if not any((folder / part).is_dir() for part in PARTS):  # in a layout of its own, as Lumos-1 is published
        files = [path for path in folder.rglob("*") if path.name != "training.json" and path.parent.name != "work"]
    for path in sorted(path for path in files if path.suffix in _READ and path.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        if path == folder / CONFIG_NAME:
            digest.update(without_decay(path.read_text(encoding="utf-8")).encode())
            continue
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()[:16]


@lru_cache(maxsize=16)
def weights_of(model: str, compressor: bool = True) -> str:
    """`fingerprint` of a model that has been loaded by this name."""
    folder = find(model, causal=True)
    if folder is None:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, local_files_only=True))
    return fingerprint(folder, compressor)


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):  # somebody else's
        return True
    return True

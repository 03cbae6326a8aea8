"""Cells that survive: each finished one is a file, written whole or not at all, and never made again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import LongtakeError
from ..provenance import read_json, write_atomically
from .arms import Arm
from .protocols import Setting

FORMAT = 1  # of outcomes
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "compressor")


@dataclass(frozen=True)
class Cell:
    """One arm under one seed of one model; its key is a hash of all that decides its outcome."""

    model: str
    weights: str  # hash of the model's files
    dtype: str
    arm: Arm
    seed: int
    setting: Setting

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
        facts = {**self.facts, "arm": {**self.arm.as_dict(), "name": ""}}
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

    def put(self, cell: Cell, outcome: dict[str, Any], origin: dict[str, Any]) -> None:
        """Keep a finished cell with its origin (date, machine, versions, commit)."""
        content = {"key": cell.key, **cell.facts, "outcome": outcome, "origin": origin}
        write_atomically(self._path(cell), json.dumps(content, indent=1, default=str).encode())

    def get(self, cell: Cell) -> dict[str, Any]:
        """A finished cell's content. Raises LongtakeError if the file is damaged."""
        return read_json(self._path(cell))

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key}.json"


def label_of(cell: Cell) -> str:
    """An arm's name with its budget in KiB."""
    return cell.arm.name if cell.arm.budget is None else f"{cell.arm.name} @ {cell.arm.budget // 1024} KiB"


def fingerprint(folder: Path) -> str:
    """Hash of what a model folder computes with: its description and its parts; notes of the training do not count."""
    digest = hashlib.sha256()
    files = [folder / "longtake.json", *(path for part in PARTS for path in (folder / part).rglob("*"))]
    for path in sorted(path for path in files if path.suffix in (".json", ".safetensors") and path.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

"""Checkpoint files (`.pt`/`.pth`, `.safetensors`, folders of shards), opened without reading a tensor, and which of
their sets of weights is taken."""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...digest import file_sha256
from ...errors import LongtakeError
from .wording import first_line, some


@dataclass(frozen=True)
class Weight:
    """A tensor of a file that is not read yet."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def open_checkpoint(path: Path, files: ExitStack) -> dict[str, Any]:
    """The file's (possibly nested) dict with `Weight` leaves; whatever is no tensor is kept as it is."""
    if path.is_dir():
        shards = _shards(path)
        return {name: weight for shard in shards for name, weight in _open_safetensors(shard, files).items()}
    if not path.is_file():
        raise LongtakeError(f"{path} does not exist; give a .pt, .pth or .safetensors file, or a folder of shards")
    if path.suffix == ".safetensors":
        return _open_safetensors(path, files)
    if path.suffix in (".pt", ".pth"):
        return _open_torch(path)
    raise LongtakeError(f"{path.name} is not a checkpoint longtake reads; give a .pt, .pth or .safetensors file")


def _open_safetensors(path: Path, files: ExitStack) -> dict[str, Any]:
    try:
        handle = files.enter_context(safe_open(path, framework="pt"))
        names = list(handle.keys())
        return {n: Weight(tuple(handle.get_slice(n).get_shape()), partial(handle.get_tensor, n)) for n in names}
    except (SafetensorError, OSError) as error:
        raise LongtakeError(
            f"{path.name} is no complete .safetensors file ({first_line(error)}); download it again"
        ) from None


def _open_torch(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):  # the directory of a zip stands at its end: a cut file has none
        raise LongtakeError(
            f"{path.name} is not a complete torch.save file (cut download, Git LFS pointer, or torch older than 1.6); "
            "download it again, or re-save it with a current torch"
        )
    try:
        tree = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise LongtakeError(
            f"{path.name} holds pickled Python objects besides tensors, which could run code, and was not loaded; "
            "if you trust its author, re-save only its state dict with torch.save or as .safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise LongtakeError(f"{path.name} cannot be read ({first_line(error)}); download it again") from None
    if not isinstance(tree, Mapping):
        raise LongtakeError(f"{path.name} holds a {type(tree).__name__}, not a dict of weights; give a state dict")
    return _lazy(tree)


def _lazy(tree: Mapping) -> dict[str, Any]:
    """The same dict with mapped tensors as `Weight`."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _lazy(value)
        return Weight(tuple(value.shape), lambda: value) if isinstance(value, torch.Tensor) else value

    return {str(name): leaf(value) for name, value in tree.items()}


def _shards(folder: Path) -> list[Path]:
    """The weight files of a sharded folder, those its index names if it has one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise LongtakeError(f"{folder} holds {len(indices)} weight indices; give the folder of one model")
    if not indices:
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise LongtakeError(f"{folder} holds no .safetensors file; give a checkpoint file or a folder of shards")
        return found
    weight_map = read_json(indices[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LongtakeError(f"{indices[0]} has no weight_map; download the folder again")
    named = sorted({folder / file for file in weight_map.values()})
    if missing := [path.name for path in named if not path.is_file()]:
        raise LongtakeError(f"{folder} lacks {some(missing)} named in its index; download the missing shards")
    return named


def choose(tree: dict[str, Any], source: Path, asked: bool | None, default: bool) -> tuple[dict[str, Any], bool | None]:
    """The generator's weights, and whether they are the averaged ones (None: the file holds one set only)."""
    outer = unwrap(_nested(tree), "model", "state_dict")
    sets = {name: outer[name] for name in ("generator", "generator_ema") if isinstance(outer.get(name), Mapping)}
    if not sets:
        if asked:
            raise LongtakeError(f"{source.name} has no EMA weights: it holds {some(list(outer))}; leave ema out")
        return outer, None
    want_ema = default if asked is None else asked
    wanted = "generator_ema" if want_ema else "generator"
    if wanted not in sets:
        kind, other = ("EMA", "ema=False (--no-ema)") if want_ema else ("non-EMA", "ema=True (--ema)")
        raise LongtakeError(
            f"{source.name} has no {kind} weights ({wanted!r}): it holds {some(list(outer))}; "
            f"pass {other} to take {next(iter(sets))!r}"
        )
    return unwrap(sets[wanted], "model", "state_dict"), want_ema


def _nested(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested sets of a flat file (`generator.blocks…`), as safetensors must spell them, made dicts again."""
    nested: dict[str, Any] = {}
    for name, value in tree.items():
        head, dot, rest = name.partition(".")
        if dot and head in ("generator", "generator_ema"):
            nested.setdefault(head, {})[rest] = value
        else:
            nested[name] = value
    return nested


def unwrap(tree: dict[str, Any], *names: str) -> dict[str, Any]:
    """Descend through the wrapping dicts called `names` until none is left."""
    while inner := next((name for name in names if isinstance(tree.get(name), Mapping)), None):
        tree = tree[inner]
    return tree


def sha256(path: Path) -> str:
    """Of the file; of a sharded folder, of the `sha256sum` listing of its shards."""
    if path.is_dir():
        listing = "".join(f"{sha256(shard)}  {shard.name}\n" for shard in _shards(path))
        return hashlib.sha256(listing.encode()).hexdigest()
    return file_sha256(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LongtakeError(f"{path} cannot be read ({first_line(error)}); download it again") from None
    if not isinstance(data, dict):
        raise LongtakeError(f"{path} is not a JSON object; download it again")
    return data

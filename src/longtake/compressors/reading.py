"""Reading a trained compressor from its folder; what is wrong with the folder is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..errors import LongtakeError, first_line
from .dual_branch import DualBranch

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_compressor(folder: str | Path, **options: Any) -> DualBranch:
    """The trained compressor of a folder: one that `longtake train compressor --out` wrote, its compressor/, or a model
    folder that brings one. `options` are those of diffusers' `from_pretrained`, such as `torch_dtype`.

    Raises LongtakeError for a folder that holds none, or none that is whole."""
    folder = Path(folder).expanduser()
    if not (folder / "config.json").exists() and (folder / "compressor").is_dir():
        folder = folder / "compressor"
    _check(folder)
    try:
        trained, report = DualBranch.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except LongtakeError as error:
        raise LongtakeError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # loaders raise anything from OSError to SafetensorError
        raise LongtakeError(f"{folder} cannot be read: {first_line(error)}") from error
    if absent := report["missing_keys"]:  # diffusers would go on with random values in their place
        raise LongtakeError(
            f"{folder} lacks {len(absent)} of its weights, {sorted(absent)[0]} among them, it is damaged: copy it "
            "again, or run its training again"
        )
    return trained.requires_grad_(False).eval()


def _check(folder: Path) -> None:
    """Everything diffusers would answer with advice that does not help here."""
    again = "copy it again, or run its training again"
    if not folder.is_dir():
        raise LongtakeError(f"no folder {folder}: give one that `longtake train compressor --out` wrote")
    if not (folder / "config.json").exists():
        if (folder / "work" / "compressor.pt").exists():
            raise LongtakeError(f"the training in {folder} is not finished: run it again, it goes on where it was")
        if folder.name == "compressor" and (folder.parent / "work" / "compressor.pt").exists():
            raise LongtakeError(f"the training in {folder.parent} is not finished: run it again")
        raise LongtakeError(
            f"{folder} holds no compressor: it has no config.json; give a folder that `longtake train compressor` wrote"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LongtakeError(f"{folder / 'config.json'} is damaged or not a compressor's: {again}") from error
    if kind != DualBranch.__name__:
        raise LongtakeError(f"{folder} holds no compressor: it is a {kind}")
    weights = folder / WEIGHTS
    if not weights.exists():
        raise LongtakeError(f"{folder} has no weights ({WEIGHTS}), it is half-written: {again}")
    try:
        with safe_open(weights, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError is no subclass of OSError
        raise LongtakeError(f"{weights} is damaged (cut short?): {again}") from error
    try:
        own = {name: tuple(p.shape) for name, p in DualBranch.from_config(_own(config)).state_dict().items()}
    except LongtakeError as error:
        raise LongtakeError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # whatever torch says of sizes that are none
        raise LongtakeError(f"{folder / 'config.json'} is damaged: {again}") from error
    for name in sorted(own.keys() & stored.keys()):
        if own[name] != stored[name]:
            raise LongtakeError(
                f"{folder}: {name} is {list(stored[name])} in its weights and {list(own[name])} by its config.json, "
                f"which do not belong together: {again}"
            )


def _own(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}

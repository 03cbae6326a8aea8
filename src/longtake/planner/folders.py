"""The shape of a model that is here, from the configurations and the headers of its files; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..errors import LongtakeError
from .lumos import LumosShape
from .request import ModelShape
from .skyreels import SkyReelsShape
from .vae import WanVae
from .wan import WanShape

PROMPT_TOKENS = 40  # of a prompt that is part of the sequence, about


def shape_of(folder: Path, name: str, run: Mapping[str, Any], itemsize: int) -> ModelShape:
    """The shape of a model folder that is run as `run` says (the settings of a longtake.json), with working numbers of
    `itemsize` bytes. Raises LongtakeError for a folder that lacks what is needed, and for a family that cannot be read
    this way."""
    return replace(_sizes(folder, name, run, itemsize), decay=run["decay"])


def _sizes(folder: Path, name: str, run: Mapping[str, Any], itemsize: int) -> ModelShape:
    host = run["host"]
    if host == "lumos":
        model = read(folder / "config.json")
        visual = (model.get("vocabulary") or {}).get("visual", model["vocab_size"] - LumosShape.visual_codes)
        codes = model["vocab_size"] - visual
        return LumosShape.of(name, model, run, itemsize=itemsize, codes=codes, text_tokens=PROMPT_TOKENS)
    if host not in ("wan", "skyreels"):
        raise LongtakeError(f"{name}: a folder of host {host!r} cannot be planned for; name a known model instead")
    vae = None
    if (folder / "vae").is_dir():
        vae = WanVae.of(read(folder / "vae" / "config.json"), parameters(folder / "vae"))
    common: dict[str, Any] = {
        "itemsize": itemsize, "vae": vae, "encoder_parameters": parameters(folder / "text_encoder"),
        "compressor_parameters": parameters(folder / "compressor"),
    }  # fmt: skip
    transformer = read(folder / "transformer" / "config.json")
    if host == "wan":
        frames, chunk = run["window"] or run["training_frames"], run["chunk_frames"]
        sink = min(chunk if run["sink"] is None else run["sink"], frames - chunk)
        return WanShape.of(name, transformer, run, own=f"window:frames={frames},sink={sink}", **common)
    windows = run["overlap"] is not None
    return SkyReelsShape.of(
        name, transformer, run, window=run["training_frames"] if windows else None, overlap=run["overlap"] or 0,
        lag=run["lag"], commit=run["commit"], **common,
    )  # fmt: skip


def parameters(folder: Path) -> int:
    """How many numbers the weight files of a folder hold; 0 without any."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                count += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        except Exception as error:  # SafetensorError is no subclass of anything
            raise LongtakeError(f"{path} cannot be read: {error}") from error
    return count


def read(path: Path) -> dict[str, Any]:
    """A configuration file. Raises LongtakeError if it is not there, or is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LongtakeError(f"{path}: not a readable configuration ({error})") from error
    if not isinstance(found, dict):
        raise LongtakeError(f"{path}: not a configuration, which is a JSON object")
    return found

"""MAGI-1 from files: the authors' own folders, or a longtake folder.

Published (`ckpt/` of the Hub repository):            longtake:
    magi/4.5B_distill/                                     longtake.json        "magi": how it is run
        inference_weight.distill/model*.safetensors        transformer/         config.json, weights
        *config.json      (of the code repository)         vae/  text_encoder/  tokenizer/
    vae/  t5/             (beside magi/, or inside)        special_tokens.npz
    special_tokens.npz    (of the code repository)

Weights have the same names in both, in one file or in shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...errors import LongtakeError
from ..base import CONFIG_NAME, HostConfig
from .host import MagiHost, host_config
from .model import MagiTransformer3DModel
from .schedule import BASE_4_5B, DISTILL_4_5B, MagiSettings
from .text import FILE, SpecialTokens
from .vae import MagiVAE

WEIGHTS = "inference_weight"


def is_magi(folder: Path) -> bool:
    """Whether a folder holds MAGI-1, in either layout."""
    if any(folder.glob(f"{WEIGHTS}*")):
        return True
    path = folder / CONFIG_NAME
    return path.is_file() and HostConfig.read(folder).host == "magi"


def load_magi(folder: Path, name: str, device: torch.device, dtype: torch.dtype, after_encoding: str) -> MagiHost:
    """A host from a folder. Raises LongtakeError for what is missing, unreadable or of another variant."""
    own = (folder / CONFIG_NAME).is_file()
    if own:
        config, settings = _own_settings(folder)
        weights, sizes = folder / "transformer", _json(folder / "transformer" / "config.json")
    else:
        weights = _published_weights(folder)
        settings, sizes, run = _published_settings(folder, weights)
        config = host_config(settings, run)
    transformer = _model(MagiTransformer3DModel, sizes, weights, dtype).to(device)
    vae = _beside(folder, "vae")
    encoder, tokenizer = _text_encoder(folder, dtype)
    special = None
    if settings.special_tokens and (path := _beside(folder, FILE)):
        special = SpecialTokens.read(path, settings.special_tokens)
    return MagiHost(
        transformer, settings, config, text_encoder=encoder, tokenizer=tokenizer, special=special, name=name,
        vae=None if vae is None else _model(MagiVAE, _json(vae / "config.json"), vae, dtype).to(device),
        after_encoding=after_encoding,
    )  # fmt: skip


def _own_settings(folder: Path) -> tuple[HostConfig, MagiSettings]:
    config = HostConfig.read(folder)
    try:
        settings = MagiSettings.of(_json(folder / CONFIG_NAME).get("magi", {}))
    except TypeError as error:
        raise LongtakeError(f'{folder / CONFIG_NAME}: "magi" is not readable ({error})') from error
    usual = host_config(settings)
    given = _json(folder / CONFIG_NAME)
    kept = {k: getattr(usual, k) for k in ("sampler", "steps", "lag", "kv_ranges", "sink") if k not in given}
    return replace(config, **kept), settings


def _published_weights(folder: Path) -> Path:
    found = sorted(path for path in folder.glob(f"{WEIGHTS}*") if path.is_dir())
    usable = [path for path in found if ".fp8" not in path.name]
    if not usable:
        raise LongtakeError(
            f"{folder} has {', '.join(p.name for p in found) or 'no weights'}: fp8 weights are not supported, use the "
            "4.5B_base or 4.5B_distill checkpoint"
        )
    return usable[0]


def _published_settings(folder: Path, weights: Path) -> tuple[MagiSettings, dict[str, Any], dict[str, Any]]:
    """From the authors' own configuration file, if one lies in the folder; else by the name of the weights."""
    files = sorted(folder.glob("*config.json"))
    if len(files) > 1:
        raise LongtakeError(f"{folder} has {len(files)} configuration files: leave the one that is meant")
    if not files:
        return (DISTILL_4_5B if "distill" in weights.name else BASE_4_5B), {}, {}
    settings, sizes, run = MagiSettings.published(files[0])
    if settings.distill != ("distill" in weights.name):
        raise LongtakeError(
            f"{files[0].name} is for {'distilled' if settings.distill else 'base'} weights, {weights.name} are not: "
            "take the configuration that belongs to them"
        )
    return settings, sizes, run


def _model(kind: type[nn.Module], sizes: dict[str, Any], folder: Path, dtype: torch.dtype) -> Any:
    """The model of a configuration with all its weights from a folder, nothing missing and nothing left over."""
    accepted = kind.__init__.__wrapped__.__code__.co_varnames if hasattr(kind.__init__, "__wrapped__") else ()
    try:
        with torch.device("meta"):
            model = kind(**{k: v for k, v in sizes.items() if k in accepted and k != "self"})
    except (TypeError, KeyError) as error:
        raise LongtakeError(f"{folder}: its configuration does not describe a {kind.__name__} ({error})") from error
    full = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for key, value in _tensors(folder):
        if key.endswith(("weight_scale", "input_scale")):
            raise LongtakeError(f"{folder}: fp8 weights are not supported, use the base or distill checkpoint")
        if key not in shapes or value.shape != shapes[key]:
            expected = f"it has {list(shapes[key])} there" if key in shapes else "it has no such weight"
            raise LongtakeError(f"{folder}: {key} {list(value.shape)} does not fit this {kind.__name__}, {expected}")
        state[key] = value.to(torch.float32 if full & set(key.split(".")) else dtype)
    if absent := sorted(set(shapes) - set(state)):
        raise LongtakeError(f"{folder} lacks {len(absent)} weights, {absent[0]} among them")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(_json(indices[0]).get("weight_map", {}).values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    packed = [path for path in (*files, *folder.glob("*.zst")) if path.suffix == ".zst" or not path.is_file()]
    if packed:
        if any(folder.glob("*.zst")):
            raise LongtakeError(f"{folder} has compressed shards: unpack them first, with `zstd -d *.zst`")
        raise LongtakeError(f"{folder} lacks {packed[0].name}, which its index names")
    if not files:
        raise LongtakeError(f"{folder} has no weights (*.safetensors)")
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield key, file.get_tensor(key)
        except Exception as error:  # SafetensorError is no subclass of anything
            if isinstance(error, LongtakeError):
                raise
            raise LongtakeError(f"{path} is not a readable safetensors file ({error})") from error


def _text_encoder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """T5 and its tokenizer, in one folder as published or in two; (None, None) if there are none."""
    from transformers import AutoTokenizer, T5EncoderModel

    home = folder / "text_encoder"
    if not home.is_dir():
        t5 = _beside(folder, "t5")
        inner = [] if t5 is None else [path.parent for path in sorted(t5.rglob("config.json"))]
        if not inner:
            return None, None
        home = inner[0]
    words = folder / "tokenizer" if (folder / "tokenizer").is_dir() else home
    try:
        encoder = T5EncoderModel.from_pretrained(home, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
    except Exception as error:  # loaders raise anything from OSError to SafetensorError
        raise LongtakeError(f"{home}: its text encoder cannot be loaded ({error})") from error
    return encoder.eval().requires_grad_(False), tokenizer


def _beside(folder: Path, name: str) -> Path | None:
    """A part of the model inside its folder, or where the published tree has it: beside `magi/`."""
    places = (folder / name, folder.parent / name, folder.parent.parent / name)
    return next((place for place in places if place.exists()), None)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not a table of names and values")
    except (OSError, ValueError) as error:
        raise LongtakeError(f"{path} is missing or not readable ({error})") from error
    return values

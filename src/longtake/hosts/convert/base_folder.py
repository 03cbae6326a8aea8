"""The base: the Wan model in diffusers format that lends its config, text encoder, VAE, tokenizer and scheduler."""

import os
import re
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from ...errors import LongtakeError
from .families import Family
from .reading import read_json
from .wording import first_line

_COMPONENTS = ("vae", "text_encoder", "tokenizer", "scheduler")
_SKYREELS = "SkyReelsV2Transformer3DModel"
_TRANSFORMER_CLASSES = ("WanTransformer3DModel", "CausalWanTransformer3DModel", _SKYREELS)


def locate(base: str | Path) -> Path:
    """The base's folder, downloaded if `base` is a Hub id, with every part this needs."""
    folder = Path(base)
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(base)):
        folder = _download(str(base))
    if not folder.is_dir():
        raise LongtakeError(f"base {base} is neither a folder nor a Hub id; give a Wan model in diffusers format")
    parts = ["model_index.json", "transformer/config.json", *_COMPONENTS]
    if missing := [part for part in parts if not (folder / part).exists()]:
        raise LongtakeError(f"base {base} lacks {', '.join(missing)}; give a complete Wan model in diffusers format")
    if (folder / "transformer_2").is_dir():
        raise LongtakeError(f"base {base} has two transformers (Wan2.2 A14B); give the model the checkpoint came from")
    return folder


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "transformer/config.json", *(f"{part}/*" for part in _COMPONENTS)]
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:  # besides its own errors, the Hub client lets those of its HTTP library through
        raise LongtakeError(
            f"base {repo} is no local folder and could not be downloaded ({first_line(error)}); "
            "check the name and the connection, or give a folder"
        ) from None


def skeleton(base: Path, family: Family) -> Any:
    """The transformer to be filled, without memory (meta tensors): the base's, or for a SkyReels-V2 checkpoint over a
    Wan base the same sizes in SkyReels-V2's class."""
    from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel

    path = base / "transformer" / "config.json"
    config = read_json(path)
    kind = config.get("_class_name")
    if kind not in _TRANSFORMER_CLASSES or (kind == _SKYREELS and family.skyreels is None):
        raise LongtakeError(f"base {base} holds a {kind}; give a Wan model (WanTransformer3DModel)")
    network = WanTransformer3DModel
    if family.skyreels is not None:
        network = SkyReelsV2Transformer3DModel
        own = {} if kind == _SKYREELS else {"inject_sample_info": "1.3b" in family.skyreels}
        config = {k: v for k, v in config.items() if k in signature(network).parameters} | own
    try:
        with torch.device("meta"):
            return network.from_config(config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise LongtakeError(f"{path} describes no Wan transformer ({first_line(error)}); restore the base") from None


def layout_of(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Meta tensors with the shape and dtype each weight is written with, in the model's order."""
    exact = set(model._keep_in_fp32_modules or ())
    return {
        name: tensor.to(torch.float32 if exact.intersection(name.split(".")) else dtype)
        for name, tensor in model.state_dict().items()
    }


def component_files(base: Path) -> list[tuple[Path, Path]]:
    """(file, path inside the model folder) of everything but the transformer and the pipeline index."""
    return [
        (Path(folder) / name, (Path(folder) / name).relative_to(base))
        for part in _COMPONENTS
        for folder, _, names in os.walk(base / part, followlinks=True)
        for name in sorted(names)
    ]


def pipeline_index(base: Path, family: Family) -> dict[str, Any]:
    """The base's model_index.json with the stock class: some publishers name a class that only their code has."""
    if family.skyreels is None:
        return read_json(base / "model_index.json") | {"transformer": ["diffusers", "WanTransformer3DModel"]}
    index = read_json(base / "model_index.json") | {"transformer": ["diffusers", _SKYREELS]}
    known = ("_diffusers_version", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")  # Wan's has more
    kept = {name: value for name, value in index.items() if name in known}
    return {"_class_name": "SkyReelsV2DiffusionForcingPipeline"} | kept

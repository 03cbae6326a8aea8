"""From a Lumos-1 folder, published or our own, to a host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...errors import LongtakeError, first_line
from ..base import CONFIG_NAME, HostConfig
from .fsq_tokenizer import FSQTokenizer
from .host import TEXT_TOKENIZER, Lumos
from .model import LumosForVideoGeneration
from .tokenizer import FILES, CosmosTokenizer, VideoTokenizer

REPOSITORY = "Alibaba-DAMO-Academy/Lumos-1"
OWN_TOKENIZER = "video_tokenizer"  # a folder beside the weights


def recognised(folder: Path) -> bool:
    """Whether a folder is laid out as Lumos-1 is published: a transformers folder of the Chameleon family."""
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type") == "chameleon"
    except (OSError, ValueError, AttributeError):
        return False


def published(name: str) -> HostConfig:
    """How a published checkpoint is run, by its folder's name."""
    large = "384p" in name
    images = "stage-1-image" in name
    return HostConfig(
        host="lumos", causal=True, sampler="masked", chunk_frames=1, steps=50, guidance_scale=16 if images else 15,
        fps=12, height=384 if large else 256, width=672 if large else 448, text_tokens=1024, training_frames=7,
        compat="upstream",
    )  # fmt: skip


def from_folder(
    folder: Path, name: str, device: torch.device, dtype: torch.dtype, *, tokenizer: str | Path | None = None,
    allow_torchscript: bool = False, fetch: bool = False,
) -> Lumos:  # fmt: skip
    """`fetch`: what the folder lacks may come from the Hub. Raises LongtakeError for anything that cannot be loaded."""
    own = (folder / CONFIG_NAME).exists()
    config = HostConfig.read(folder) if own else published(str(folder))
    codec = video_tokenizer(folder, tokenizer, allow_torchscript, device)
    try:
        model, report = LumosForVideoGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        if absent := report["missing_keys"]:  # transformers would go on with random values in their place
            raise LongtakeError(f"its files lack {len(absent)} of the weights, {sorted(absent)[0]} among them")
        if strange := report["mismatched_keys"]:
            raise LongtakeError(f"{len(strange)} of its weights have other sizes than config.json says")
    except Exception as error:  # loaders raise anything from OSError to SafetensorError
        raise LongtakeError(f"{folder} cannot be loaded: {first_line(error)}") from error
    model.eval().requires_grad_(False).to(device)
    return Lumos(model, config, tokenizer=text_tokenizer(folder, fetch), codec=codec, name=name)


def video_tokenizer(
    folder: Path, given: str | Path | None, allow_torchscript: bool, device: torch.device
) -> VideoTokenizer | None:
    """The one the user names, or the model's own; None if there is neither."""
    source = Path(given).expanduser() if given is not None else folder / OWN_TOKENIZER
    if given is None and not source.is_dir():
        return None
    if any((source / name).exists() for name in FILES):
        return CosmosTokenizer(source, allow=allow_torchscript, device=device)
    if not (source / "config.json").exists():
        raise LongtakeError(
            f"{source} is no video tokenizer: give the folder of Cosmos-Tokenizer-DV4x8x8 ({' and '.join(FILES)})"
        )
    try:
        codec = FSQTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:
        raise LongtakeError(f"{source} cannot be loaded: {first_line(error)}") from error
    return codec.eval().requires_grad_(False).to(device)


def text_tokenizer(folder: Path, fetch: bool) -> Any:
    """The folder's own, else the published one if it is at hand; None if it is not."""
    from transformers import AutoTokenizer

    if (folder / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    repository, revision = TEXT_TOKENIZER
    try:
        return AutoTokenizer.from_pretrained(repository, revision=revision, local_files_only=not fetch)
    except Exception:  # not in the Hub's cache: prompts will be refused, ids will do
        return None


def download(name: str) -> Path:
    """A folder of the published repository, e.g. `…/3B/stage-2-joint-384p`."""
    from huggingface_hub import snapshot_download

    inner = name.removeprefix(REPOSITORY).strip("/")
    if not inner:
        raise LongtakeError(f"{name} holds several models: name one, e.g. {REPOSITORY}/3B/stage-2-joint-384p")
    try:
        return Path(snapshot_download(REPOSITORY, allow_patterns=[f"{inner}/*"])) / inner
    except Exception as error:
        raise LongtakeError(f"{name} cannot be fetched from the Hub: {first_line(error)}") from error

"""`convert`, from beginning to end: read, match, write."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ...errors import LongtakeError
from ..base import HostConfig
from .base_folder import component_files, layout_of, locate, pipeline_index, skeleton
from .families import Family, family_of
from .lora import merge_lora
from .matching import match
from .reading import choose, open_checkpoint, sha256, unwrap
from .staging import Staging, check_out
from .writing import check_space, copy_components, write_json, write_transformer

_ALWAYS = {  # what longtake.json says even where it is usual
    "format", "host", "causal", "chunk_frames", "timesteps", "shift", "guidance_scale", "fps", "height", "width",
    "text_tokens", "training_frames", "window", "sink",
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def convert(
    source: str | Path,
    out: str | Path,
    base: str | Path,
    *,
    family: str | None = None,
    ema: bool | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    dtype: str | torch.dtype = "bfloat16",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `out`, a diffusers-format model folder, from the published checkpoint `source`.

    Peak memory is one output shard (at most 2 GB) plus a few weights in fp32; 2.4 GB measured for 1.3B. `source` is
    memory-mapped, read one tensor at a time and never unpickled beyond tensors. `out` takes the transformer at `dtype`
    (1.3B in bf16: 2.8 GB); the base's large files are hard-linked where the file system allows it, else copied.

    Args:
        source: `.pt`/`.pth`, `.safetensors`, or a folder of sharded `.safetensors`; original Wan or diffusers names.
        out: folder to create.
        base: the Wan model it was distilled into, in diffusers format: a folder, or a Hub id to download (all but its
            transformer weights).
        family: one of `FAMILIES`; by default read from the file's name, when that names exactly one.
        ema: take `generator_ema` (True) or `generator` (False); by default what the family's authors sample from.
            A file with a single set of weights has no such choice.
        lora: adapter to merge (peft names): `W += lora_scale · B @ A`, in fp32.
        lora_scale: alpha / rank of that adapter; 1 for LongLive.
        dtype: `bfloat16`, `float16` or `float32`. Weights that diffusers keeps in fp32 are written in fp32.
        overwrite: replace `out` if an earlier conversion wrote it.

    Returns:
        What was done, ready for JSON: tensors, parameters, bytes, shards, family, ema (None: the file had one set of
        weights), merged LoRA layers, a note on the family.

    Raises:
        LongtakeError: an input is missing, unreadable or does not fit the base; `out` is in the way; the disk is full.
            `out` is then as it was before.
    """
    source, out = Path(source), Path(out)
    lora = None if lora is None else Path(lora)
    dtype = _dtype(dtype)
    check_out(out, overwrite, inputs=[source, Path(base), *([lora] if lora else [])])
    name, preset = family_of(source, family)
    with ExitStack() as files:
        weights, ema_used = choose(open_checkpoint(source, files), source, asked=ema, default=preset.ema)
        adapter = unwrap(open_checkpoint(lora, files), "generator_lora", "state_dict", "model") if lora else {}
        base_folder = locate(base)
        model = skeleton(base_folder, preset)
        layout = layout_of(model, dtype)
        tensors = match(weights, layout, source)
        merged = merge_lora(adapter, tensors, lora_scale, lora) if lora else {}
        components, index = component_files(base_folder), pipeline_index(base_folder, preset)
        check_space(out, layout, components)
        origin: dict[str, Any] = {"file": source.name, "sha256": sha256(source), "family": name, "ema": ema_used}
        if lora:
            origin["lora"] = {"file": lora.name, "sha256": sha256(lora), "scale": lora_scale}
        with Staging(out) as folder:
            shards = write_transformer(folder / "transformer", model, layout, tensors | merged)
            copy_components(folder, components)
            write_json(folder / "model_index.json", index)
            write_json(folder / "longtake.json", _description(preset, origin))
    return {
        "out": str(out),
        "base": str(base),
        "host": preset.host,
        "family": name,
        "ema": ema_used,
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(layout),
        "parameters": sum(t.numel() for t in layout.values()),
        "bytes": sum(t.nbytes for t in layout.values()),
        "shards": shards,
        "lora_layers": len(merged),
        "note": preset.note,
    }


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise LongtakeError(f"dtype {dtype} is not supported; give one of {', '.join(DTYPES)}")
    return found


def _description(preset: Family, origin: dict[str, Any]) -> dict[str, Any]:
    """`longtake.json`: how a host runs the family, and where these weights came from."""
    settings, usual = preset.config().as_dict(), HostConfig().as_dict()
    kept = {name: value for name, value in settings.items() if name in _ALWAYS or value != usual.get(name)}
    return kept | {"source": origin}

"""`longtake convert`: a published checkpoint into a model folder."""

from __future__ import annotations

from ..errors import LongtakeError
from . import options
from .shell import answer, bytes_text, hush


def convert(
    source: options.Source,
    out: options.ModelFolder,
    base: options.Base,
    family: options.Family = None,
    ema: options.Ema = None,
    lora: options.Lora = None,
    dtype: options.ConvertDtype = "bfloat16",
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Turn a published few-step causal Wan checkpoint into a folder that `--model` and diffusers load."""
    if not source.exists():  # before anything is said about its name
        raise LongtakeError(f"{source} does not exist; give a .pt, .pth or .safetensors file, or a folder of shards")

    from ..hosts.convert import convert as make

    hush()
    result = make(source, out, base, family=family, ema=ema, lora=lora, dtype=dtype, overwrite=overwrite)
    text = (
        f"{result['out']}: {result['family']}, {result['parameters'] / 1e6:.4g} M parameters in {result['dtype']}, "
        f"{bytes_text(result['bytes'])}"
    )
    if result["lora_layers"]:
        text += f", {result['lora_layers']} LoRA layers merged"
    if result["note"]:
        text += f"\nnote: {result['note']}"
    answer(result, text, as_json)

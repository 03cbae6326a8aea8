"""Published few-step causal Wan checkpoints (`.pt`, `.safetensors`) into a diffusers-format folder that longtake loads.

Self-Forcing and its descendants publish one network: the Wan2.1 transformer under the original repository's names. Its
text encoder, VAE and sizes are Wan's own, so a conversion is: pick the right weights in the file, rename them, merge a
LoRA if there is one, check every name and shape against the base model's config, and write

    out/  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  model_index.json  longtake.json

`longtake.json` holds what no weight file says: chunk length, timesteps, shift, window. It is built next to `out` and
renamed at the end, so `out` is either complete or absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .families import FAMILIES, Family
from .names import diffusers_name

if TYPE_CHECKING:
    from .conversion import DTYPES, convert

__all__ = ["DTYPES", "FAMILIES", "Family", "convert", "diffusers_name"]


def __getattr__(name: str) -> Any:
    if name not in ("DTYPES", "convert"):  # these alone need torch and safetensors; loading reads the families only
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import conversion

    return getattr(conversion, name)

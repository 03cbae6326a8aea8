"""A LoRA in peft's names, merged into the weights it was trained on: `W += scale · B @ A`."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import LongtakeError
from .names import bare, diffusers_name
from .reading import Weight
from .wording import some

_LORA_NAME = re.compile(r"(?:base_model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def merge_lora(adapter: dict[str, Any], tensors: dict[str, Weight], scale: float, lora: Path) -> dict[str, Weight]:
    """The weights the adapter changes, to be merged as they are read; each of its keys must fit one of `tensors`."""
    pairs: dict[str, dict[str, Weight]] = {}
    unmatched = []
    for name, value in adapter.items():
        found = _LORA_NAME.fullmatch(bare(name))
        layer = f"{found['layer']}.weight" if found else ""
        target = layer if layer in tensors else diffusers_name(layer)
        sides = pairs.setdefault(target, {}) if target in tensors and isinstance(value, Weight) else None
        if not found or sides is None or found["side"] in sides:
            unmatched.append(name)
        else:
            sides[found["side"]] = value
    unmatched += [f"{name} has only lora_{next(iter(sides))}" for name, sides in pairs.items() if len(sides) == 1]
    if unmatched or not pairs:
        what = f"{len(unmatched)} keys that fit no layer ({some(unmatched)})" if unmatched else "no LoRA keys"
        raise LongtakeError(f"{lora.name} has {what}; give a peft LoRA (lora_A/lora_B) trained on this model")
    merged = {}
    for name, sides in pairs.items():
        weight, a, b = tensors[name], sides["A"], sides["B"]
        fits = len(a.shape) == len(b.shape) == 2 and b.shape[1] == a.shape[0]
        if not fits or (b.shape[0], a.shape[1]) != weight.shape:
            raise LongtakeError(
                f"{lora.name} does not fit: B {list(b.shape)} @ A {list(a.shape)} for {name} {list(weight.shape)}; "
                "give the LoRA of this model size"
            )
        merged[name] = Weight(weight.shape, partial(_merged, weight, a, b, scale))
    return merged


def _merged(weight: Weight, a: Weight, b: Weight, scale: float) -> torch.Tensor:
    """W [out, in] + scale · B [out, r] @ A [r, in], in fp32."""
    return weight.read().float() + scale * (b.read().float() @ a.read().float())

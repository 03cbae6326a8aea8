"""A file's weights laid over the base's: every name and shape fits, or an error names what does not."""

from pathlib import Path
from typing import Any

import torch

from ...errors import LongtakeError
from .names import bare, diffusers_name
from .reading import Weight
from .wording import some


def match(weights: dict[str, Any], layout: dict[str, torch.Tensor], source: Path) -> dict[str, Weight]:
    """Every weight of the base under its diffusers name, or an error that names what does not fit."""
    named = [(bare(name), value) for name, value in weights.items()]
    named = [(name, value) for name, value in named if not _is_table(name)]
    renamed = any(name.startswith("condition_embedder.") for name, _ in named)
    tensors: dict[str, Weight] = {}
    unknown, twice = [], []
    for name, value in named:
        target = name if renamed else diffusers_name(name)
        if target not in layout or not isinstance(value, Weight):
            unknown.append(name)
        elif target in tensors:
            twice.append(name)
        else:
            tensors[target] = value
    missing = [name for name in layout if name not in tensors]
    problems = [
        f"{len(names)} {what} ({some(names)})"
        for what, names in (("unknown keys", unknown), ("missing keys", missing), ("repeated keys", twice))
        if names
    ]
    if problems:
        raise LongtakeError(
            f"{source.name} does not fit the base: {', '.join(problems)}; "
            "give a Wan generator checkpoint and the base of the same model"
        )
    wrong = [
        f"{name} is {list(tensor.shape)}, the base says {list(layout[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != layout[name].shape
    ]
    if wrong:
        raise LongtakeError(
            f"{source.name} has {len(wrong)} tensors of another size: {some(wrong)}; give the base it was trained from"
        )
    return tensors


def _is_table(name: str) -> bool:
    """Precomputed rotary tables: not weights, rebuilt by the model."""
    return any(part == "rope" or part.startswith("freqs") for part in name.split("."))

"""Models with random weights: what time and memory ask for are sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def drawn(make: Callable[[], Any], device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """What `make` builds, its weights drawn on `device` from `seed`, in `dtype` but for the parts that from_pretrained
    keeps in fp32; to be run, not trained."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model = make()
    for name, parameter in model.named_parameters():
        if not any(island in name for island in model._keep_in_fp32_modules or ()):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)

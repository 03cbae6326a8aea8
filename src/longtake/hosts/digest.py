"""What a model's weights are known by, whatever folder they came from."""

from __future__ import annotations

import hashlib

import torch

LOOKED_AT = 16  # elements of each parameter


def weights_digest(module: torch.nn.Module) -> str:
    """Sixteen hexadecimal digits that go by names and shapes of the parameters and by a few elements of each: enough to
    tell two models apart, in milliseconds for billions of weights.

    Elements are rounded to bfloat16 first, so that a model is the same on any device, loaded in float32 or bfloat16."""
    digest = hashlib.sha256()
    parameters = sorted(
        ((name.replace("_orig_mod.", ""), p.detach()) for name, p in module.named_parameters()),
        key=lambda pair: pair[0],
    )
    for name, p in parameters:
        digest.update(f"{name} {tuple(p.shape)}\n".encode())
        n = p.numel()
        places = [i * n // LOOKED_AT for i in range(LOOKED_AT)] if n > LOOKED_AT else list(range(n))
        seen = p[tuple(torch.unravel_index(torch.tensor(places, device=p.device), p.shape))] if p.dim() else p[None]
        digest.update(seen.to(torch.bfloat16).to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]

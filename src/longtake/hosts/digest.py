"""What a network is known by: a digest of a few of its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

EACH = 16  # elements of a parameter that are looked at


def weights_digest(network: nn.Module) -> str:
    """Sixteen hexadecimal digits of a network's parameters: names, shapes, and evenly spaced elements of each, the ends
    among them; milliseconds for billions of weights. Rounded to bf16, so that the same weights loaded in fp32 and in
    bf16, compiled or not, on whatever device, have the same."""
    digest = hashlib.sha256()
    named = {name.replace("_orig_mod.", ""): weight for name, weight in network.named_parameters()}
    for name, weight in sorted(named.items()):
        digest.update(f"{name} {list(weight.shape)} ".encode())
        n, last = min(EACH, weight.numel()), max(0, weight.numel() - 1)
        places = [i * last // max(1, n - 1) for i in range(n)]  # not in floats, which round as their device does
        at = torch.tensor(places, dtype=torch.long, device=weight.device)
        digest.update(weight.detach().reshape(-1)[at].to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

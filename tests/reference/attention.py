"""Attention as the textbook has it: one softmax per head over all keys, in fp64."""

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """q [B, Nq, Hq, D], k and v [B, Nk, Hk, D], bias [Nk] → output [B, Nq, Hq, D], weights [B, Hq, Nq, Nk], fp64."""
    q, k, v = q.double(), k.double(), v.double()
    outs, weights = [], []
    for head in range(q.shape[2]):
        shared = head * k.shape[2] // q.shape[2]
        logits = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / q.shape[-1] ** 0.5  # [B, Nq, Nk]
        logits = logits if bias is None else logits + bias.double()
        if causal:
            later = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(later, -torch.inf)
        weights.append(logits.softmax(-1))
        outs.append(weights[-1] @ v[:, :, shared])
    return torch.stack(outs, 2), torch.stack(weights, 1)

"""FlowCache's two scores as they are written down: with the whole logits, and with the whole cosine matrix."""

import torch
from torch import Tensor


def dense_importance(q: Tensor, k: Tensor) -> Tensor:
    """[B, Hk, Nk] of queries [B, Nq, Hq, D] and keys [B, Nk, Hk, D]."""
    grouped = q.double().unflatten(2, (k.shape[2], -1))  # [B, Nq, Hk, G, D]
    logits = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k.double()).amax(2) / k.shape[-1] ** 0.5
    return logits.softmax(-1).mean(2).float()


def dense_redundancy(k: Tensor) -> Tensor:
    """[B, Hk, Nk] of keys [B, Nk, Hk, D]: softmax of the mean cosine with all others, itself left out."""
    unit = torch.nn.functional.normalize(k.double(), dim=-1)
    cosine = torch.einsum("bihd,bjhd->bhij", unit, unit)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    return cosine.mean(2).softmax(-1).float()

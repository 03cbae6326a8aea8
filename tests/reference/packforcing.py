"""The score of PackForcing's Eq. 11 as it is written: a double sum over queries and keys, in fp64."""

import torch
from torch import Tensor


def block_scores(q: Tensor, k: Tensor) -> Tensor:
    """q [B, N, Hq, D], keys of M blocks k [B, M, n, Hk, D] → [B, M] fp64."""
    q, k = q.double(), k.double()
    scores = torch.zeros(k.shape[:2], dtype=torch.float64)
    for head in range(q.shape[2]):
        shared = head * k.shape[3] // q.shape[2]
        scores += torch.einsum("bqd,bmnd->bm", q[:, :, head], k[:, :, :, shared]) / q.shape[-1] ** 0.5
    return scores

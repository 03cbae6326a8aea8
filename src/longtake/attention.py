"""The one attention call, and the arithmetic of attention in parts: log-sum-exp, merging, mass per segment.

Shapes: queries [B, Nq, Hq, D], keys and values [B, Nk, Hk, D]; Hq is a multiple of Hk (grouped-query attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Attention output [B, Nq, Hq, D]. `bias` [Nk] is added to the logits of each key (a log-weight).

    `backend` names one of diffusers' attention backends (what `set_attention_backend` chose); None is torch's SDPA.
    """
    mask = None if bias is None else bias.to(q.dtype)[None, None, None]
    if backend is not None or parallel_config is not None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2],
            backend=backend, parallel_config=parallel_config,
        )  # fmt: skip
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def logits(q: Tensor, k: Tensor) -> Tensor:
    """Scaled logits in fp32, [B, Hq, Nq, Nk]."""
    groups = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(groups, 2) if groups > 1 else k
    return torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, query_block: int = 256) -> tuple[Tensor, Tensor]:
    """Attention output [B, Nq, Hq, D] and log-sum-exp of its logits [B, Nq, Hq], fp32, in query blocks."""
    groups = q.shape[2] // k.shape[2]
    values = v.float().repeat_interleave(groups, 2) if groups > 1 else v.float()
    outs, sums = [], []
    for rows in q.split(query_block, 1):
        scores = logits(rows, k)
        sums.append(scores.logsumexp(-1).transpose(1, 2))
        outs.append(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values))
    return torch.cat(outs, 1), torch.cat(sums, 1)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the concatenation of the parts' keys, from each part's (output, log-sum-exp). Exact."""
    lse = torch.stack([lse for _, lse in parts])  # [parts, B, Nq, Hq]
    total = lse.logsumexp(0)
    weights = (lse - total).exp().unsqueeze(-1)
    return (weights * torch.stack([out for out, _ in parts])).sum(0), total


def segment_mass(q: Tensor, k: Tensor, lengths: Sequence[int], query_block: int = 256) -> Tensor:
    """Attention mass of each run of `lengths` consecutive keys, mean over queries: [B, Hq, segments], sums to 1."""
    if sum(lengths) != k.shape[1]:
        raise ValueError(f"segments cover {sum(lengths)} keys, there are {k.shape[1]}")
    total = q.new_zeros(q.shape[0], q.shape[2], len(lengths), dtype=torch.float32)
    for rows in q.split(query_block, 1):
        scores = logits(rows, k)
        weights = torch.stack([part.logsumexp(-1) for part in scores.split(list(lengths), -1)], -1)
        total += weights.softmax(-1).sum(2)
    return total / q.shape[1]

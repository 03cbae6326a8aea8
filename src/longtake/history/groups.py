"""Heads of one layer that see different keys: one dense attention for all that see the same, no mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import attend
from ..plan import HistoryShape

Group = tuple[Tensor, Tensor]  # numbers of (take, head) pairs [P], numbers of the keys they see [n]


def head_groups(
    limited: Sequence[tuple[range, Tensor]], keys: int, shape: HistoryShape, device: torch.device
) -> list[list[Group]]:
    """Per layer, the (take, head) pairs that see the same keys. `limited` are runs of keys with [L, B, H] bool of who
    sees them; everything else of the `keys` keys is seen by all."""
    masks = torch.stack([mask.expand(shape.layers, shape.batch, shape.kv_heads).cpu() for _, mask in limited])
    pattern = (masks.flatten(2) * 2 ** torch.arange(len(limited))[:, None, None]).sum(0)  # [L, B · H]
    seen: dict[int, Tensor] = {}
    layers = []
    for row in pattern:
        groups = []
        for code in row.unique().tolist():
            if code not in seen:
                visible = torch.ones(keys, dtype=torch.bool)
                for bit, (run, _) in enumerate(limited):
                    visible[run.start : run.stop] = bool(code >> bit & 1)
                seen[code] = visible.nonzero()[:, 0].to(device)
            groups.append(((row == code).nonzero()[:, 0].to(device), seen[code]))
        layers.append(groups)
    return layers


def attend_in_groups(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], *, bias: Tensor | None = None, backend: object = None
) -> Tensor:
    """`attend` where each group of (take, head) pairs sees its own keys: q [B, N, Hq, D] → [B, N, Hq, D]."""
    batch, heads = k.shape[0], k.shape[2]
    split = lambda x: x.unflatten(2, (heads, -1)).permute(0, 2, 1, 3, 4).flatten(0, 1)  # [B · H, N, q heads per k, D]
    queries, keys, values = split(q), split(k), split(v)
    out = torch.empty_like(queries)
    for pairs, seen in groups:
        at = (pairs[:, None], seen[None])
        out[pairs] = attend(
            queries[pairs], keys[at], values[at], bias=None if bias is None else bias[seen], backend=backend
        )
    return out.unflatten(0, (batch, heads)).permute(0, 2, 1, 3, 4).flatten(2, 3)

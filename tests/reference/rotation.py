"""Rotation, one pair of channels after the other, as a complex product in fp64."""

import torch
from torch import Tensor

from longtake.rope import RotaryTable


def rotate(table: RotaryTable, x: Tensor, position: Tensor) -> Tensor:
    """x [B, N, H, D], position [N, axes] or [B, N, H, axes] → fp64 [B, N, H, D]."""
    position = position[:, None] if position.dim() == 2 else position
    out = x.double().clone()
    for pair in range(table.pairs):
        a, b = (2 * pair, 2 * pair + 1) if table.pairing == "interleaved" else (pair, pair + table.pairs)
        angle = position[..., table.axis[pair]].double() * table.frequency[pair]
        turned = torch.complex(x[..., a].double(), x[..., b].double()) * torch.exp(1j * angle)
        out[..., a], out[..., b] = turned.real, turned.imag
    return out

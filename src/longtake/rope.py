"""One table-driven rotary layout for every model.

`angle[token, pair] = position[token, axis[pair]] · frequency[pair]`; the pairing says which two channels a pair turns.
Positions are numbers, not rows of a table, so there is no longest video. Angles are computed in fp64 (an fp32 angle is
off by a visible amount near position 1e5), the rotation itself in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import LongtakeError

Pairing = Literal["interleaved", "half"]


@dataclass(frozen=True)
class RotaryTable:
    """Which axis and which frequency turn each channel pair of a head.

    `interleaved` pairs channels (2j, 2j+1), `half` pairs (j, j + P), P being the number of pairs. Channels from 2P on
    are left alone (MAGI-1 rotates 96 of 128).
    """

    axis: tuple[int, ...]  # P entries
    frequency: tuple[float, ...]  # P entries, radians per position
    pairing: Pairing
    axes: int = 3

    @property
    def pairs(self) -> int:
        return len(self.axis)

    def phases(self, position: Tensor) -> Tensor:
        """Unit phasors of tokens at `position` [..., axes] (fp64): fp32 [..., P, 2], cosine then sine."""
        frequency = torch.tensor(self.frequency, dtype=torch.float64, device=position.device)
        axis = torch.tensor(self.axis, device=position.device)
        angle = position.double().index_select(-1, axis) * frequency  # [..., P]
        return torch.stack((angle.cos(), angle.sin()), -1).float()

    def rotate(self, x: Tensor, phases: Tensor, out: Tensor | None = None) -> Tensor:
        """Turn `x` [B, N, H, D] by `phases` [N, P, 2] (shared by heads) or [B, N, H, P, 2]; the result has x's dtype.

        `out`, if given, receives the result (its dtype); it is `x` itself or does not overlap it.
        """
        if phases.dim() == 3:
            phases = phases.unsqueeze(1)  # [N, 1, P, 2]: broadcast over heads
        if self.pairing == "half":
            return _rotate_half(x, phases, self.pairs, out)
        return _rotate_interleaved(x, phases, self.pairs, out)


def _rotate_interleaved(x: Tensor, phases: Tensor, pairs: int, out: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():  # inductor has no complex kernels
        cos, sin = phases.unbind(-1)
        a, b = x[..., : 2 * pairs].float().unflatten(-1, (pairs, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:  # one complex product: a third of the memory passes of the real form
        turn = torch.view_as_complex(phases)
        if out is not None and x.dtype == out.dtype == torch.float32 and x.stride(-1) == 1 and 2 * pairs == x.shape[-1]:
            source, target = (torch.view_as_complex(y.unflatten(-1, (pairs, 2))) for y in (x, out))
            torch.mul(source, turn, out=target)
            return out
        head = x[..., : 2 * pairs].float().contiguous().unflatten(-1, (pairs, 2))
        turned = torch.view_as_real(torch.view_as_complex(head) * turn).flatten(-2)
    return _assemble(turned, x, pairs, out)


def _rotate_half(x: Tensor, phases: Tensor, pairs: int, out: Tensor | None) -> Tensor:
    cos, sin = phases.unbind(-1)
    a, b = x[..., :pairs].float(), x[..., pairs : 2 * pairs].float()
    turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return _assemble(turned, x, pairs, out)


def _assemble(turned: Tensor, x: Tensor, pairs: int, out: Tensor | None) -> Tensor:
    whole = 2 * pairs == x.shape[-1]
    if out is None:
        turned = turned.to(x.dtype)
        return turned if whole else torch.cat((turned, x[..., 2 * pairs :]), -1)
    out[..., : 2 * pairs].copy_(turned)
    if not whole:
        out[..., 2 * pairs :].copy_(x[..., 2 * pairs :])
    return out


def wan_table(head_dim: int, theta: float = 10000.0) -> RotaryTable:
    """Wan2.1 (and SkyReels-V2): interleaved pairs, each axis with a whole frequency ladder of its own; height and width
    get ⌊head_dim/6⌋ pairs each, time the rest (22/21/21 of 64)."""
    side = head_dim // 6
    counts = (head_dim // 2 - 2 * side, side, side)
    axis = tuple(a for a, n in enumerate(counts) for _ in range(n))
    frequency = tuple(theta ** (-j / n) for n in counts for j in range(n))
    return RotaryTable(axis, frequency, "interleaved")


def mm_rope_table(head_dim: int, theta: float = 10000.0) -> RotaryTable:
    """MM-RoPE (Lumos-1): halves paired, one frequency ladder over the whole head, its pairs dealt to time, height and
    width 2:3:3 with period 16. Raises LongtakeError for a head that the period does not divide."""
    if head_dim % 32:
        raise LongtakeError(f"MM-RoPE needs heads of a multiple of 32 channels, this model's have {head_dim}")
    period = (0, 0, 0, 0, *((1, 1, 2, 2) * 3))
    pairs = range(head_dim // 2)
    return RotaryTable(tuple(period[i % 16] for i in pairs), tuple(theta ** (-2 * i / head_dim) for i in pairs), "half")

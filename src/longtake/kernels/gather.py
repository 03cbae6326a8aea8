"""Gather and rotate in one pass over the bytes: every number is read once, as a code or as it was computed, and written
once, where PyTorch reads and writes keys two or three times (gather, scale, turn)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rope import RotaryTable

TOKENS = 32  # a program's


@triton.jit
def channels(c, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two channels of each of D / 2 pairs; those that no frequency turns are paired too, under a phase of 1."""
    if INTERLEAVED:
        first, second = 2 * c, 2 * c + 1
    else:
        first, second = tl.where(c < PAIRS, c, c + PAIRS), tl.where(c < PAIRS, c + PAIRS, c + HALF)
    return first, second


@triton.jit
def _gather_rotate(
    source, scale, rows, phases, out, n,
    heads, source_take, source_row, source_head, scale_take, scale_row, rows_take, phases_take, phases_token,
    out_take, out_token, out_head,
    PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, SCALED: tl.constexpr, TURNED: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    take, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = i < n
    row = tl.load(rows + take * rows_take + i, mask=there, other=0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    first, second = channels(c, PAIRS, HALF, INTERLEAVED)
    inside = there[:, None] & (c < HALF)[None]
    at = source + take.to(tl.int64) * source_take + (row * source_row)[:, None] + head * source_head
    x = tl.load(at + first[None], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(at + second[None], mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        s = tl.load(scale + take.to(tl.int64) * scale_take + row * scale_row + head, mask=there, other=0.0)
        x, y = x * s[:, None], y * s[:, None]
    if TURNED:
        phase = phases + take.to(tl.int64) * phases_take + (i * phases_token)[:, None] + 2 * c[None]
        turned = there[:, None] & (c < PAIRS)[None]
        cos, sin = tl.load(phase, mask=turned, other=1.0), tl.load(phase + 1, mask=turned, other=0.0)
        x, y = x * cos - y * sin, x * sin + y * cos
    to = out + take.to(tl.int64) * out_take + (i.to(tl.int64) * out_token)[:, None] + head * out_head
    tl.store(to + first[None], x.to(out.dtype.element_ty), mask=inside)
    tl.store(to + second[None], y.to(out.dtype.element_ty), mask=inside)


def launch(
    source: Tensor, scale: Tensor | None, rows: Tensor, phases: Tensor | None, rotary: RotaryTable, out: Tensor
) -> None:
    """See `kernels.gather_rotate`."""
    takes, n, heads, dim = out.shape
    if not n:
        return
    half = dim // 2
    turn = rows.new_zeros(1, dtype=torch.float32) if phases is None else phases.contiguous()
    per_take = phases is not None and phases.dim() == 5
    # of what is not there, any tensor: it is never read
    scales = turn if scale is None else scale
    _gather_rotate[(triton.cdiv(n, TOKENS), takes * heads)](
        source, scales, rows, turn, out, n,
        heads, source.stride(0), source.stride(1), source.stride(2),
        0 if scale is None else scale.stride(0), 0 if scale is None else scale.stride(1),
        rows.stride(0) if rows.dim() == 2 else 0, turn.stride(0) if per_take else 0, 2 * rotary.pairs,
        out.stride(0), out.stride(1), out.stride(2),
        PAIRS=rotary.pairs, HALF=half, INTERLEAVED=rotary.pairing == "interleaved", SCALED=scale is not None,
        TURNED=phases is not None, TOKENS=TOKENS, CHANNELS=triton.next_power_of_2(half),
    )  # fmt: skip

"""Attention that reads a quantised past where it lies: no view is built, a byte of history is read once per block of
queries.

Rotation is linear, so a key's scale comes after the product with the query, and a value's scale goes into its weight:

    logit = scale_k · (turn(code_k) · q) / √D          output = Σ (weight · scale_v) · code_v
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..rope import RotaryTable
from .gather import channels

QUERIES, KEYS = 64, 64  # a program's queries, and the keys it sees at a time
LEAST = 16  # channels of a tile that tensor cores multiply


@triton.jit
def _softmaxed(logit, seen, top, total, acc):
    """One step of the running softmax: weights of these keys, and what came before under the new maximum."""
    logit = tl.where(seen[None], logit, float("-inf"))
    new = tl.maximum(top, tl.max(logit, 1))
    fade = tl.exp2(top - new)
    weight = tl.exp2(logit - new[:, None])
    return weight, new, total * fade + tl.sum(weight, 1), acc * fade[:, None]


@triton.jit
def _attend(
    q, k, v, k_scale, v_scale, rows, phases, k_tail, v_tail, out, factor, queries, past, tail, heads, groups,
    q_take, q_token, q_head, store_take, store_row, store_head, scale_take, scale_row,
    tail_take, tail_token, tail_head, out_take, out_token, out_head,
    PAIRS: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    take, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    kv_head = head // groups
    number = q.dtype.element_ty
    c, d = tl.arange(0, CHANNELS), tl.arange(0, WIDTH)
    first, second = channels(c, PAIRS, HALF, INTERLEAVED)
    half, whole = (c < HALF)[None], (d < DIM)[None]

    i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    asked = (i < queries)[:, None]
    at = q + take * q_take + (i.to(tl.int64) * q_token)[:, None] + head * q_head
    qx = tl.load(at + first[None], mask=asked & half, other=0.0)
    qy = tl.load(at + second[None], mask=asked & half, other=0.0)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)

    for start in range(0, past, KEYS):
        j = start + tl.arange(0, KEYS)
        seen = j < past
        row = tl.load(rows + j, mask=seen, other=0).to(tl.int64)
        place = take * store_take + (row * store_row)[:, None] + kv_head * store_head
        x = tl.load(k + place + first[None], mask=seen[:, None] & half, other=0.0).to(tl.float32)
        y = tl.load(k + place + second[None], mask=seen[:, None] & half, other=0.0).to(tl.float32)
        phase = phases + (j * 2 * PAIRS)[:, None] + 2 * c[None]
        turned = seen[:, None] & (c < PAIRS)[None]
        cos, sin = tl.load(phase, mask=turned, other=1.0), tl.load(phase + 1, mask=turned, other=0.0)
        kx, ky = (x * cos - y * sin).to(number), (x * sin + y * cos).to(number)
        logit = tl.dot(qx, tl.trans(kx), input_precision=PRECISION)
        logit += tl.dot(qy, tl.trans(ky), input_precision=PRECISION)
        scales = take * scale_take + row * scale_row + kv_head
        logit *= factor * tl.load(k_scale + scales, mask=seen, other=0.0)[None]
        weight, top, total, acc = _softmaxed(logit, seen, top, total, acc)
        weight *= tl.load(v_scale + scales, mask=seen, other=0.0)[None]
        codes = tl.load(v + place + d[None], mask=seen[:, None] & whole, other=0.0).to(number)
        acc += tl.dot(weight.to(number), codes, input_precision=PRECISION)

    for start in range(0, tail, KEYS):
        j = start + tl.arange(0, KEYS)
        seen = j < tail
        place = take * tail_take + (j.to(tl.int64) * tail_token)[:, None] + kv_head * tail_head
        kx = tl.load(k_tail + place + first[None], mask=seen[:, None] & half, other=0.0)
        ky = tl.load(k_tail + place + second[None], mask=seen[:, None] & half, other=0.0)
        logit = tl.dot(qx, tl.trans(kx), input_precision=PRECISION)
        logit += tl.dot(qy, tl.trans(ky), input_precision=PRECISION)
        weight, top, total, acc = _softmaxed(logit * factor, seen, top, total, acc)
        values = tl.load(v_tail + place + d[None], mask=seen[:, None] & whole, other=0.0)
        acc += tl.dot(weight.to(number), values, input_precision=PRECISION)

    to = out + take * out_take + (i.to(tl.int64) * out_token)[:, None] + head * out_head
    tl.store(to + d[None], (acc / total[:, None]).to(out.dtype.element_ty), mask=asked & whole)


def launch(
    q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], rows: Tensor, phases: Tensor,
    rotary: RotaryTable, k_tail: Tensor, v_tail: Tensor,
) -> Tensor:  # fmt: skip
    """See `kernels.attend_history`."""
    takes, queries, heads, dim = q.shape
    (k, k_scale), (v, v_scale) = keys, values
    if k.stride() != v.stride() or k_scale.stride() != v_scale.stride() or k_tail.stride() != v_tail.stride():
        raise ValueError("keys and values lie differently in memory")
    q, phases, out = q.contiguous(), phases.contiguous(), q.new_empty(q.shape)
    half = dim // 2
    _attend[(triton.cdiv(queries, QUERIES), takes * heads)](
        q, k, v, k_scale, v_scale, rows, phases, k_tail, v_tail, out, dim**-0.5 * math.log2(math.e),
        queries, len(rows), k_tail.shape[1], heads, heads // k.shape[2],
        *q.stride()[:3], *k.stride()[:3], *k_scale.stride()[:2], *k_tail.stride()[:3], *out.stride()[:3],
        PAIRS=rotary.pairs, HALF=half, DIM=dim, INTERLEAVED=rotary.pairing == "interleaved",
        QUERIES=QUERIES, KEYS=KEYS, CHANNELS=max(LEAST, triton.next_power_of_2(half)),
        WIDTH=max(LEAST, triton.next_power_of_2(dim)), PRECISION="ieee" if q.dtype.itemsize == 4 else "tf32",
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out

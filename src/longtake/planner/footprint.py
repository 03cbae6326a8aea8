"""Bytes that a policy's promises come to, and the largest configuration that fits: what a session allocates, what a
server reserves and what `longtake plan` says are this arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import LongtakeError
from ..plan import HistoryShape
from ..policies import KVPolicy

RESIDENCIES = ("resident", "scratch")
STEPS = 24  # halvings of a budget: far less than a token of any history


@dataclass(frozen=True)
class HistoryBytes:
    """What the memory of one take (or of several in lockstep) takes, in bytes; rows are tokens."""

    rows: int  # of the store, the chunks in flight and the host's anchors included
    shown: int  # most rows of the view, the same included
    live_rows: int  # of the chunks in flight
    history: int  # K/V, positions and sums of what is kept
    live: int  # the same of the chunks in flight
    view: int
    fetched: int  # device memory that a host archive is fetched into
    archive: int  # host memory

    @property
    def store(self) -> int:
        return self.history + self.live

    @property
    def device(self) -> int:
        return self.store + self.view + self.fetched


def history_bytes(policy: KVPolicy, shape: HistoryShape, *, axes: int = 3, residency: str = "resident") -> HistoryBytes:
    """The bytes of a history under `policy`. `axes` is how many numbers say where a token stands.

    Raises LongtakeError for a policy that grows with a take whose end `shape` does not know, and for another residency.
    """
    if residency not in RESIDENCIES:
        raise LongtakeError(f"residency {residency!r}: use {' or '.join(RESIDENCIES)}")
    capacity, visible = policy.capacity(shape), policy.visible(shape)
    if capacity is None or visible is None:
        raise LongtakeError(
            f"policy {policy.name} grows with the take: say how many chunks it has, or use a bounded policy"
        )
    place = 2 * 8 * axes * shape.streams  # base and step of a row, in fp64
    row = shape.token_bytes + place
    live = min(capacity, shape.live_frames * shape.tokens_per_frame)
    rows, shown = capacity + shape.anchor_tokens, visible + shape.anchor_tokens
    away, fetched = policy.offloaded(shape)
    views = {"resident": 1, "scratch": shape.layers * shape.streams}  # one layer of one stream serves all
    return HistoryBytes(
        rows=rows, shown=shown, live_rows=live, history=(rows - live) * row + _extra(policy, shape, axes),
        live=live * row, view=shown * shape.view_token_bytes // views[residency], fetched=fetched * shape.token_bytes,
        archive=away * row,
    )  # fmt: skip


def _extra(policy: KVPolicy, shape: HistoryShape, axes: int) -> int:
    """Bytes beside the rows: key and query sums of whole blocks, and places per head where blocks are fused."""
    heads = shape.layers * shape.batch * shape.kv_heads * shape.streams
    sums = policy.summed(shape) + (1 if "query_sums" in policy.requires else 0)
    return sums * heads * shape.head_dim * 4 + policy.fused(shape) * heads * 2 * axes * 4


@dataclass(frozen=True)
class Fitted:
    """A policy configured for a budget, where its view lives, and what that comes to."""

    policy: KVPolicy
    residency: str
    bytes: int


def largest(
    policy: KVPolicy, shape: HistoryShape, cost: Callable[[KVPolicy, str], int], free: int, residency: str
) -> Fitted | None:
    """The configuration of `policy` with the most history whose `cost(policy, residency)` is at most `free` bytes, as
    large as `policy.fit` makes it; None if even the smallest costs more, or the policy cannot be fitted."""
    low, budget, high, best = 0, free, free + 1, None
    for _ in range(STEPS):
        try:
            fitted = policy.fit(budget, shape)
            settled = fitted.settle(shape)
            settled.check(shape)
            total = cost(settled, residency)
        except LongtakeError:  # too little for this policy
            low = budget
        else:
            if total <= free:
                low, best = budget, Fitted(fitted, residency, total)
            else:
                high = budget
        if high - low < 2:
            break
        budget = (low + high) // 2
    return best

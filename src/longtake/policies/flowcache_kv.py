"""FlowCache, importance–redundancy compression (arXiv 2602.10825, §4): finished chunks share a budget of tokens, and
every layer and KV head keeps the ones that are looked at and unlike the others.

    score  = λ·Imp − (1 − λ)·Red
    Imp[l] = maxpool₇( mean_q softmax_l( max_g q·k_l / √D ) )    g: the query heads of one KV head, before the softmax
    Red[l] = softmax_l( mean_j cos(k_l, k_j) )                   = softmax_l( k̂_l · Σ_j k̂_j / L ),  k̂ = k/‖k‖

The row mean of the cosine matrix is a dot product with the sum vector, so that matrix is never made; the logits are
made for a block of queries at a time, of which only the running mean stays. All of it in fp32: in bf16 thousands of
tokens tie. Survivors keep the position they had. They lie in the order of positions, so that pooling runs over
neighbours (published: best first, which makes neighbours of tokens that are none).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LongtakeError, PlanError
from ..plan import FULL, BlockTable, Entry, Fuse, HistoryShape, Plan, Signals
from .base import KVPolicy

GROUPS = ("token", "frame", "chunk")
QUERIES = ("last", "next")
TRANSIENT = 256 << 20  # bytes of logits at a time


@dataclass(frozen=True)
class FlowCacheKV(KVPolicy):
    """Hold `chunks` chunks' worth of tokens, those in flight included; compress the finished ones when it gets full."""

    chunks: int = 6  # B_total of the paper
    mix: float = 0.07  # λ: weight of importance against redundancy
    group: str = "token"  # what stays or goes together: "token", "frame" or "chunk"
    # Whose queries say what is important: of the "last" forward before room is needed (MAGI-1; compresses when a chunk
    # enters), or of the "next" one (SkyReels-V2; compresses as soon as a chunk has finished).
    queries: str = "last"
    asking: int | str = "chunk"  # which of them: the whole "chunk"'s, its last "frame"'s, or so many last tokens'
    pool: int = 7  # width of the max-pool over importance; odd
    sort: bool = True  # survivors by position; False: best first, as published
    # the take's, filled in by `settle`: chunks in flight at once, tokens of a latent frame and of a chunk
    live: int | None = field(default=None, repr=False)
    frame_tokens: int | None = field(default=None, repr=False)
    chunk_tokens: int | None = field(default=None, repr=False)

    name: ClassVar[str] = "flowcache"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks < 2:
            raise LongtakeError(f"chunks={self.chunks}: hold 2 chunks or more, one in flight and one of the past")
        if not 0 <= self.mix <= 1:
            raise LongtakeError(f"mix={self.mix}: the weight of importance is between 0 and 1 (published: 0.07)")
        if self.group not in GROUPS:
            raise LongtakeError(f"group {self.group!r}: use one of {', '.join(GROUPS)}")
        if self.queries not in QUERIES:
            raise LongtakeError(f"queries {self.queries!r}: use one of {', '.join(QUERIES)}")
        if self.asking not in ("chunk", "frame") and not (isinstance(self.asking, int) and self.asking > 0):
            raise LongtakeError(f"asking {self.asking!r}: use 'chunk', 'frame' or a number of tokens")
        if self.pool < 1 or self.pool % 2 == 0:
            raise LongtakeError(f"pool={self.pool}: give an odd width; 1 does not pool")

    @property
    def moment(self) -> str | None:  # type: ignore[override]
        return "last_forward" if self.queries == "last" else None

    # --- the plan -------------------------------------------------------------------------------------------------

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        anchors = [block for block in table.blocks if block.role == "anchor"]
        blocks = [block for block in table.blocks if block.role != "anchor"]
        shown = tuple(Entry(block.id) for block in anchors)
        count = lambda some: sum(block.forms[FULL].count for block in some)
        chunk = self.chunk_tokens or count((*blocks, *table.live)[-1:])
        most, flight = self.chunks * chunk, (self.live or 1) * chunk
        past, ids = count(blocks), tuple(block.id for block in blocks)
        whole = (*shown, *(Entry(block.id) for block in blocks))

        if self.queries == "next":
            kept = most - flight - chunk  # a finished chunk waits for the forward that compresses it
            if past <= kept:
                return Plan(whole)
            return Plan((*shown, self._fuse(ids, past, kept, chunk, None)))

        # what will be compressed next: what has finished by the time another chunk enters
        ahead = blocks + list(table.live[: max(0, len(table.live) - (self.live or 1) + 1)])
        full = count(table.blocks) - count(anchors) + count(table.live) + chunk > most
        observe = tuple(block.id for block in ahead) if full else ()
        room = most - count(table.live)
        # fewer than usual are in flight at the end of a take, and at its start, where a given past that no step has
        # looked at makes room at once
        given = signals.chunk <= len(table.live) and not any(signals.scores.values())
        if past <= (most - flight if given else room):
            return Plan(whole, observe=observe)
        scores = self._usable(signals.scores, past)
        if scores is None:  # a given past, that no step has looked at yet
            return Plan((*shown, self._fuse(ids, past, most - flight, chunk, None)), observe=observe)
        return Plan((*shown, self._fuse(ids, past, room, chunk, scores)), observe=observe)

    def _fuse(self, ids: tuple[int, ...], past: int, n: int, chunk: int, scores: Mapping[str, Tensor] | None) -> Fuse:
        size = self._group_tokens(chunk)
        if past % size or n % size:
            raise PlanError(
                f"{past} tokens of the past and room for {n} are no whole groups of {size}: use group=token"
                + (" or group=frame" if self.group == "chunk" else "")
            )
        if scores is None:
            return Fuse(ids, n, sort=self.sort)
        keep = {}
        for stream, score in scores.items():
            best = score[..., ::size].topk(n // size, dim=-1).indices  # [L, B, Hk, groups], best first
            tokens = best.unsqueeze(-1) * size + torch.arange(size, device=best.device)
            keep[stream] = tokens.flatten(-2)
        return Fuse(ids, n, keep, sort=self.sort)

    @staticmethod
    def _usable(scores: Mapping[str, Mapping[int, Tensor]], past: int) -> dict[str, Tensor] | None:
        """The scores of all streams [L, B, Hk, past], if they are of the tokens that are there now."""
        for layers in scores.values():
            if not layers or any(score.shape[-1] != past for score in layers.values()):
                return None
        stacked = {s: torch.stack([layers[layer] for layer in sorted(layers)]) for s, layers in scores.items()}
        return stacked or None

    # --- the score ------------------------------------------------------------------------------------------------

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, Hk, Nk] of the tokens that may go, rotated k [B, Nk, Hk, D]; tokens of a group all have its mean."""
        if self.asking == "frame":
            q = q[:, -(self.frame_tokens or q.shape[1]) :]
        elif isinstance(self.asking, int):
            q = q[:, -self.asking :]
        score = self.mix * pooled(importance(q, k), self.pool) - (1 - self.mix) * redundancy(k)
        size = self._group_tokens(self.chunk_tokens or k.shape[1])
        if size == 1:
            return score
        return score.unflatten(-1, (-1, size)).mean(-1).repeat_interleave(size, -1)

    def _group_tokens(self, chunk: int) -> int:
        return {"token": 1, "frame": self.frame_tokens or chunk, "chunk": chunk}[self.group]

    # --- sizes ----------------------------------------------------------------------------------------------------

    def capacity(self, shape: HistoryShape) -> int:
        frames = self.chunks * shape.chunk_frames
        return (frames if shape.frames is None else min(frames, shape.frames)) * shape.tokens_per_frame

    def fused(self, shape: HistoryShape) -> int:
        if shape.frames is not None and shape.frames <= self.chunks * shape.chunk_frames:
            return 0  # the take ends before anything is compressed
        return max(0, self.chunks * shape.chunk_tokens - shape.live_frames * shape.tokens_per_frame)

    def settle(self, shape: HistoryShape) -> Self:
        return replace(
            self, live=shape.live_chunks, frame_tokens=shape.tokens_per_frame, chunk_tokens=shape.chunk_tokens
        )

    def check(self, shape: HistoryShape) -> None:
        least = self._least(shape)
        if self.chunks < least:
            raise LongtakeError(
                f"chunks={self.chunks}: {shape.live_chunks} in flight at once leave no room for a compressed past"
                f"{' and the chunk that waits to be compressed' if self.queries == 'next' else ''}; "
                f"use chunks={least} or more"
            )

    def fit(self, budget: int, shape: HistoryShape) -> Self:
        chunks, least = budget // (shape.chunk_frames * shape.frame_bytes), self._least(shape)
        if chunks < least:
            raise LongtakeError(
                f"{budget} bytes hold {chunks} chunks: with {shape.live_chunks} in flight at least {least} are needed, "
                f"{least * shape.chunk_frames * shape.frame_bytes} bytes"
            )
        return replace(self, chunks=chunks)

    def _least(self, shape: HistoryShape) -> int:
        return shape.live_chunks + (1 if self.queries == "last" else 2)


def importance(q: Tensor, k: Tensor, transient: int = TRANSIENT) -> Tensor:
    """Mean attention that queries [B, Nq, Hq, D] pay to keys [B, Nk, Hk, D], softmax over these keys only: [B, Hk, Nk],
    fp32. Exact, in blocks of queries whose logits take at most `transient` bytes (or one query's)."""
    batch, keys, heads, dim = k.shape
    groups = q.shape[2] // heads
    turned = k.float().permute(0, 2, 3, 1).contiguous()  # [B, Hk, D, Nk]
    total = torch.zeros(batch, heads, keys, device=k.device)
    rows = max(1, transient // (2 * 4 * batch * heads * keys))  # two such blocks: of one head in a group, and so far
    for block in q.split(rows, 1):
        each = (block.float() * dim**-0.5).unflatten(2, (heads, groups)).permute(3, 0, 2, 1, 4)  # [G, B, Hk, n, D]
        logits = each[0] @ turned
        for other in each[1:]:
            torch.maximum(logits, other @ turned, out=logits)
        logits -= logits.amax(-1, keepdim=True)
        weight = logits.exp_().sum(-1, keepdim=True).reciprocal_()  # [B, Hk, n, 1]
        total += (weight.transpose(-1, -2) @ logits).squeeze(-2)
    return total / q.shape[1]


def pooled(x: Tensor, width: int) -> Tensor:
    """Running maximum over `width` neighbours on the last axis; the borders see fewer."""
    return F.max_pool1d(x, width, stride=1, padding=width // 2)


def redundancy(k: Tensor) -> Tensor:
    """How like all others each key is, of keys [B, Nk, Hk, D]: [B, Hk, Nk], fp32, sums to 1.

    The published "− 1" for a key's likeness to itself is the same for all, and softmax does not see it."""
    unit = k.float()
    unit = unit / (unit.norm(dim=-1, keepdim=True) + 1e-8)
    likeness = torch.einsum("bnhd,bhd->bhn", unit, unit.sum(1)) / k.shape[1]
    return likeness.softmax(-1)

"""The contract of a KV policy: pure functions of a table of blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from ..errors import LongtakeError
from ..plan import FULL, BlockTable, Drop, Entry, HistoryShape, Plan, Signals
from .fields import check_fields


@dataclass(frozen=True)
class KVPolicy(ABC):
    """Decides what of the past is kept and seen.

    A policy is a frozen dataclass: its fields are the method's configuration. It sees metadata and the scores it asked
    for, never a model, a clock or a random generator of its own, so the same table gives the same plan.
    Subclasses with a `name` are found by `longtake.policies.get(name)` and by the command line.
    """

    name: ClassVar[str] = ""
    moment: ClassVar[str | None] = None  # when `score` is called: "commit", "first_step", "last_forward" or never
    # What else is to be collected: "key_sums", "query_sums"; and "compressed", where `Plan.forms` may ask for
    # compressed forms.
    requires: ClassVar[frozenset[str]] = frozenset()
    prompt_switch: ClassVar[str] = "keep"  # how a session takes up a new prompt unless it is told (`Session.switch`)

    def __post_init__(self) -> None:
        """Raise LongtakeError for an option that is not of its field's type. Policies that check more call this."""
        check_fields(self)

    @abstractmethod
    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        """What the chunks in flight see, and what is forgotten."""

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """The method's formula, for one layer: rotated queries [B, Nq, Hq, D] against rotated keys [B, Nk, Hk, D].

        For `Choose`, k is one key sum per candidate and the answer is [B, Nk]; for `Fuse` it is [B, Hk, Nk]; at a
        named `moment` k holds the blocks of `Plan.observe` in view order, and the answer is whatever `plan` wants to
        find in `signals.scores[stream][layer]`: guidance streams score for themselves.
        """
        raise NotImplementedError

    @abstractmethod
    def capacity(self, shape: HistoryShape) -> int | None:
        """Most tokens held at once, chunks in flight included, anchors of the host apart; None: it grows."""

    def visible(self, shape: HistoryShape) -> int | None:
        """Most tokens attended at once, the chunks in flight included; the capacity unless more is kept than shown."""
        return self.capacity(shape)

    def offloaded(self, shape: HistoryShape) -> tuple[int, int]:
        """Most tokens in host memory besides the capacity, and most of them shown at once (`Plan.away`)."""
        return 0, 0

    def summed(self, shape: HistoryShape) -> int:
        """Most forms with key sums at once, if the policy requires "key_sums"."""
        return 0

    def fused(self, shape: HistoryShape) -> int:
        """Most tokens of fused blocks (`Fuse`) at once, every head of which has places of its own."""
        return 0

    def chunks_held(self, shape: HistoryShape) -> tuple[int, int]:
        """About how many chunks something is held of, where the capacity is bounded, and of how many of those a
        compressed form: what is kept of a chunk beside its K/V (latents, compressed tokens) goes by these."""
        return (self.capacity(shape) or 0) // shape.chunk_tokens, 0

    def fit(self, budget: int, shape: HistoryShape) -> Self:
        """This policy with its own parameters chosen so that what is held takes at most `budget` bytes.

        Raises LongtakeError when even the smallest configuration does not fit."""
        raise LongtakeError(f"{self.name or type(self).__name__} cannot be fitted to a byte budget")

    def settle(self, shape: HistoryShape) -> Self:
        """This policy with whatever its options leave to be measured on the model. A session calls it first.

        Raises LongtakeError, with advice, if the model has no such measurement."""
        return self

    def flush(self, table: BlockTable) -> tuple[Drop, ...]:
        """What is forgotten between two chunks when a prompt change flushes the history: everything but the first
        chunk, as an anchor to the take, and the last, for a motion without a jump."""
        blocks = [b for b in table.blocks if b.role != "anchor"]
        return tuple(Drop(b.id, form) for b in blocks[1:-1] for form in b.forms)

    def check(self, shape: HistoryShape) -> None:  # noqa: B027 (most configurations always work)
        """Raise LongtakeError, with advice, if this configuration cannot work for such a take."""

    def covers(self, table: BlockTable) -> bool:
        """Whether this policy now shows exactly what full history would: everything, whole, in place."""
        if not table.complete:
            return False
        plan = self.plan(table, Signals())
        if plan.drops or plan.live_shift or len(plan.entries) != len(table.blocks):
            return False
        return all(
            isinstance(entry, Entry)
            and entry.block == block.id
            and entry.form == FULL
            and (entry.tokens is None or len(entry.tokens) == block.forms[FULL].tokens)
            and entry.shift == 0
            and entry.log_weight == 0
            and entry.heads is None
            for entry, block in zip(plan.entries, table.blocks, strict=True)
        )

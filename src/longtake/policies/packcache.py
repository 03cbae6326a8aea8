"""PackCache (arXiv 2601.04359): attention to a past frame halves with every frame of distance, so its share of the
cache does, too.

Text and conditioning frames are anchors and stay whole. The generated past shares a fixed budget of tokens, half of it
for the newest frame, a quarter for the one before, …, the oldest retained frame taking the rest; tokens above a frame's
share are deleted, evenly over the picture. What is retained moves to consecutive slots, so that neither the distance
between frames nor their positions ever leave what the model was trained on.

The paper does not determine every detail; where it is silent the defaults here are the choices its published speed-ups
point to (a history of one frame's tokens over at most four frames).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..attention import logits
from ..errors import LongtakeError
from ..plan import FULL, BlockTable, HistoryShape, Signals
from .allocation import allocate, decay_weights
from .selection import ORDERS, ranks
from .slots import Frame, SlotPolicy

SELECTIONS = (*ORDERS, "attention")
QUERIES = 256  # of a chunk, evenly spaced: what an attention score looks through


@dataclass(frozen=True)
class PackCache(SlotPolicy):
    """Anchors whole, history in geometrically falling shares of a fixed token budget, everything at slots."""

    history_frames: float = 1.0  # β: the budget, in frames' worth of content tokens
    max_frames: int = 4  # W_max: history frames retained
    rho: float | str = 0.5  # decay per latent frame; "auto": as measured on the model by `longtake analyze decay`
    selection: str = "bayer"  # or "ardf", "attention", "stride", "random"
    cond_keep: float = 1.0  # part of a conditioning frame that stays
    min_keep_newest: float = 0.0  # part of the newest frame that stays at least
    rebase: str = "slots"  # or "none": everything stays where it was written
    drop_structural: bool = False  # drop a history frame's structural tokens, too
    anchor_first_generated: bool = False  # the take's first latent frame is an anchor
    budget_tokens: int | None = None  # the budget in tokens, instead of history_frames
    history_mask_ratio: float = 0.7  # of the host's write pass: what "ardf" goes by
    seed: int = 0  # of selection "random"

    name: ClassVar[str] = "packcache"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history_frames < 0 or self.max_frames < 1 or (self.budget_tokens or 0) < 0:
            raise LongtakeError(
                f"PackCache of {self.history_frames:g} frames over {self.max_frames}: history_frames ≥ 0, "
                "max_frames ≥ 1, budget_tokens ≥ 0"
            )
        if self.selection not in SELECTIONS:
            raise LongtakeError(f"selection {self.selection!r}: use one of {', '.join(SELECTIONS)}")
        if self.rebase not in ("slots", "none"):
            raise LongtakeError(f"rebase {self.rebase!r}: use 'slots' or 'none'")
        if isinstance(self.rho, str) and self.rho != "auto":
            raise LongtakeError(f"rho {self.rho!r}: give a number between 0 and 1, or 'auto'")
        if not isinstance(self.rho, str) and not 0 < self.rho < 1:
            raise LongtakeError(f"rho {self.rho:g}: give a number between 0 and 1, or 'auto'")
        for option in ("cond_keep", "min_keep_newest", "history_mask_ratio"):
            if not 0 <= getattr(self, option) <= 1:
                raise LongtakeError(f"{option} {getattr(self, option):g}: give a part between 0 and 1")

    # --- how much, for how long, in what shares ---------------------------------------------------------------------

    def budget(self, content: int) -> int:
        return round(self.history_frames * content) if self.budget_tokens is None else self.budget_tokens

    @property
    def window(self) -> int:
        return self.max_frames

    @property
    def leading(self) -> int:
        return int(self.anchor_first_generated)

    @property
    def moves(self) -> bool:
        return self.rebase == "slots"

    def weights(self, frames: int) -> Sequence[Fraction]:
        """b_d = (1−ρ) ρ^(d−1), the tail going to the oldest (Eq. 6–7 for ρ = ½: 2^−min(d, W−1))."""
        return decay_weights(frames, self._rho())

    def retain(self, owned: Sequence[int], content: int) -> list[int]:
        given = super().retain(owned, content)
        least = min(owned[0], sum(given), math.ceil(self.min_keep_newest * content))
        if given[0] >= least:
            return given
        older = allocate(sum(given) - least, owned[1:], self.weights(len(owned))[1:])
        return [least, *older]

    def anchored(self, content: int) -> int:
        return math.ceil(self.cond_keep * content)

    def structure(self, frame: Frame) -> Tensor:
        return frame.rest[:0] if self.drop_structural and not frame.anchor else frame.rest

    # --- which tokens -----------------------------------------------------------------------------------------------

    def order(self, frame: Frame, mass: Tensor | None) -> Tensor:
        if mass is not None:
            return (-mass).argsort(stable=True)
        # nobody has looked at a frame before the first last step: until then "attention" thins like "bayer"
        order = "bayer" if self.selection == "attention" else self.selection
        rank = ranks(order, frame.whole, frame.block.grid, seed=self.seed, mask_ratio=self.history_mask_ratio)
        return rank[frame.places].argsort()

    def evidence(self, table: BlockTable, signals: Signals) -> Mapping[int, Tensor]:
        """Attention mass of every token held, mean over layers and takes, of the first stream: all share kept sets."""
        scored = list(next(iter(signals.scores.values()), {}).values())
        counts = [block.forms[FULL].count for block in table.blocks]
        if self.selection != "attention" or not scored or scored[0].shape[-1] != sum(counts):
            return {}  # nothing measured yet, or something else than what is held (a chunk written anew)
        mass = torch.stack([layer.mean(0) for layer in scored]).mean(0).cpu()  # all that was in view, in time order
        return {b.id: part for b, part in zip(table.blocks, mass.split(counts), strict=True)}

    @property
    def moment(self) -> str | None:  # type: ignore[override]  # nothing is collected unless it is asked for
        return "last_forward" if self.selection == "attention" else None

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention mass of every key in view [B, Nk], summed over heads and up to 256 evenly spaced queries."""
        n = min(QUERIES, q.shape[1])
        rows = q[:, torch.linspace(0, q.shape[1] - 1, n).round().long().to(q.device)]
        parts = [logits(part, k).softmax(-1).sum((1, 2)) for part in rows.split(32, 1)]
        return torch.stack(parts).sum(0)

    # --- sizes ------------------------------------------------------------------------------------------------------

    def settle(self, shape: HistoryShape) -> Self:
        if self.rho != "auto":
            return self
        if shape.decay is None:
            raise LongtakeError(
                "rho=auto needs the model's measured decay, and this model has none: run "
                "`longtake analyze decay --model … --save`, or give a number, e.g. rho=0.5"
            )
        return replace(self, rho=shape.decay)

    def fit(self, budget: int, shape: HistoryShape) -> Self:
        """The whole budget as history tokens, over as many frames as these options spread theirs (see `spread`)."""
        room, structural = self.room(budget, shape), shape.structural_tokens * (not self.drop_structural)
        content = shape.tokens_per_frame - shape.structural_tokens
        frames = self.spread(room, content, structural, shape)
        tokens = min(room - frames * structural, frames * content)
        if tokens < 1:
            raise LongtakeError(
                f"{budget} bytes leave {room} tokens of history: the structural tokens of {frames} frames alone take "
                f"{frames * structural}; shorten max_frames"
            )
        return replace(self, budget_tokens=tokens, max_frames=frames)

    def _rho(self) -> float:
        if isinstance(self.rho, str):
            raise LongtakeError("rho=auto was not settled: a session does that; elsewhere call policy.settle(shape)")
        return self.rho

"""The contract of a reuse policy: which (chunk, step) forwards are computed, and which reuse an earlier result.

A policy sees numbers only: how far each chunk in flight has moved since its previous step, measured by `metric`. What
is reused is the `carry`:

* "velocity": the last computed velocity, applied over the new step's own change of noise level.
* "update": the last computed change of the latents, Δx, added as it is, as published for MAGI-1: where steps grow, it
  falls short. The solver (Euler, UniPC) is told that a step went by without a velocity.
* "residual": what the model's block stack added to its input, per guidance stream; embedding and head are computed
  anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from ..errors import LongtakeError
from ..flops import Flops

if TYPE_CHECKING:
    from .metric import Change

METRICS = ("latent", "timestep")
CARRIES = ("velocity", "update", "residual")


@dataclass(frozen=True)
class Turn:
    """One chunk about to take one denoising step."""

    chunk: int  # number of the chunk in the take
    index: int  # steps the chunk has behind it
    steps: int  # steps a chunk takes in all
    timestep: float  # as the host takes it
    sigma: float  # noise level before the step …
    next_sigma: float  # … and after it
    last: bool = False  # the last step of the whole take


@dataclass
class ReuseState:
    """What is remembered of one chunk in flight; new for every chunk."""

    before: Tensor | None = None  # latents [B, C, f, h, w] at the previous step, for the "latent" metric
    timestep: float | None = None  # of the previous step
    accumulator: float = 0.0
    done: int = 0  # steps decided so far
    carry: Tensor | None = None  # velocity; prediction x0 where a sampler renoises; Δx with the "update" carry
    residuals: dict[str, Tensor] = field(default_factory=dict)  # stream → [B, N, hidden]
    cost: Flops = field(default_factory=Flops)  # of the last computed step
    decisions: list[Decision] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        held = (self.before, self.carry, *self.residuals.values())
        return sum(x.nbytes for x in held if x is not None)


@dataclass(frozen=True)
class Decision:
    """What was decided for one step of one chunk, and why. Fit for JSON."""

    chunk: int
    index: int
    timestep: float
    change: float | None  # relative L1 since the previous step, before rescaling; None: nothing to compare with
    accumulator: float  # after the decision
    reused: bool
    reason: str  # "first", "warm-up", "last", "entered" (beside reused ones), "moved", "still", "replayed", "all"


@dataclass(frozen=True)
class ReusePolicy:
    """Decides, before each denoising step, which chunks are computed. Pure but for the states it is handed."""

    name: ClassVar[str] = ""
    bare: ClassVar[str | None] = None  # the field that a value without a key is for, on the command line
    # what a chunk's decisions may depend on beside its own steps: nothing ("chunk"), those it shares rows with ("row"),
    # or which chunk of the "take" it is
    depends: ClassVar[str] = "take"

    def measure(self) -> str | None:
        """The metric it wants chunks compared by: "latent", "timestep", or None for none."""
        return None

    def carries(self) -> str:
        """What a reused step is made of: one of `CARRIES`."""
        return "velocity"

    def decide(
        self, turns: Sequence[Turn], states: Sequence[ReuseState], changes: Sequence[Change | None], shared: ReuseState
    ) -> list[Decision]:
        """One decision per turn of this row of the sampler; chunk after chunk unless a method decides jointly.

        `changes[i]` is None at a chunk's first step, or if no metric was asked for. `shared` belongs to the take.
        """
        return [self.one(*each) for each in zip(turns, states, changes, strict=True)]

    def one(self, turn: Turn, state: ReuseState, change: Change | None) -> Decision:
        """The decision for one chunk by itself."""
        raise NotImplementedError

    def for_model(self, preset: str) -> Self:
        """This policy with everything filled in that was left to the model, whose thresholds go by `preset`."""
        return self


@dataclass(frozen=True)
class NoReuse(ReusePolicy):
    """Compute every forward."""

    name: ClassVar[str] = "none"
    depends: ClassVar[str] = "chunk"

    def one(self, turn: Turn, state: ReuseState, change: Change | None) -> Decision:
        return Decision(turn.chunk, turn.index, turn.timestep, None, 0.0, False, "all")


def check_choice(what: str, value: Any, known: Sequence[str]) -> None:
    """Raise LongtakeError for a value that is none of the known ones."""
    if value not in known:
        raise LongtakeError(f"{what} {value!r}: use one of {', '.join(known)}")

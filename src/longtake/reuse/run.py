"""The bookkeeping of reuse in one take: measuring, asking the policy, keeping what may be reused, the log.

A sampler does, for one row of chunks in flight:

    compute = run.decide(turns, latents)                      one yes or no per chunk
    for each computed chunk:  run.keep(turn, x, velocity)      velocity: guidance included
    for each reused chunk:    velocity = run.carried(turn, x)
    when a chunk is done:     decisions = run.finish(chunk)

With the "residual" carry it keeps `run.state(chunk).residuals[stream]` instead, and hands it to
`host.forward_residual`. With the "update" carry (`run.repeats_update`) it hands `run.moved` what a computed step
changed, and adds `run.update(turn)` in a reused one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LongtakeError
from ..flops import Flops
from .base import Decision, NoReuse, ReusePolicy, ReuseState, Turn
from .metric import Change

Feature = Callable[[str, Tensor | None, float], Tensor]
"""(metric, latents [B, C, f, h, w] or None for "timestep", timestep) → fp32 feature [B or 1, …]."""


class ReuseRun:
    """The reuse of one take under one (resolved) policy.

    `feature` is the host's. `renoised` says that the sampler adds fresh noise after every step: a velocity then belongs
    to noise that is gone, and what carries over is the prediction x0 = x − σ·v. (Where x follows v, both are the same.)
    """

    def __init__(self, policy: ReusePolicy, feature: Feature, *, renoised: bool = False) -> None:
        if renoised and policy.carries() == "update":
            raise LongtakeError(
                "carry 'update' repeats a change of the latents, but this sampler adds fresh noise after every step: "
                "use carry=velocity or carry=residual"
            )
        self.policy, self.feature, self.renoised = policy, feature, renoised
        self.states: dict[int, ReuseState] = {}
        self.shared = ReuseState()
        self._by_timestep: dict[tuple[float, float], Change] = {}

    @property
    def active(self) -> bool:
        """Whether anything may ever be reused."""
        return not isinstance(self.policy, NoReuse)

    @property
    def carries_residual(self) -> bool:
        return self.active and self.policy.carries() == "residual"

    @property
    def repeats_update(self) -> bool:
        return self.active and self.policy.carries() == "update"

    def state(self, chunk: int) -> ReuseState:
        return self.states.setdefault(chunk, ReuseState())

    def decide(self, turns: Sequence[Turn], latents: Sequence[Tensor]) -> list[bool]:
        """Whether each turn's chunk is computed; `latents` are theirs, before the step."""
        states = [self.state(turn.chunk) for turn in turns]
        decisions = self.policy.decide(turns, states, self._changes(turns, latents), self.shared)
        for decision, state in zip(decisions, states, strict=True):
            if decision.reused and state.carry is None and not state.residuals:
                raise RuntimeError(
                    f"{type(self.policy).__name__} reuses step {decision.index} of chunk {decision.chunk}, but "
                    "nothing was computed before it"
                )
            state.done += 1
            if self.active:
                state.decisions.append(decision)
        return [not decision.reused for decision in decisions]

    def keep(self, turn: Turn, x: Tensor, velocity: Tensor) -> None:
        """A computed step's velocity, guidance included, for the steps that may reuse it."""
        if not self.active or self.carries_residual or self.repeats_update:
            return
        state = self.state(turn.chunk)
        state.carry = (x.double() - turn.sigma * velocity.double()).float() if self.renoised else velocity

    def moved(self, turn: Turn, change: Tensor) -> None:
        """What a computed step changed in a chunk's latents, for the steps that may repeat it."""
        if self.repeats_update:
            self.state(turn.chunk).carry = change

    def carried(self, turn: Turn, x: Tensor) -> Tensor:
        """The velocity of a reused step from latents x; with the "update" carry, the one that would change as much."""
        carry = self.update(turn)
        if self.renoised:
            return (x.double() - carry.double()) / turn.sigma
        return carry / (turn.next_sigma - turn.sigma) if self.repeats_update else carry

    def update(self, turn: Turn) -> Tensor:
        """What is carried over to a reused step, as it is."""
        carry = self.state(turn.chunk).carry
        if carry is None:
            raise RuntimeError(f"chunk {turn.chunk} has nothing to reuse")
        return carry

    def finish(self, chunk: int) -> tuple[Decision, ...]:
        """Forget a chunk; what was decided for it. What belongs to the take goes with the last chunk in flight where
        chunks come one by one."""
        decisions = tuple(self.states.pop(chunk, ReuseState()).decisions)
        if self.renoised:
            self.shared = ReuseState()
        return decisions

    def schedule(
        self, turns: Sequence[Turn], rows: Iterable[Sequence[Turn]] | None = None, *, alone: bool = True
    ) -> list[Decision] | None:
        """The decisions of a chunk's `turns`, where they are known before the take and the same for every chunk; else
        None. `rows` are those of the whole take, None if its length is not known; `alone`: chunks come one by one."""
        if self.policy.depends == "chunk" or (self.policy.depends == "row" and alone):
            ordinary, final = ([[replace(t, last=last and t is turns[-1])] for t in turns] for last in (False, True))
            played = [self.ahead(ordinary), self.ahead(final)]
        elif rows is not None:
            by_chunk: dict[int, list[list[Decision]]] = {}
            for row in self.ahead(rows) or ():
                for decision in row:
                    by_chunk.setdefault(decision.chunk, []).append([decision])
            played = list(by_chunk.values())
        else:
            return None
        made = [None if steps is None else [decision for row in steps for decision in row] for steps in played]
        if not made or any(one is None or made[0] is None or not _alike(one, made[0]) for one in made):
            return None
        return made[0]

    def ahead(self, rows: Iterable[Sequence[Turn]]) -> list[list[Decision]] | None:
        """What will be decided for rows to come, from where the take stands now, if that is known: with a metric that
        holds nothing of the video, or none. Changes nothing."""
        if self.policy.measure() == "latent":
            return None
        play = ReuseRun(self.policy, self.feature, renoised=self.renoised)
        play.states = {chunk: replace(state) for chunk, state in self.states.items()}
        play.shared, play._by_timestep = replace(self.shared), self._by_timestep
        decided = []
        for turns in rows:
            states = [play.state(turn.chunk) for turn in turns]
            changes = play._changes(turns, [torch.empty(0)] * len(turns))
            decided.append(self.policy.decide(turns, states, changes, play.shared))
            for turn, state in zip(turns, states, strict=True):
                state.done += 1
                if turn.index == turn.steps - 1:
                    play.finish(turn.chunk)
        return decided

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a continuation depends on: tensors by name, and the rest fit for JSON."""
        tensors: dict[str, Tensor] = {}
        chunks = {}
        for chunk, state in self.states.items():
            held = {"before": state.before, "carry": state.carry}
            held |= {f"residual/{stream}": x for stream, x in state.residuals.items()}
            tensors |= {f"{chunk}/{name}": x for name, x in held.items() if x is not None}
            chunks[str(chunk)] = {
                "timestep": state.timestep, "accumulator": state.accumulator, "done": state.done,
                "cost": astuple(state.cost),
                "decisions": [asdict(d) for d in state.decisions],
            }  # fmt: skip
        return tensors, {"chunks": chunks, "accumulator": self.shared.accumulator, "done": self.shared.done}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.shared = ReuseState(accumulator=meta["accumulator"], done=meta["done"])
        self.states = {}
        for chunk, told in meta["chunks"].items():
            decisions = [Decision(**d) for d in told["decisions"]]
            state = ReuseState(**{**told, "decisions": decisions, "cost": Flops(*told["cost"])})
            state.before, state.carry = tensors.get(f"{chunk}/before"), tensors.get(f"{chunk}/carry")
            start = f"{chunk}/residual/"
            state.residuals = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
            self.states[int(chunk)] = state

    def _changes(self, turns: Sequence[Turn], latents: Sequence[Tensor]) -> list[Change | None]:
        """How far each chunk has moved since its previous step; remembers where it stands now."""
        metric = self.policy.measure()
        if metric is None:
            return [None] * len(turns)
        changes: list[Change | None] = [None] * len(turns)
        pairs, places = [], []
        for i, (turn, x) in enumerate(zip(turns, latents, strict=True)):
            state = self.state(turn.chunk)
            before, state.timestep = state.timestep, turn.timestep
            if metric == "timestep":
                if before is not None:
                    changes[i] = self._of_timesteps(before, turn.timestep)
                continue
            old, state.before = state.before, x.detach().clone()
            if old is not None:
                pairs.append((self.feature(metric, x, turn.timestep), self.feature(metric, old, turn.timestep)))
                places.append(i)
        for place, change in zip(places, Change.between(pairs), strict=True):
            changes[place] = change
        return changes

    def _of_timesteps(self, before: float, now: float) -> Change:
        if (before, now) not in self._by_timestep:
            pair = tuple(self.feature("timestep", None, t) for t in (now, before))
            self._by_timestep[before, now] = Change.between([pair])[0]  # type: ignore[list-item]
        return self._by_timestep[before, now]


def _alike(one: Sequence[Decision], other: Sequence[Decision]) -> bool:
    return [(d.index, d.reused) for d in one] == [(d.index, d.reused) for d in other]

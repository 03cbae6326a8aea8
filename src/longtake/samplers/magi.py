"""MAGI-1's rows: several passes over one K/V, and a finished chunk read once more beside the chunks that follow it.

As `Staggered`, but where chunks are committed clean:

    chunks that are due enter; of the base model, one that finished in the row before is still in flight
    for every kind of pass (text, null caption, alone), and in it for every chunk in flight, oldest first:  a forward
    the chunk that finished before, whose K/V are of its clean latents now, becomes the past
    velocities of the passes are put together, every chunk takes its step

So a pass with text sees what the same kind of pass made of the chunks in flight, and they need one K/V, not one per
pass: the last pass that writes leaves the ones that stay. The distilled model has one pass that writes, so its chunks
are read once more as soon as they have finished. The last chunk of a take is never read again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..chunk import Clock
from ..errors import NonFiniteError
from ..flops import Flops
from ..history import LayerView
from ..hosts.base import Pass, TextState
from ..hosts.magi.host import MagiHost
from ..policies import KVRange
from .flight import InFlight
from .rollout import Finished
from .stagger import Stagger
from .staggered import Staggered


class MagiStaggered(Staggered):
    """One take (or several in lockstep) of a MAGI-1 host; see `Staggered`."""

    host: MagiHost

    def __init__(
        self, host: MagiHost, geometry: Any, history: Any, policy: Any, reuse: Any, stagger: Stagger, **options: Any
    ) -> None:
        super().__init__(host.with_steps(stagger.steps), geometry, history, policy, reuse, stagger, **options)

    def _row(self, clock: Clock) -> None:
        if self.stagger.commit == "adopt":
            return super()._row(clock)
        if self.until is not None and self.frame >= self.until and not self._denoising():
            raise StopIteration
        while self._due(self.row):
            self._enter()
        turns = [chunk for chunk in self._denoising() if chunk.step <= self.row - chunk.start]
        self._decide(turns)
        velocities = self._forwards([chunk for chunk in turns if self._computed[chunk.chunk]], clock)
        for chunk in self._done_before():
            self._leave(chunk)
        for chunk in turns:
            self._step(chunk, velocities.get(chunk.chunk), clock)
        for chunk in turns:
            if chunk.step == self.matrix.steps:
                self._finished(chunk, clock)
        self._computed = {}
        self.row += 1
        return None

    def _denoising(self) -> list[InFlight]:
        return [chunk for chunk in self.live if chunk.step < self.matrix.steps]

    def _done_before(self) -> list[InFlight]:
        """Chunks that took their last step in an earlier row: this one reads them once more."""
        return [chunk for chunk in self.live if chunk.start + self.matrix.steps <= self.row]

    def _finished(self, chunk: InFlight, clock: Clock) -> None:
        """Hand out a chunk that took its last step."""
        attended = self.history.attended() + chunk.span * self.geometry.tokens_per_frame
        more = self.until is None or self.frame < self.until or bool(self._denoising())
        if more and not self.host.lingering:
            for each in self.host.clean_passes(self.guidance):
                self._pass(chunk, self.host.clean_timestep, each, clock, observe=self.policy.moment == "commit")
            self._leave(chunk)
        self._keep(chunk.x)
        self.done.append(Finished(chunk.chunk, chunk.frame, chunk.x, attended, self.reuse.finish(chunk.chunk)))

    def _leave(self, chunk: InFlight) -> None:
        self._settle(chunk.block, chunk.x, self.host.clean_timestep)
        self.live.remove(chunk)

    # --- forwards ----------------------------------------------------------------------------------------------------

    def _forwards(self, computed: list[InFlight], clock: Clock) -> dict[int, Tensor]:
        """The velocities of this row by chunk; K/V of every chunk that is computed, or was finished before, are
        written."""
        finished = self._done_before()
        first = next((chunk for chunk in self.live if chunk not in finished), None)
        plan: list[tuple[InFlight, float, dict[str, Pass]]] = []
        for chunk in (*finished, *computed):
            clean = chunk in finished
            t = self.host.clean_timestep if clean else self.timesteps[chunk.step]
            makes = (
                self.host.clean_passes(self.guidance) if clean
                else self.host.passes(t, self.guidance, first=chunk is first)
            )  # fmt: skip
            plan.append((chunk, t, {each.name: each for each in makes}))
        made: dict[int, dict[str, Tensor]] = {chunk.chunk: {} for chunk in computed}
        residuals: dict[int, dict[str, Tensor]] = {chunk.chunk: {} for chunk in computed}
        for chunk in computed:
            self.reuse.state(chunk.chunk).cost = Flops()
        for name in dict.fromkeys(name for _, _, passes in plan for name in passes):
            for chunk, t, passes in plan:
                if name not in passes:
                    continue
                before = clock.flops
                last = name == [each.name for each in passes.values() if each.write][-1]
                observe = last and self._looked_at(chunk, finished)
                out = self._pass(chunk, t, passes[name], clock, observe=observe, residuals=residuals.get(chunk.chunk))
                if chunk.chunk in made:
                    made[chunk.chunk][name] = out
                    self.reuse.state(chunk.chunk).cost += clock.flops - before
        for number, kept in residuals.items():
            self.reuse.state(number).residuals = kept
        times = {chunk.chunk: t for chunk, t, _ in plan}
        return {number: self.host.guide(out, times[number], self.guidance) for number, out in made.items()}

    def _pass(
        self, chunk: InFlight, t: float, each: Pass, clock: Clock, *, observe: bool,
        residuals: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        layers = self._layers(chunk.block, each, observe=observe)
        if each.history and isinstance(self.policy, KVRange):
            self._limit(layers, chunk.span, self.policy.reach(chunk.step, self.matrix.steps))
        return self._forward(chunk, t, each, layers, {} if residuals is None else residuals, clock)

    def _limit(self, layers: list[LayerView], span: int, reach: int) -> None:
        """Hide what lies more than `reach` chunks back, the one in flight included."""
        frames = span + (reach - 1) * self.geometry.chunk_frames
        for view in layers:
            hidden = max(0, view.k.shape[1] - frames * self.geometry.tokens_per_frame)
            view.k, view.v, view.direct = view.k[:, hidden:], view.v[:, hidden:], None

    def _looked_at(self, chunk: InFlight, finished: list[InFlight]) -> bool:
        """Whether the policy scores in this forward."""
        if chunk in finished:
            return self.policy.moment == "commit"
        return self.policy.moment != "commit" and self._observed(chunk)

    def _write(
        self, block: int, x: Tensor, timestep: float, texts: dict[str, TextState], clock: Clock, what: str
    ) -> None:
        """The K/V of given frames."""
        each = self.host.clean_passes(self.guidance)[-1]
        layers = self._layers(block, each, observe=self.policy.moment == "commit")
        if isinstance(self.policy, KVRange):
            self._limit(layers, self.geometry.chunk_frames, self.policy.clean)
        text = self.host.chunk_texts(texts, 0, None)[each.text]
        with clock.of(self.host.flops(x, text, layers)):
            out = self.host.forward(x, timestep, text, layers)
        if not (torch.isfinite(x).all() & torch.isfinite(out).all()).item():
            raise NonFiniteError(f"{what}: NaN or infinite values; are they finite, and in -1 to 1?")

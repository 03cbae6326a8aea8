"""The staggered sampler of SkyReels-V2 and MAGI-1 (diffusion forcing): several chunks in flight, each noisier than the
one before it.

One row of the step matrix:

    chunks that are due enter as live blocks; the policy plans
    for every chunk in flight, oldest first:  velocity of its step (computed, or reused), one solver step of its own
    a chunk that took its last step is finished: its K/V become the past, and it is handed out

A forward is of one chunk; it sees the planned history, the chunks in flight before it as they were last computed (in
this row, unless reused), and itself: block-causal without a mask. Chunks that are not in flight never enter a forward.

Where a model was made for clips of a fixed length, a long take is made in windows: each begins with an empty history
and the last frames of the one before, carried over as latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chunk import Clock
from ..errors import LongtakeError, NonFiniteError, PlanError
from ..geometry import Geometry
from ..history import History
from ..hosts.base import Host, Pass, TextState
from ..plan import BlockTable
from ..policies import KVPolicy
from ..reuse import ReuseRun, Turn
from . import flight
from .flight import InFlight
from .rollout import Finished, Rollout, last_forwards, rewrite
from .solvers import Euler, Renoise, Solver
from .stagger import Stagger


class Staggered(Rollout):
    """One take (or several in lockstep) of a staggered host. Latents are given before its first chunk.

    `noise` has `draw(channels, frames, height, width)`. Chunks that enter after `texts` changed are given the new ones.
    `on_step(x0, timestep, step)` sees, and may replace, what a chunk's step predicts. `ends_at` is the take's length in
    latent frames, given ones included. `keep` keeps the latents of what the history holds, for `rebuild`.

    Anything raised leaves the take as it stood before the forward it was raised in: call `next` again to go on.
    """

    forgets = False

    def __init__(
        self, host: Host, geometry: Geometry, history: History, policy: KVPolicy, reuse: ReuseRun, stagger: Stagger, *,
        noise: Any, texts: dict[str, TextState], guidance: float = 1.0, ends_at: int | None = None,
        on_step: Callable[[Tensor, float, int], Tensor] | None = None, keep: bool = False,
    ) -> None:  # fmt: skip
        self.host, self.geometry, self.history = host, geometry, history
        self.policy, self.reuse, self.stagger = policy, reuse, stagger
        self.noise, self.texts, self.guidance, self.ends_at, self.on_step = noise, texts, guidance, ends_at, on_step
        self.timesteps, self.levels = host.timetable(stagger.steps)
        self.matrix, _, _ = stagger.layout(geometry, len(self.timesteps), ends_at)
        self.live: list[InFlight] = []
        self.done: list[Finished] = []  # not handed out yet
        self.origin = 0  # latent frame at which the window begins
        self.until = self._reach(0)  # … and ends
        self.frame = 0  # next latent frame to enter
        self.chunk = 0  # next chunk to enter
        self.row = 0  # in the window
        self.entered = 0  # chunks of the window that have entered
        self.tail: Tensor | None = None  # the last `overlap` finished latent frames
        self.begun_with: Tensor | None = None  # given latents that fill no chunk: the next one begins with them
        self.kept: dict[int, tuple[Tensor, float]] | None = {} if keep else None  # block → what a pass writes it from
        self._planned = False
        self._computed: dict[int, bool] = {}  # chunk → whether it is computed in this row
        self._scored: set[int] = set()  # chunks whose forward in this row the policy scores, if at the "last_forward"

    # --- from outside ------------------------------------------------------------------------------------------------

    def pieces(self, latents: Tensor) -> list[Tensor]:
        return [self._fitting(latents)]

    @torch.no_grad()
    def give(self, latents: Tensor, image: bool = False) -> int:
        """Start from given latents [B, C, p, h, w], an image or a video. The next chunk follows them."""
        given = latents.shape[2]
        if self.ends_at is not None and given >= self.ends_at:
            raise LongtakeError(f"{given} latent frames are given, and the take has {self.ends_at}: make it longer")
        seen = given if self.stagger.window is None else min(given, max(self.stagger.overlap, 1))
        self._keep(latents)
        self._open(given - seen)
        self._condition(latents[:, :, given - seen :].float(), Clock())
        return 0

    @torch.no_grad()
    def next(self, clock: Clock, last: bool = False) -> Finished:
        """The next finished chunk; the same until it is popped."""
        while not self.done:
            self._row(clock)
        return self.done[0]

    def pop(self) -> None:
        del self.done[:1]

    def abandon(self) -> None:
        """What has finished stays so."""

    def flush(self, cut: int) -> None:
        raise LongtakeError("chunks in flight see the past: it cannot be forgotten under them")

    @torch.no_grad()
    def rebuild(self) -> int:
        """As a clean pass leaves them, whatever the commit rule is. Chunks in flight stay as they are."""
        kept, clock = self.kept or {}, Clock()

        def write(block: int, table: BlockTable) -> None:
            self._planned = True
            self._write(block, *kept[block], self.texts, clock, f"block {block} under another prompt")

        try:
            return rewrite(self.history, self.policy, kept, self.chunk, write)
        finally:
            self._planned = False

    def turns(self) -> list[Turn]:
        steps = self.matrix.steps
        return [Turn(0, k, steps, self.timesteps[k], self.levels[k], self.levels[k + 1]) for k in range(steps)]

    def rows(self, chunks: int | None) -> list[list[Turn]] | None:
        if self.ends_at is None or self.row or self.live:
            return None
        whole, steps, rows = self.geometry.chunk_frames, self.matrix.steps, []
        chunk, frame, until = self.chunk, self.frame, self.until
        while until is not None and frame < self.ends_at:
            count = -(-(until - frame) // whole)
            for row in range(self.matrix.rows(count)):
                at = {c: k for c in range(count) if (k := self.matrix.step(row, c)) is not None}
                rows.append([
                    Turn(chunk + c, k, steps, self.timesteps[k], self.levels[k], self.levels[k + 1],
                         k == steps - 1 and frame + (c + 1) * whole >= self.ends_at)
                    for c, k in at.items()
                ])  # fmt: skip
            chunk, frame = chunk + count, until
            until = self._reach(frame - self.stagger.overlap)
        return rows

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return flight.written(self)

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        flight.read(self, tensors, meta)

    def memory(self) -> dict[str, int]:
        """Latents, solver states among them."""
        held = [chunk.x for chunk in self.live] + [chunk.given for chunk in self.live]
        held += [x for chunk in self.live for x in chunk.solver.state_dict()[0].values()]
        held += [finished.latents for finished in self.done] + [self.tail, self.begun_with]
        held += [x for x, _ in (self.kept or {}).values()]
        return {"latents": sum(x.nbytes for x in held if x is not None), "compressor": 0}

    # --- windows -----------------------------------------------------------------------------------------------------

    def _reach(self, origin: int) -> int | None:
        """Where a window that begins at `origin` ends."""
        ends = [self.ends_at, None if self.stagger.window is None else origin + self.stagger.window]
        return min((end for end in ends if end is not None), default=None)

    def _open(self, origin: int) -> None:
        self.history.clear()
        if self.kept is not None:
            self.kept = {}
        self.origin, self.until, self.frame = origin, self._reach(origin), origin
        self.row, self.entered, self._planned = 0, 0, False

    def _condition(self, latents: Tensor, clock: Clock) -> None:
        """Put given latents [B, C, p, h, w] into the empty history, nearly clean; a piece that fills no chunk comes
        first, or is left to the chunk that it begins."""
        frames, whole = latents.shape[2], self.geometry.chunk_frames
        rest = frames % whole
        if rest and self.host.begins_chunks:
            self.begun_with = latents[:, :, frames - rest :]
            frames, rest = frames - rest, 0
        sizes = ([rest] if rest else []) + [whole] * (frames // whole)
        for piece in latents[:, :, :frames].split(sizes, 2) if sizes else ():
            block = self._admit(self.frame, piece.shape[2])
            level = self.stagger.condition_noise / 1000
            x = piece if level == 0 else (1 - level) * piece + level * self.draw(piece.shape[2]).to(piece)
            timestep = self.stagger.condition_noise or self.host.clean_timestep
            try:
                self._write(block, x, timestep, self.texts, clock, f"the given latent frames from {self.frame} on")
            except BaseException:
                self.history.abandon(block)
                self._planned = False
                raise
            self._settle(block, x, timestep)
            self.frame += piece.shape[2]

    def _keep(self, latents: Tensor) -> None:
        if self.stagger.window is not None and self.stagger.overlap:
            past = latents if self.tail is None else torch.cat((self.tail, latents), 2)
            self.tail = past[:, :, -self.stagger.overlap :].clone()

    # --- one row -----------------------------------------------------------------------------------------------------

    def _row(self, clock: Clock) -> None:
        if not self.live and self.until is not None and self.frame >= self.until:
            if self.ends_at is not None and self.frame >= self.ends_at:
                raise StopIteration
            self._open(self.frame - (0 if self.tail is None else self.tail.shape[2]))
            if self.tail is not None:
                self._condition(self.tail, clock)
        while self._due(self.row):
            self._enter()
        turns = [chunk for chunk in self.live if chunk.step <= self.row - chunk.start]
        self._decide(turns)
        for chunk in turns:
            self._advance(chunk, clock)
        for chunk in [chunk for chunk in self.live if chunk.step == self.matrix.steps]:
            self._write(chunk.block, chunk.x, self.host.clean_timestep, chunk.texts, clock, f"chunk {chunk.chunk}")
            self._finish(chunk)
        self._computed = {}
        self.row += 1

    def _decide(self, turns: list[InFlight]) -> None:
        """Once in a row, before its first step."""
        if self._computed:
            return
        decided = self.reuse.decide([self._turn(chunk) for chunk in turns], [chunk.x for chunk in turns])
        self._computed = {chunk.chunk: yes for chunk, yes in zip(turns, decided, strict=True)}
        if self.policy.moment == "last_forward":
            computed = [self._turn(chunk) for chunk in turns if self._computed[chunk.chunk]]
            self._scored = last_forwards(self.reuse, computed, self._ahead(), adopts=self.stagger.commit == "adopt")

    def _ahead(self) -> list[list[Turn]]:
        """The rows that follow before a chunk enters or finishes."""
        ends = lambda ahead: any(chunk.step + ahead >= self.matrix.steps - 1 for chunk in self.live)
        rows: list[list[Turn]] = []
        while not (ends(len(rows)) or self._due(self.row + len(rows) + 1)):
            rows.append([self._turn(chunk, len(rows) + 1) for chunk in self.live])
        return rows

    def _due(self, row: int) -> bool:
        open_ = self.until is None or self.frame < self.until
        return open_ and self.matrix.start(self.entered) <= row

    def _enter(self) -> None:
        span = self.geometry.chunk_frames
        span = span if self.until is None else min(span, self.until - self.frame)
        block = self._admit(self.frame, span)
        x = self.draw(span).float()
        said, chunks = dict(self.texts), self._chunks()
        texts = self.host.chunk_texts(said, self.chunk, chunks)
        chunk = InFlight(
            self.chunk, block, self.frame, span, self.row, x, self.solver(), texts, said, chunks, self.begun_with
        )
        _impose(chunk)
        self.live.append(chunk)
        self.begun_with = None
        self.frame, self.chunk, self.entered = self.frame + span, self.chunk + 1, self.entered + 1

    def _chunks(self) -> int | None:
        """Chunks of the whole take, if its end is known."""
        if self.ends_at is None:
            return None
        return self.chunk + -(-(self.ends_at - self.frame) // self.geometry.chunk_frames)

    def _turn(self, chunk: InFlight, ahead: int = 0) -> Turn:
        at, steps = chunk.step + ahead, self.matrix.steps
        last = at == steps - 1 and self.ends_at is not None and chunk.frame + chunk.span >= self.ends_at
        return Turn(chunk.chunk, at, steps, self.timesteps[at], self.levels[at], self.levels[at + 1], last)

    def _advance(self, chunk: InFlight, clock: Clock) -> None:
        """One step of one chunk."""
        velocity = self._velocity(chunk, self._turn(chunk), clock) if self._computed[chunk.chunk] else None
        self._step(chunk, velocity, clock)
        if chunk.step == self.matrix.steps and self.stagger.commit == "adopt":
            self._finish(chunk)  # at once: the next chunk of this row finds it finished

    def _step(self, chunk: InFlight, velocity: Tensor | None, clock: Clock) -> None:
        """Take a chunk's step by the velocity computed for it, or by what it reuses."""
        turn, reused = self._turn(chunk), velocity is None
        if velocity is None:
            velocity = self._reused(chunk, turn)
            state, tokens = self.reuse.state(chunk.chunk), chunk.span * self.geometry.tokens_per_frame
            run = self.host.flops_outside(tokens, len(chunk.x)) * len(state.residuals)
            clock.reuse(len(self._passes(chunk, turn)), state.cost, run)
        else:
            self.reuse.keep(turn, chunk.x, velocity)
        shown = velocity if self.on_step is None else self._shown(velocity, chunk, turn)
        if reused and self.reuse.repeats_update:
            width = turn.next_sigma - turn.sigma
            after = chunk.x + (self.reuse.update(turn) if shown is velocity else width * shown)
            chunk.solver.skip()
        else:
            after = chunk.solver.step(shown.float(), chunk.x)
            if not reused:
                self.reuse.moved(turn, after - chunk.x)
        chunk.x = after
        chunk.step += 1
        _impose(chunk)
        if chunk.step == self.matrix.steps and not torch.isfinite(chunk.x).all().item():
            raise NonFiniteError(
                f"chunk {chunk.chunk} has NaN or infinite values, and chunks that saw it are in flight: "
                "go back with Session.restore(snapshot), or try another seed or dtype"
            )

    def _passes(self, chunk: InFlight, turn: Turn) -> tuple[Pass, ...]:
        return self.host.passes(turn.timestep, self.guidance, first=chunk is self.live[0])

    def _velocity(self, chunk: InFlight, turn: Turn, clock: Clock) -> Tensor:
        velocities: dict[str, Tensor] = {}
        residuals: dict[str, Tensor] = {}
        observe, before = self._observed(chunk), clock.flops
        for each in self._passes(chunk, turn):
            layers = self._layers(chunk.block, each, observe=observe)
            velocities[each.name] = self._forward(chunk, turn.timestep, each, layers, residuals, clock)
        self.reuse.state(chunk.chunk).residuals = residuals
        self.reuse.state(chunk.chunk).cost = clock.flops - before
        return self.host.guide(velocities, turn.timestep, self.guidance)

    def _forward(
        self, chunk: InFlight, timestep: float, each: Pass, layers: list[Any], residuals: dict[str, Tensor],
        clock: Clock,
    ) -> Tensor:  # fmt: skip
        """What one pass predicts; into `residuals`, if that is what is carried over, what its blocks added."""
        text = chunk.texts[each.text]
        with clock.of(self.host.flops(chunk.x, text, layers)):
            if not self.reuse.carries_residual:
                return self.host.forward(chunk.x, timestep, text, layers)
            velocity, residuals[each.name] = self.host.forward_residual(chunk.x, timestep, text, layers)
            return velocity

    def _reused(self, chunk: InFlight, turn: Turn) -> Tensor:
        """The velocity of a step that no block is computed for; K/V stay as they were."""
        if not self.reuse.carries_residual:
            return self.reuse.carried(turn, chunk.x)
        velocities, residuals = {}, self.reuse.state(chunk.chunk).residuals
        for each in self._passes(chunk, turn):
            if each.name in residuals:  # a pass that joined since (MAGI-1's nearly clean one) has none yet
                velocities[each.name], _ = self.host.forward_residual(
                    chunk.x, turn.timestep, chunk.texts[each.text], [], residuals[each.name]
                )
        return self.host.guide(velocities, turn.timestep, self.guidance)

    def _shown(self, velocity: Tensor, chunk: InFlight, turn: Turn) -> Tensor:
        """The velocity after the callback has seen the x0 it predicts."""
        assert self.on_step is not None
        ahead = self.levels[-1] - turn.sigma
        x0 = chunk.x + ahead * velocity.float()
        given = self.on_step(x0, turn.timestep, turn.index)
        return velocity if given is x0 else (given - chunk.x) / ahead

    def _observed(self, chunk: InFlight) -> bool:
        """Whether the policy scores in this forward."""
        moment = self.policy.moment
        if moment == "first_step":
            return chunk.step == 0
        if moment == "commit":
            return self.stagger.commit == "adopt" and chunk.step == self.matrix.steps - 1
        return moment == "last_forward" and chunk.chunk in self._scored

    # --- blocks ------------------------------------------------------------------------------------------------------

    def _admit(self, frame: int, span: int) -> int:
        at = frame - self.origin
        positions = self.host.positions(self.geometry, at, span)
        self._planned = False
        return self.history.admit(at, span, positions, grid=self.geometry.grid)

    def _layers(self, block: int, each: Pass, *, observe: bool) -> list[Any]:
        if not self._planned:
            try:
                self.history.apply(self.policy.plan(self.history.table(), self.history.signals(self.chunk)))
            except PlanError as error:
                raise PlanError(f"policy {self.policy.name or type(self.policy).__name__}: {error}") from error
            self._planned = True
        return self.history.layers(
            each.stream, block, write=each.write, history=each.history, observe=observe and each.write
        )

    def _write(
        self, block: int, x: Tensor, timestep: float, texts: dict[str, TextState], clock: Clock, what: str
    ) -> None:
        """The pass that writes K/V of (nearly) clean latents x."""
        for each in self.host.clean_passes(self.guidance):
            layers = self._layers(block, each, observe=self.policy.moment == "commit")
            with clock.of(self.host.flops(x, texts[each.text], layers)):
                out = self.host.forward(x, timestep, texts[each.text], layers)
            if not (torch.isfinite(x).all() & torch.isfinite(out).all()).item():
                raise NonFiniteError(f"{what}: NaN or infinite values; try another seed or dtype")

    def _finish(self, chunk: InFlight) -> None:
        attended = self.history.attended() + chunk.span * self.geometry.tokens_per_frame
        self._settle(chunk.block, chunk.x, self.host.clean_timestep)
        self.live.remove(chunk)
        self._keep(chunk.x)
        self.done.append(Finished(chunk.chunk, chunk.frame, chunk.x, attended, self.reuse.finish(chunk.chunk)))

    def _settle(self, block: int, x: Tensor, timestep: float) -> None:
        """A block becomes the past; `x` at `timestep` is what a pass would write it from."""
        self.history.commit(block)
        self._planned = False
        if self.kept is not None:
            held = {b.id for b in self.history.blocks}
            self.kept = {b: kept for b, kept in self.kept.items() if b in held} | {block: (x, timestep)}

    def draw(self, frames: int) -> Tensor:
        """Noise [B, C, frames, h, w] for the next latent frames."""
        return self.noise.draw(self.geometry.channels, frames, *self.geometry.latent_size).to(self.host.device)

    def forget_plan(self) -> None:
        """What is decided and laid out within a row is so anew."""
        self._planned, self._computed, self._scored = False, {}, set()

    def solver(self) -> Solver:
        if self.host.solver == "unipc":
            from .unipc import UniPC

            return UniPC(self.levels, self.stagger.compat)
        if self.host.solver == "euler":
            return Euler(self.levels)
        return Renoise(self.levels, lambda x: self.draw(x.shape[2]))


def _impose(chunk: InFlight) -> None:
    """The frames that are given are what they are."""
    if chunk.given is not None:
        chunk.x = torch.cat((chunk.given.to(chunk.x), chunk.x[:, :, chunk.given.shape[2] :]), 2)

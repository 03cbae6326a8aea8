"""Chunk after chunk: each is sampled whole, written by a commit pass, and is the past before the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..chunk import Clock
from ..compressors import Compressor, TakeState
from ..errors import NonFiniteError, PlanError
from ..geometry import Geometry
from ..history import History
from ..hosts.base import Host, TextState
from ..plan import COMPRESSED, FULL, BlockTable, Drop, Plan
from ..policies import KVPolicy
from ..replay import Replay
from ..reuse import ReuseRun, Turn
from .base import Sampler, Sampling
from .chunked import CLEAN_TIMESTEP, NoiseSource
from .rollout import Finished, Rollout, rewrite


@dataclass
class _Made:
    """A chunk in the making, or made and not popped yet."""

    block: int
    span: int
    chunks: int  # 0: it is the first image
    noise: list[Tensor]  # the state of the noise before it
    stays: bool = True  # whether it becomes the past
    latents: Tensor | None = None
    tokens: Tensor | None = None  # its compressed form
    compressing: TakeState | None = None  # what the compressor remembers after it


class OneByOne(Rollout):
    """One take (or several in lockstep), one chunk at a time.

    `on_step(x0, timestep, step)` sees, and may replace, a step's prediction of the finished chunk. `compressor` is
    needed by policies that ask for compressed forms. `keep` keeps latents, for `rebuild`. `replay` runs recorded
    forwards of steps.
    """

    forgets = True

    def __init__(
        self, host: Host, geometry: Geometry, history: History, policy: KVPolicy, reuse: ReuseRun, sampler: Sampler, *,
        noise: Any, texts: dict[str, TextState], guidance: float = 1.0,
        on_step: Callable[[Tensor, float, int], Tensor] = lambda x0, t, step: x0,
        compressor: Compressor | None = None, keep: bool = False, replay: Replay | None = None,
    ) -> None:  # fmt: skip
        self.host, self.geometry, self.history = host, geometry, history
        self.policy, self.reuse, self.sampler, self.replay = policy, reuse, sampler, replay
        self.noise, self.texts, self.guidance, self.on_step = noise, texts, guidance, on_step
        self.compressor, self.compressing = compressor, TakeState()
        self.frame = 0  # next latent frame
        self.chunk = 0  # next chunk
        self.kept: dict[int, Tensor] | None = {} if keep else None  # block → latents [B, C, f, h, w]
        self.tokens: dict[int, Tensor] = {}  # block → compressed tokens [B, n, d], where latents are kept
        self._made: _Made | None = None
        self._cut = 0  # frames by which the next chunk stands further off in time
        self._unobserved = False  # the last step of the chunk in flight was reused

    # --- a chunk -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def next(self, clock: Clock, last: bool = False) -> Finished:
        made = self._start(self.geometry.chunk_frames)
        made.stays = self.sampler.commits_last or not last  # what comes last, nothing looks at
        try:
            made.latents = x0 = self._denoise(made.block, clock, last)
            sound = self.sampler.sound(x0)
            if made.stays:
                sound = sound & torch.isfinite(self._write(x0, made.block, clock)).all()
            # read only after the commit pass is on its way: no stall on a GPU; its output shows a bad key or value
            if not sound.item():
                raise NonFiniteError(
                    f"chunk {self.chunk} has NaN or infinite values and was not committed; "
                    "go back with Session.restore(snapshot), or try another seed or dtype"
                )
        except BaseException:
            self.abandon()
            raise
        attended = self.history.attended() + self.geometry.tokens_per_frame * made.span
        return Finished(self.chunk, self.frame, x0, attended, self.reuse.finish(self.chunk))

    def pieces(self, latents: Tensor) -> list[Tensor]:
        span = self.geometry.chunk_frames
        return list(self._fitting(latents, span).split(span, 2))

    @torch.no_grad()
    def give(self, latents: Tensor, image: bool = False) -> int:
        made = self._start(latents.shape[2], image)
        made.latents = latents
        self._unobserved = True  # no step comes before the commit pass, which is looked at in its place
        try:
            written = self._write(latents, made.block, Clock(), given=True)
            if not (self.sampler.sound(latents) & torch.isfinite(written).all()).item():
                raise NonFiniteError(
                    "the first image leads to NaN or infinite values: is it finite, and in [-1, 1]?" if image else
                    f"the given chunk {self.chunk} has or leads to NaN or infinite values"
                )  # fmt: skip
        except BaseException:
            self.abandon()
            raise
        return made.chunks

    @torch.no_grad()
    def compress(self, frames: Tensor | None) -> None:
        """Compressed tokens, their K/V written if the chunk's plan asked for that form."""
        made = self._made
        if self.compressor is None or made is None or made.latents is None:
            return
        pixels = frames if self.compressor.wants_pixels else None
        with self.host.lock:
            tokens, made.compressing = self.compressor.compress(
                made.latents, pixels, self.compressing, self.host, self.geometry
            )
        if COMPRESSED in self.history.table().live[-1].forms:
            self._carry(tokens, made.block)
            made.tokens = tokens

    def pop(self) -> None:
        made = self._made
        if made is None:
            return
        if made.stays:
            self.history.commit(made.block)
            self.compressing = made.compressing or self.compressing
            if self.kept is not None and made.latents is not None:
                self.kept[made.block] = made.latents
                if made.tokens is not None:
                    self.tokens[made.block] = made.tokens
                self._forget()
        else:
            self.history.abandon(made.block)
        self.frame, self.chunk = self.frame + made.span, self.chunk + made.chunks
        self._made, self._cut = None, 0

    def abandon(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            self.history.abandon(made.block)
            if isinstance(self.noise, NoiseSource):
                self.noise.restore(made.noise)
            self.reuse.finish(self.chunk)

    def _start(self, span: int, image: bool = False) -> _Made:
        """Announce the next chunk, or a first image."""
        self.abandon()  # what an interrupt has left
        self._prompts()
        noise = self.noise.state() if isinstance(self.noise, NoiseSource) else []
        role = "anchor" if image and self.history.blocks else "live"  # as the prompt is, so is its image
        self._made = _Made(self.admit(span, role), span, int(not image), noise)
        return self._made

    def admit(self, span: int, role: str = "live") -> int:
        """Announce the next `span` latent frames to the history, laid out as the policy plans it; their block."""
        positions = self.host.stream_positions(self.geometry, self.frame, span, self.texts)
        block = self.history.admit(
            self.frame, span, positions, role=role, grid=self.geometry.grid, packable=self.geometry.packable,
            structural=self.geometry.structural,
        )  # fmt: skip
        try:
            plan = self.policy.plan(self.history.table(), self.history.signals(self.chunk))
            if self._cut:
                plan = replace(plan, live_shift=plan.live_shift + self._cut)
            if COMPRESSED in plan.forms:
                if self.compressor is None:
                    raise PlanError('it asks for compressed forms: let its `requires` name "compressed"')
                base, step = self.host.positions(self.geometry, self.frame, span)
                small = self.compressor.positions(base, step, self.geometry, span)
                self.history.add_form(block, COMPRESSED, small)
            self.history.apply(plan)
        except BaseException as error:
            self.history.abandon(block)
            if isinstance(error, PlanError):
                raise PlanError(f"policy {self.policy.name or type(self.policy).__name__}: {error}") from error
            raise
        return block

    # --- forwards ----------------------------------------------------------------------------------------------------

    def turns(self) -> list[Turn]:
        return self._turns(0, last=False)

    def rows(self, chunks: int | None) -> list[list[Turn]] | None:
        if chunks is None:
            return None
        return [[turn] for chunk in range(self.chunk, chunks) for turn in self._turns(chunk, chunk == chunks - 1)]

    def _turns(self, chunk: int, last: bool) -> list[Turn]:
        times, sigmas = self.sampler.schedule.timesteps, (*self.sampler.schedule.sigmas, 0.0)
        return [
            Turn(chunk, k, len(times), t, sigmas[k], sigmas[k + 1], last=last and k == len(times) - 1)
            for k, t in enumerate(times)
        ]

    def _denoise(self, block: int, clock: Clock, last: bool) -> Tensor:
        turns = self._turns(self.chunk, last)

        def velocity(x: Tensor, t: float, step: int) -> Tensor:
            computed = self.reuse.decide([turns[step]], [x])[0]
            self._unobserved = not computed
            if not computed:
                state, tokens = self.reuse.state(self.chunk), x.shape[2] * self.geometry.tokens_per_frame
                run = self.host.flops_outside(tokens, len(x)) * len(state.residuals)
                clock.reuse(len(self.texts), state.cost, run)
                if not self.reuse.carries_residual:
                    return self.reuse.carried(turns[step], x)
            before = clock.flops
            out = self._forward_all(x, t, block, clock, step=step, computed=computed)
            if computed:
                self.reuse.state(self.chunk).cost = clock.flops - before
                self.reuse.keep(turns[step], x, out)
            return out

        self._unobserved = False

        return self.sampler.sample(Sampling(
            self.host, self.geometry, self.history.shape.batch, self.sampler.schedule, self.chunk, self.noise, velocity,
            self.on_step,
        ))  # fmt: skip

    def _write(self, x0: Tensor, block: int, clock: Clock, given: bool = False) -> Tensor:
        """The commit pass of every stream: the K/V that later chunks will see of this one."""
        fed = {name: self.sampler.commit_input(x0, self.geometry, name, given) for name in self.texts}
        t = next(iter(fed.values()))[1]
        return self._forward_all({name: x for name, (x, _) in fed.items()}, t, block, clock, write=True)

    def _forward_all(
        self, x: Tensor | Mapping[str, Tensor], t: float, block: int, clock: Clock, *, step: int | None = None,
        write: bool = False, computed: bool = True,
    ) -> Tensor:  # fmt: skip
        """The velocity of one step, guidance included; or, with `write`, the commit pass of every stream. A step that
        is not `computed` puts the residuals of an earlier one between embedding and head."""
        steps = len(self.sampler.schedule.timesteps)
        last = step == steps - 1 or (write and self._unobserved)  # the commit pass stands in for a reused last step
        moments = {"commit": write, "first_step": step == 0, "last_forward": last}
        observe = moments.get(self.policy.moment or "", False)
        velocities: dict[str, Tensor] = {}
        each = x if isinstance(x, Mapping) else dict.fromkeys(self.texts, x)
        for name, text in self.texts.items():
            x = each[name]
            residuals = self.reuse.state(self.chunk).residuals if step is not None else {}
            if not computed:
                velocities[name], _ = self.host.forward_residual(x, t, text, [], residuals[name])
                continue
            layers = self.history.layers(name, block, write=write, observe=observe)
            with clock.of(self.host.flops(x, text, layers)):
                if step is not None and self.reuse.carries_residual:
                    velocities[name], residuals[name] = self.host.forward_residual(x, t, text, layers)
                elif self.replay is not None and step is not None:
                    velocities[name] = self.replay.forward(name, x, t, text, layers)
                else:
                    velocities[name] = self.host.forward(x, t, text, layers)
        cond = velocities["cond"]
        if "uncond" not in velocities:
            return cond
        uncond = velocities["uncond"].float()
        return uncond + self.guidance * (cond.float() - uncond)

    def _carry(self, tokens: Tensor, block: int) -> None:
        """Give compressed tokens their K/V in every layer and stream: part of the commit pass, before the table
        changes."""
        assert self.compressor is not None
        for name, text in self.texts.items():
            layers = self.history.layers(name, block, form=COMPRESSED, write=True)
            if self.compressor.carry == "projection":
                written = self.host.project(tokens, layers)
            else:
                written = self.host.carry(tokens, CLEAN_TIMESTEP, text, layers)
            if not (torch.isfinite(tokens).all() & torch.isfinite(written).all()).item():
                raise NonFiniteError(
                    f"the compressed form of chunk {self.chunk} has NaN or infinite values and was not committed: "
                    "try another dtype or compressor"
                )

    # --- the past ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rebuild(self) -> int:
        self._prompts()
        latents = self.kept or {}

        def write(block: int, table: BlockTable) -> None:
            self._write(latents[block], block, Clock(), given=table.live[0].role == "anchor")
            if COMPRESSED in table.live[0].forms:
                self._carry(self.tokens[block], block)

        return rewrite(self.history, self.policy, latents, self.chunk, write)

    def flush(self, cut: int) -> None:
        self.history.forget(self.policy.flush(self.history.table()))
        self._forget()
        self._cut = cut

    def _forget(self) -> None:
        """Latents of chunks that the history holds nothing of any more."""
        if self.kept is not None:
            held = {b.id for b in self.history.table().blocks}
            self.kept = {b: kept for b, kept in self.kept.items() if b in held}
            self.tokens = {b: kept for b, kept in self.tokens.items() if b in held}

    def _prompts(self) -> None:
        """Where prompts are part of the sequence, their K/V are a block of the history, never dropped: its first, made
        anew when another prompt comes into force."""
        prefixes = {name: self.host.prefix(text) for name, text in self.texts.items()}
        positions = {name: at for name, at in prefixes.items() if at is not None}
        if not positions or not any(text.k for text in self.texts.values()):
            return
        for name, text in self.texts.items():
            if not text.k:  # the block is one for all streams
                self.texts[name] = replace(self.host.text_state(text.embeds), start=text.start)
        if old := next((b for b in self.history.blocks if b.role == "anchor" and not b.span), None):
            self.history.reserve(max(0, len(positions["cond"][0]) - old.forms[FULL].tokens))
            self.history.apply(Plan(drops=(Drop(old.id),)))
        block = self.history.admit(0, 0, positions, role="anchor")
        self.history.blocks.insert(0, self.history.blocks.pop())  # time order
        self.history.apply(Plan())
        batch = self.history.shape.batch
        for name, text in self.texts.items():
            for view, k, v in zip(self.history.layers(name, block, write=True), text.k, text.v, strict=True):
                view.put(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1))
            self.texts[name] = replace(text, k=[], v=[])  # the history holds them now
        self.history.commit(block)

    # --- what it holds -----------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        parts = {
            "latents": sum(latents.nbytes for latents in (self.kept or {}).values()),
            "compressor": self.compressing.nbytes + sum(tokens.nbytes for tokens in self.tokens.values()),
        }
        return parts if self.replay is None else parts | {"graphs": self.replay.nbytes}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        remembered, told = self.compressing.state_dict()
        tensors = {f"latents/{block}": latents for block, latents in (self.kept or {}).items()}
        tensors |= {f"tokens/{block}": tokens for block, tokens in self.tokens.items()}
        tensors |= {f"compressor/{name}": tensor for name, tensor in remembered.items()}
        return tensors, {"frame": self.frame, "chunk": self.chunk, "cut": self._cut, "compressing": told}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        part = lambda start: {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        device = self.host.device
        self.frame, self.chunk, self._cut = meta["frame"], meta["chunk"], meta["cut"]
        self.compressing = TakeState.of(part("compressor/"), meta["compressing"], device)
        self.tokens = {int(block): x.to(device) for block, x in part("tokens/").items()}
        if self.kept is not None:
            self.kept = {int(block): x.to(device) for block, x in part("latents/").items()}

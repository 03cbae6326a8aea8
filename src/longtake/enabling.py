"""`longtake.enable`: a diffusers pipeline with an autoregressive loop of its own runs its model chunk by chunk.

    with longtake.enable(pipe, reuse=longtake.FlowCacheReuse("slow"), policy=longtake.FlowCacheKV(...)) as run:
        video = pipe(prompt, ar_step=5, causal_block_size=5, …)

The pipeline keeps its loop, its scheduler and its noise. Only what its transformer computes changes: instead of the
whole window under a dense block-causal mask, the chunks of a row that take a step, one by one, with K/V of the others
kept. On leaving, everything is as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .chunk import Clock
from .errors import LongtakeError, NonFiniteError, PlanError
from .history import RESIDENCIES, History
from .hosts.base import TextState
from .hosts.loading import load
from .hosts.skyreels import SkyReels
from .plan import HistoryShape
from .policies import FullHistory, KVPolicy
from .reuse import Decision, NoReuse, ReusePolicy, ReuseRun, Turn
from .samplers.rollout import last_forwards
from .samplers.stagger import COMMITS

PIPELINES = ("SkyReelsV2DiffusionForcingPipeline",)
_REPLACED = "_longtake_enabled"


@dataclass
class Window:
    """The rows of one window, as the pipeline's own step matrix has them."""

    size: int  # latent frames of a chunk
    frames: int
    ready: int  # chunks that are given
    times: list[float]  # timesteps of a chunk's steps
    levels: list[float]  # noise levels of the pipeline's scheduler, one more than times
    updates: list[list[bool]]  # [row][chunk]: whether the chunk takes a step
    number: int = 0  # what its first chunk would be numbered in the call, if it were not given
    last: int | None = None  # the chunk that is the call's last, if it is in this window

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def in_flight(self) -> int:
        return max(sum(row) for row in self.updates)


@dataclass
class Branch:
    """One guidance branch of one window: its past, and what it has computed."""

    history: History
    policy: KVPolicy
    reuse: ReuseRun
    row: int = 0
    ids: dict[int, int] = field(default_factory=dict)  # chunk in flight → its block in the history
    taken: dict[int, int] = field(default_factory=dict)  # chunk → steps taken
    planned: bool = False
    entered: int = 0  # chunks of the window that are in the history, or were
    scored: set[int] = field(default_factory=set)  # numbers of chunks whose forward in this row may be the last one


class Enabled:
    """What `enable` yields. `clock` counts forwards of chunks, computed and reused, and seconds in them; `decisions`
    are those of the reuse policy in the latest call, by branch, whose generated chunks are numbered through all
    windows."""

    def __init__(self, pipe: Any, host: SkyReels, policy: KVPolicy, reuse: ReusePolicy, commit: str, residency: str):
        self.pipe, self.host, self.policy, self.commit, self.residency = pipe, host, policy, commit, residency
        self.reuse = reuse.for_model(host.reuse_preset)
        self.clock = Clock()
        self.decisions: dict[str, list[Decision]] = {}
        self._window: Window | None = None
        self._frames: int | None = None  # latent frames of this call
        self._made = 0  # … and how many of them the windows so far have
        self._chunks = 0  # chunks that the windows so far generated
        self._runs: dict[str, ReuseRun] = {}  # of this call, by branch
        self._branches: dict[str, Branch] = {}
        self._context: str | None = None
        self._texts: dict[str, tuple[Tensor, TextState]] = {}

    # --- what stands in for methods of the pipeline and its transformer ---------------------------------------------

    def call(self, original: Any, *args: Any, **options: Any) -> Any:
        """`pipe.check_inputs`: a call begins."""
        given = inspect.signature(original).bind(*args, **options).arguments
        stride = self.host.geometry().stride[0]
        self._frames = None if given.get("num_frames") is None else (given["num_frames"] - 1) // stride + 1
        self._made = self._chunks = 0
        self._branches, self._runs, self.decisions = {}, {}, {}
        return original(*args, **options)

    def matrix(self, original: Any, *args: Any, **options: Any) -> Any:
        """`pipe.generate_timestep_matrix`: a window begins."""
        result = original(*args, **options)
        names = ("num_latent_frames", "step_template", "base_num_latent_frames", "ar_step", "num_pre_ready")
        given = dict(zip((*names, "causal_block_size"), args, strict=False)) | options
        frames, size = given["num_latent_frames"], given.get("causal_block_size", 1)
        if size == 1 and self.pipe.transformer.config.num_frame_per_block == 1:
            raise LongtakeError(
                "this call attends in both directions, which leaves nothing to keep: call the pipeline with "
                "causal_block_size=5 (and ar_step=5)"
            )
        if frames % size:
            raise LongtakeError(f"{frames} latent frames are no whole number of blocks of {size}: change num_frames")
        if any(interval != (0, frames) for interval in result[3]):
            raise LongtakeError("this call slides its window while it runs, which is not supported")
        levels, ready = self.pipe.scheduler.sigmas.tolist(), given.get("num_pre_ready", 0) // size
        self._made += frames - ready * size
        ends = self._frames is None or self._made >= self._frames
        updates = result[2][:, ::size].bool()
        times = result[0][:, -1][updates[:, -1].to(result[0].device)].tolist()  # the last chunk's: it is never given
        self._window = Window(
            size, frames, ready, times, levels, updates.tolist(), self._chunks - ready,
            frames // size - 1 if ends else None,
        )  # fmt: skip
        self._chunks += frames // size - ready
        self._branches = {}
        return result

    @contextmanager
    def context(self, original: Any, name: str, **options: Any) -> Iterator[None]:
        """`transformer.cache_context`: says which guidance branch is computed."""
        before, self._context = self._context, name
        try:
            with original(name, **options):
                yield
        finally:
            self._context = before

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None, enable_diffusion_forcing: bool = False, fps: Any = None,
        return_dict: bool = True, attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """The transformer's forward: velocities [B, C, F, h, w] of the chunks that take a step in this row, 0
        elsewhere."""
        window = self._window
        if window is None or self._context is None or not enable_diffusion_forcing:
            raise LongtakeError("inside longtake.enable the transformer is called by its pipeline only")
        if attention_kwargs and attention_kwargs.get("scale") is not None:
            raise LongtakeError("attention_kwargs={'scale': …} has no effect here: use pipe.set_adapters(…)")
        self.host.device, name = hidden_states.device, self._context
        self.host.config = replace(self.host.config, fps=16 if fps is None or fps[0] == 0 else 24)
        text = self._text(name, encoder_hidden_states)
        branch = self._branches.get(name) or self._open(name, window, hidden_states)
        velocity = torch.zeros_like(hidden_states)
        parts, times = hidden_states.split(window.size, 2), timestep[0, :: window.size].tolist()
        given = range(window.ready) if branch.row == 0 else range(0)
        for chunk in (*given, *self._done_before(branch, window)):
            self._clean(branch, chunk, parts[chunk], times[chunk], text)
        takes = [c for c, steps in enumerate(window.updates[branch.row]) if steps and c not in given]
        for chunk in takes:
            if chunk not in branch.ids:
                self._enter(branch, chunk, parts[chunk])
        turns = [self._turn(branch, window, c) for c in takes]
        decided = branch.reuse.decide(turns, [parts[c] for c in takes])
        if branch.policy.moment == "last_forward":
            computed = [turn for turn, yes in zip(turns, decided, strict=True) if yes]
            rows = self._ahead(branch, window, takes)
            branch.scored = last_forwards(branch.reuse, computed, rows, adopts=self.commit == "adopt")
        for chunk, turn, yes in zip(takes, turns, decided, strict=True):
            made = self._step(branch, window, chunk, turn, yes, parts[chunk], text)
            velocity[:, :, chunk * window.size : (chunk + 1) * window.size] = made
        branch.row += 1
        return (velocity,) if not return_dict else _output(velocity)

    # --- chunks ------------------------------------------------------------------------------------------------------

    def _done_before(self, branch: Branch, window: Window) -> list[int]:
        """Chunks that took their last step in an earlier row and are not part of the past yet."""
        return [chunk for chunk in branch.ids if branch.taken.get(chunk) == window.steps]

    def _open(self, name: str, window: Window, x: Tensor) -> Branch:
        host, (batch, _, _, height, width) = self.host, x.shape
        geometry = self._geometry(height, width)
        shape = HistoryShape(
            host.layers, host.kv_heads, host.head_dim, x.element_size(), geometry.tokens_per_frame, window.size, batch,
            frames=window.frames, live_chunks=window.in_flight,
        )  # fmt: skip
        policy = self.policy.settle(shape)
        policy.check(shape)
        scores = type(policy).score is not KVPolicy.score
        history = History(
            shape, host.rotary, streams=(name,), capacity=policy.capacity(shape), visible=policy.visible(shape),
            residency=self.residency, score=policy.score if scores else None,
            key_sums="key_sums" in policy.requires, query_sums="query_sums" in policy.requires,
            offloaded=policy.offloaded(shape), summed=policy.summed(shape),
            dtype=host.dtype, device=host.device,
        )  # fmt: skip
        run = self._runs.setdefault(name, ReuseRun(self.reuse, host.feature))
        self._branches[name] = Branch(history, policy, run)
        return self._branches[name]

    def _turn(self, branch: Branch, window: Window, chunk: int, ahead: int = 0) -> Turn:
        """A chunk's next step, or one so many steps later."""
        at = branch.taken.get(chunk, 0) + ahead
        return Turn(
            window.number + chunk, at, window.steps, window.times[at], window.levels[at], window.levels[at + 1],
            at == window.steps - 1 and chunk == window.last,
        )  # fmt: skip

    def _ahead(self, branch: Branch, window: Window, takes: list[int]) -> list[list[Turn]]:
        """The rows that follow before a chunk enters or finishes: the same chunks take a step in them."""
        rows: list[list[Turn]] = []
        for updates in window.updates[branch.row + 1 :]:
            if updates != window.updates[branch.row]:
                break
            rows.append([self._turn(branch, window, chunk, len(rows) + 1) for chunk in takes])
        return rows

    def _step(
        self, branch: Branch, window: Window, chunk: int, turn: Turn, computed: bool, x: Tensor, text: TextState
    ) -> Tensor:
        """The velocity of a chunk's next step."""
        t, final = turn.timestep, turn.index == window.steps - 1
        residuals = branch.reuse.state(turn.chunk).residuals
        if computed:
            layers = self._layers(branch, chunk, observe=self._observed(branch, turn, final))
            with self.clock:
                if branch.reuse.carries_residual:
                    velocity, residuals[""] = self.host.forward_residual(x, t, text, layers)
                else:
                    velocity = self.host.forward(x, t, text, layers)
            branch.reuse.keep(turn, x, velocity)
        else:
            self.clock.reused += 1
            if branch.reuse.carries_residual:
                velocity, _ = self.host.forward_residual(x, t, text, [], residuals[""])
            else:
                velocity = branch.reuse.carried(turn, x)
        branch.taken[chunk] = turn.index + 1
        if not final:
            return velocity
        self._log(branch, turn.chunk)
        if not torch.isfinite(velocity).all().item():
            raise NonFiniteError(f"chunk {turn.chunk} has NaN or infinite values; try another seed or dtype")
        if self.commit == "adopt":
            self._settle(branch, chunk)
        return velocity

    def _clean(self, branch: Branch, chunk: int, x: Tensor, t: float, text: TextState) -> None:
        """The pass that leaves the K/V of given or finished latents."""
        if chunk not in branch.ids:
            self._enter(branch, chunk, x)
        layers = self._layers(branch, chunk, observe=self.policy.moment == "commit")
        with self.clock:
            self.host.forward(x, t, text, layers)
        self._settle(branch, chunk)

    def _enter(self, branch: Branch, chunk: int, x: Tensor) -> None:
        geometry, first = self._geometry(*x.shape[3:]), chunk * x.shape[2]
        positions = self.host.positions(geometry, first, x.shape[2])
        branch.ids[chunk] = branch.history.admit(first, x.shape[2], positions, grid=geometry.grid)
        branch.entered, branch.planned = max(branch.entered, chunk + 1), False

    def _layers(self, branch: Branch, chunk: int, observe: bool) -> list[Any]:
        history, number = branch.history, self._window.number if self._window else 0
        if not branch.planned:
            try:
                history.apply(branch.policy.plan(history.table(), history.signals(number + branch.entered)))
            except PlanError as error:
                raise PlanError(f"policy {self.policy.name or type(self.policy).__name__}: {error}") from error
            branch.planned = True
        return history.layers(history.streams[0], branch.ids[chunk], write=True, observe=observe)

    def _settle(self, branch: Branch, chunk: int) -> None:
        branch.history.commit(branch.ids.pop(chunk))
        branch.planned = False

    def _observed(self, branch: Branch, turn: Turn, final: bool) -> bool:
        """Whether the policy scores in this forward."""
        moment = branch.policy.moment
        if moment == "last_forward":
            return turn.chunk in branch.scored
        return (moment == "first_step" and turn.index == 0) or (final and moment == "commit" and self.commit == "adopt")

    def _text(self, name: str, embeds: Tensor) -> TextState:
        held = self._texts.get(name)
        if held is None or held[0] is not embeds:
            held = self._texts[name] = (embeds, self.host.text_state(embeds))
        return held[1]

    def _geometry(self, height: int, width: int) -> Any:
        stride = self.host.geometry().stride
        return self.host.geometry(height * stride[1], width * stride[2])

    def _log(self, branch: Branch, number: int) -> None:
        """A chunk is finished: what was decided is kept, what was carried over is not."""
        self.decisions.setdefault(branch.history.streams[0], []).extend(branch.reuse.finish(number))

    def finish(self) -> None:
        """Give back what the last window held."""
        for branch in self._branches.values():
            for number in sorted(branch.reuse.states):
                self._log(branch, number)
        self._window, self._branches, self._runs, self._texts = None, {}, {}, {}


@contextmanager
def enable(
    pipe: Any, *, reuse: ReusePolicy | None = None, policy: KVPolicy | None = None, commit: str = "clean",
    residency: str = "resident",
) -> Iterator[Enabled]:  # fmt: skip
    """Run a `SkyReelsV2DiffusionForcingPipeline` chunk by chunk while the context is open.

    Args:
        pipe: the pipeline; call it with `causal_block_size`, so that its attention is block-causal.
        reuse: reuse policy; default: every step is computed.
        policy: KV policy; default: everything in the window is seen.
        commit: how a finished chunk's K/V become the past: a "clean" pass, once, as the pipeline does at every step; or
            "adopt" what its last computed step left, as FlowCache does.
        residency: where the view lives (see `History`).

    Without policies the video is the pipeline's own up to rounding, except where it adds fresh noise to given frames at
    every step (`addnoise_condition`): here that is done once. Raises LongtakeError for another kind of pipeline, or one
    that is enabled already.
    """
    kind = type(pipe).__name__
    if kind not in PIPELINES:
        raise LongtakeError(f"enable takes a {' or a '.join(PIPELINES)}, not a {kind}: see longtake.Session for others")
    if getattr(pipe.transformer, _REPLACED, False):
        raise LongtakeError("this pipeline is enabled already: leave the other context first")
    if commit not in COMMITS or residency not in RESIDENCIES[:2]:
        raise LongtakeError(
            f"commit={commit!r}, residency={residency!r}: use {' or '.join(COMMITS)}, {' or '.join(RESIDENCIES[:2])}"
        )
    for given, base in ((reuse, ReusePolicy), (policy, KVPolicy)):
        if not isinstance(given, base | None):
            raise LongtakeError(f"{given!r} is no {base.__name__}: give an object of one, or None")
    if reuse is not None and reuse.carries() == "update":
        raise LongtakeError(
            "carry 'update' repeats a change of the latents, but here the pipeline's own scheduler makes every step: "
            "use carry=velocity or carry=residual, or longtake.Session"
        )
    training = pipe.transformer.training
    host = load(pipe)
    assert isinstance(host, SkyReels)
    run = Enabled(pipe, host, policy or FullHistory(), reuse or NoReuse(), commit, residency)
    transformer = pipe.transformer
    replaced = [
        _Replaced(pipe, "check_inputs", run.call),
        _Replaced(pipe, "generate_timestep_matrix", run.matrix),
        _Replaced(transformer, "cache_context", run.context),
        _Replaced(transformer, "forward", lambda original, *args, **options: run.forward(*args, **options)),
    ]
    transformer.__dict__[_REPLACED] = True
    try:
        yield run
    finally:
        for one in reversed(replaced):
            one.undo()
        del transformer.__dict__[_REPLACED]
        host.release()
        transformer.train(training)
        run.finish()


class _Replaced:
    """A method of one object, and nobody else's, replaced: `new` is called with the original first."""

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self.owner, self.name = owner, name
        self.own = name in owner.__dict__  # accelerate's hooks put a forward there
        self.original = getattr(owner, name)
        owner.__dict__[name] = lambda *args, **options: new(self.original, *args, **options)

    def undo(self) -> None:
        if self.own:
            self.owner.__dict__[self.name] = self.original
        else:
            del self.owner.__dict__[self.name]


def _output(velocity: Tensor) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=velocity)

"""`longtake bench packcache`: what a packed history saves on Lumos-1, against two ways of keeping all of it.

One image-to-video take per arm, on the same random weights, prompt and image, frame by frame:

    packcache       anchors and a packed history of constant size
    mask-free       full history in a preallocated cache, no mask, no copy: what it costs when nothing is wasted
    authors-like    full history as published code runs it: a dense float mask, concatenated caches (authors_like.py)

A take of 49 latent frames begins with one of 13, so one run answers for every shorter length. Every arm first makes a
frame that is not counted. The forwards of a frame are equal work, so a frame counts with its median forward: a
machine's hiccup is no arm's; the plain clock stands beside it. Predictions come from forwards timed between the frames
(packcache_prediction.py).

Memory at a length is what a take of that length holds before its last frame, weights left out, and the most that this
frame adds: on a CPU the tensors of its first two steps (the first draws most, in the second what the first left is
alive, too), on a GPU by the allocator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from ..errors import LongtakeError
from ..hosts.lumos import Lumos
from ..policies import FullHistory, KVPolicy, PackCache
from ..samplers.masked import MaskedSampler
from ..session import Session
from .authors_like import AuthorsLike
from .bench_report import Missing
from .bench_stage import Progress, staged
from .lumos_shapes import SHAPES, LumosBench
from .machine import Clock, named, place
from .packcache_prediction import Calibration
from .packcache_ratios import ratios
from .packcache_report import ArmRun, PackReport, Peak
from .peak import PeakBytes

Bytes = tuple[int, int]  # of K/V in use, and of all that the take holds

PIXEL_FRAMES = (24, 48, 96, 192)
MASK_FREE, AUTHORS_LIKE = "mask-free", "authors-like"
BASELINES = (MASK_FREE, AUTHORS_LIKE)
ON_CPU, ON_CUDA = "lumos-cpu", "lumos-1-1b"  # shapes, if none is named
CALIBRATE_EVERY = 6  # frames
GUIDANCE, STREAMS = 15.0, 2
WATCHED = 2 * STREAMS  # forwards of a frame whose memory is looked at
FAILS = (torch.OutOfMemoryError, MemoryError, LongtakeError, RuntimeError)


def run(
    shape: str | LumosBench | None = None, *, frames: Sequence[int] = PIXEL_FRAMES, policy: KVPolicy | None = None,
    baselines: Sequence[str] = BASELINES, steps: int | None = None, device: str | None = None,
    dtype: str | None = None, threads: int | None = None, force: bool = False, seed: int = 0, command: str = "",
    progress: Progress | None = None,
) -> PackReport:  # fmt: skip
    """Measure takes as long as the longest of `frames` (pixel frames) under `policy` and each of `baselines`.

    On a CPU the takes go on in turn, frame by frame, so that a machine that slows down slows all of them; on a GPU,
    whose memory one long take may fill, one after another. An arm that fails, for want of memory say, becomes a row of
    `missing`; what it measured before stays. Without a shape it is "lumos-cpu", on a CUDA device "lumos-1-1b".

    Raises LongtakeError for an unknown shape, baseline or dtype, for lengths without a generated frame, for a policy
    that is not for these models, and on a busy machine unless `force`.
    """
    bench = named(shape or (ON_CUDA if (device or "").startswith("cuda") else ON_CPU), SHAPES)
    where = place(device or bench.device, bench.shape.name, ON_CPU)
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise LongtakeError(f"baseline {unknown[0]!r}: use {' or '.join(BASELINES)}")
    latent = [bench.shape.latent_frames(n) for n in frames]
    if not latent or min(latent) < 2:
        raise LongtakeError(f"{list(frames)} pixel frames: the first one is given, so ask for 2 or more each")
    lengths = list(zip(frames, latent, strict=True))
    steps = bench.steps if steps is None else steps
    if steps < 1:
        raise LongtakeError(f"{steps} steps: give at least 1")
    policy = policy or PackCache()
    per_frame = bench.shape.tokens_per_frame(bench.shape.width, bench.shape.height)
    sizes = bench.shape.history(per_frame, frames=max(latent))
    policy.settle(sizes).check(sizes)  # before what may take hours
    options: dict[str, Any] = {"threads": threads, "force": force, "command": command, "progress": progress}
    with staged(where, dtype or bench.dtype, **options) as stage:
        host, in_turn = bench.host(where, stage.dtype, steps, seed), where.type == "cpu"
        takes: dict[str, Take] = {policy.name: SessionTake(bench, host, policy, "resident", seed)}
        if MASK_FREE in baselines:
            takes[MASK_FREE] = SessionTake(bench, host, FullHistory(), "alias", seed)
        if AUTHORS_LIKE in baselines:
            takes[AUTHORS_LIKE] = AuthorsTake(bench, host, steps, seed)
        calibration = Calibration(bench, steps, max(latent))
        with _forwards(host, stage.clock) as forwards:
            arms, missing = _measure(
                takes, latent, stage.clock, forwards, in_turn=in_turn, progress=stage.progress,
                between=lambda: calibration.again(host, stage.clock),
            )  # fmt: skip
    budget = policy.history_frames if isinstance(policy, PackCache) and policy.budget_tokens is None else None
    found, unreached = ratios(arms, policy.name, lengths, bench.cost, calibration, budget)
    mask = {str(pixels): bench.cost.mask_bytes(bench.cost.full_keys(n - 1)) for pixels, n in lengths}
    report = PackReport(
        **stage.head,
        shape={**asdict(bench.shape), "attention_to_linear_flops_at_13": bench.attention_to_linear()},
        settings=stage.settings | {
            "steps": steps, "policy": policy.name, "policy_options": asdict(policy), "pixel_frames": list(frames),
            "seed": seed, "in_turn": in_turn,
        },
        counts={"weight_bytes": host.memory()["transformer"], "authors_mask_bytes": mask},
        calibration=calibration.as_dict(), arms=arms, ratios=found,
        missing=[*missing, *unreached, *stage.others(SHAPES)],
    )  # fmt: skip
    if report.calibration["e"] is not None:
        for what in ("linear", "attention"):
            name = f"{what} part of a forward of {max(report.calibration['keys'])} keys"
            report.reach(name, stage.settings["dtype"], report.calibration[f"{what}_tflops"])
    report.judge()
    return report


# --- the takes --------------------------------------------------------------------------------------------------------


class Take(Protocol):
    """How an arm makes its take."""

    def frames(self, latent_frames: int) -> Iterator[Bytes]:
        """Begin a take and make its frames one by one; yields its bytes before each and after the last. All are
        written, the last one too."""

    def allocated(self, latent_frames: int) -> int | None:
        """Bytes that a take of this length holds before its last frame; None if it is what `frames` says there."""


@dataclass(frozen=True)
class SessionTake:
    bench: LumosBench
    host: Lumos
    policy: KVPolicy
    residency: str
    seed: int

    def frames(self, latent_frames: int) -> Iterator[Bytes]:
        take = self._session(latent_frames)  # one more than is made: a session does not write the last of its take
        for _ in range(latent_frames - 1):
            yield take.history.held_bytes, take.memory()["total"]
            next(take)
        yield take.history.held_bytes, take.memory()["total"]

    def allocated(self, latent_frames: int) -> int:
        """Everything is allocated at the beginning, for the length of the take."""
        return self._session(latent_frames - 1).memory()["total"]

    def _session(self, chunks: int) -> Session:
        image = torch.zeros(3, self.host.config.height, self.host.config.width)
        return Session(
            self.host, self.policy, prompt_embeds=self.bench.prompt(self.host, self.seed), image=image, seed=self.seed,
            guidance_scale=GUIDANCE, chunks=chunks, residency=self.residency, decode=False,
        )  # fmt: skip


@dataclass(frozen=True)
class AuthorsTake:
    bench: LumosBench
    host: Lumos
    steps: int
    seed: int

    def frames(self, latent_frames: int) -> Iterator[Bytes]:
        host, sampler = self.host, MaskedSampler(steps=self.steps)
        image = torch.zeros(1, 3, host.config.height, host.config.width)
        take = AuthorsLike(
            host, self.bench.prompt(host, self.seed), host.encode_image(image),
            sampler.noise([torch.Generator().manual_seed(self.seed)]), GUIDANCE, sampler,
        )  # fmt: skip
        for _ in range(latent_frames - 1):
            yield take.held_bytes, take.nbytes
            take.next_frame()
        yield take.held_bytes, take.nbytes

    def allocated(self, latent_frames: int) -> None:
        return None


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Forwards:
    """Seconds of the forwards of a frame, in order; `watch` is stopped when the third step begins."""

    seconds: list[float] = field(default_factory=list)
    watch: PeakBytes | None = None

    def begins(self) -> None:
        if self.watch is not None and len(self.seconds) == WATCHED:
            self.watch.stop()


def _measure(
    takes: Mapping[str, Take], lengths: Sequence[int], clock: Clock, forwards: Forwards, *, in_turn: bool,
    progress: Progress, between: Callable[[], None] | None = None,
) -> tuple[dict[str, ArmRun], list[Missing]]:  # fmt: skip
    """Takes as long as the longest of `lengths` (latent frames), whose memory is looked at in the last frame of each.
    `between` is called between frames, until it fails."""
    frames, last = max(lengths) - 1, {n - 1 for n in lengths}
    arms = {name: ArmRun() for name in takes}
    missing: list[Missing] = []
    done = 0
    for group in [list(takes)] if in_turn else [[name] for name in takes]:
        live: dict[str, Iterator[Bytes]] = {}
        held: dict[str, Bytes] = {}
        for name in group:
            with _noted(name, missing):
                arms[name].peaks = [Peak(n, takes[name].allocated(n)) for n in lengths]
                for _ in takes[name].frames(2):
                    pass  # a frame that is not counted: memory is fetched and kernels are made
                live[name] = takes[name].frames(max(lengths))  # no other name for it: it must be gone before the next
                held[name] = next(live[name])  # prompt and image are written
            if name not in held:
                live.pop(name, None)
                _release(clock)
        for number in range(1, frames + 1):
            at = number % len(group)
            for name in group[at:] + group[:at]:
                done += 1
                if name not in live:
                    continue
                failed = True
                with _noted(f"{name} from latent frame {number + 1} on", missing):
                    peaks = [p for p in arms[name].peaks if p.latent_frames == number + 1] if number in last else []
                    held[name] = _frame(arms[name], live[name], held[name], clock, forwards, peaks)
                    failed = False
                if failed:
                    del live[name]
                    _release(clock)
                progress("frames", done, frames * len(takes))
            if between is not None and (number - 1) % CALIBRATE_EVERY == 0:
                failed = True
                with _noted("predictions", missing):
                    between()
                    failed = False
                between = None if failed else between
        live.clear()
        _release(clock)
    return arms, missing


def _frame(
    arm: ArmRun, take: Iterator[Bytes], before: Bytes, clock: Clock, forwards: Forwards, peaks: Sequence[Peak]
) -> Bytes:
    """Make a frame, note what it took; `peaks` are those to be found out in it."""
    forwards.seconds.clear()
    watch = forwards.watch = PeakBytes(existing=True) if peaks and clock.device.type == "cpu" else None
    if watch is not None:
        watch.start()
    with nullcontext([None]) if watch is not None or not peaks else clock.peak() as most:
        started = clock.now()
        try:
            after = next(take)
        finally:
            if watch is not None:
                watch.stop()
        seconds = clock.now() - started
    # watching takes time: those forwards are not counted, unless there are no others
    arm.add(seconds, forwards.seconds, 0 if watch is None else min(WATCHED, len(forwards.seconds) - STREAMS))
    arm.held_bytes.append(after[0])
    for peak in peaks:
        peak.allocated = before[1] if peak.allocated is None else peak.allocated
        peak.transient = most[0] if watch is None else watch.peak
    return after


@contextmanager
def _noted(what: str, missing: list[Missing]) -> Iterator[None]:
    """What fails within it is a row of `missing`."""
    try:
        yield
    except FAILS as error:
        missing.append(Missing(what, str(error).split("\n")[0] or type(error).__name__))


def _release(clock: Clock) -> None:
    gc.collect()
    clock.empty()


@contextmanager
def _forwards(host: Lumos, clock: Clock) -> Iterator[Forwards]:
    """Within `with`, the seconds of every forward of the model are noted."""
    found = Forwards()
    begun: list[float] = []

    def before(*_: Any) -> None:
        found.begins()
        begun.append(clock.now())

    hooks = (
        host.model.register_forward_pre_hook(before),
        host.model.register_forward_hook(lambda *_: found.seconds.append(clock.now() - begun.pop())),
    )
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()

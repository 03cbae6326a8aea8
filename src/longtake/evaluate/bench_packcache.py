"""`longtake bench packcache`: what a packed history saves on Lumos-1, against two ways of keeping all of it.

One image-to-video take per arm, on the same random weights, prompt and image, frame by frame:

    packcache       anchors and a packed history of constant size
    mask-free       full history in a preallocated cache, no mask, no copy: what it costs when nothing is wasted
    authors-like    full history as published code runs it: a dense float mask, concatenated caches (authors_like.py)

A take of 49 latent frames begins with one of 13, so one run answers for every shorter length. The forwards of a frame
are equal work, so a frame counts with its median forward: a machine's hiccup is no arm's. Beside the measured ratios
stand two predictions: FLOPs counted, and two bare forwards timed before the takes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from ..errors import LongtakeError
from ..history import LayerView
from ..hosts.lumos import Lumos
from ..policies import FullHistory, KVPolicy, PackCache
from ..samplers.masked import MaskedSampler
from ..session import Session
from .authors_like import AuthorsLike
from .bench_stage import Progress, staged
from .lumos_shapes import SHAPES, LumosBench
from .machine import Clock, named, place
from .packcache_report import ArmRun, PackReport, Ratio

Bytes = tuple[int, int]  # of K/V in use, and of all that is allocated

PIXEL_FRAMES = (24, 48, 96, 192)
MASK_FREE, AUTHORS_LIKE = "mask-free", "authors-like"
BASELINES = (MASK_FREE, AUTHORS_LIKE)
CALIBRATION_RUNS = 5
GUIDANCE = 15.0


def run(
    shape: str | LumosBench = "lumos-cpu", *, frames: Sequence[int] = PIXEL_FRAMES, policy: KVPolicy | None = None,
    baselines: Sequence[str] = BASELINES, steps: int | None = None, device: str | None = None,
    dtype: str | None = None, threads: int | None = None, force: bool = False, seed: int = 0, command: str = "",
    progress: Progress | None = None,
) -> PackReport:  # fmt: skip
    """Measure takes as long as the longest of `frames` (pixel frames) under `policy` and each of `baselines`.

    On a CPU the takes go on in turn, frame by frame, so that a machine that slows down slows all of them; on a GPU,
    whose memory one long take may fill, one after another.

    Raises LongtakeError for an unknown shape, baseline or dtype, for lengths without a generated frame, and on a busy
    machine unless `force`.
    """
    bench = named(shape, SHAPES)
    where = place(device or bench.device, bench.shape.name, "lumos-cpu")
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise LongtakeError(f"baseline {unknown[0]!r}: use {' or '.join(BASELINES)}")
    latent = [bench.shape.latent_frames(n) for n in frames]
    if not latent or min(latent) < 2:
        raise LongtakeError(f"{list(frames)} pixel frames: the first one is given, so ask for 2 or more each")
    steps = steps or bench.steps
    if steps < 1:
        raise LongtakeError(f"{steps} steps: give at least 1")
    policy = policy or PackCache()
    options: dict[str, Any] = {"threads": threads, "force": force, "command": command, "progress": progress}
    with staged(where, dtype or bench.dtype, **options) as stage:
        host, clock = bench.host(where, stage.dtype, steps, seed), stage.clock
        calibration = _calibrate(bench, host, clock, max(latent))
        takes: dict[str, Callable[[], Iterator[Bytes]]] = {
            policy.name: lambda: _session(bench, host, policy, "resident", max(latent), seed),
        }
        if MASK_FREE in baselines:
            takes[MASK_FREE] = lambda: _session(bench, host, FullHistory(), "alias", max(latent), seed)
        if AUTHORS_LIKE in baselines:
            takes[AUTHORS_LIKE] = lambda: _authors(bench, host, steps, max(latent), seed)
        with _forwards(host, clock) as forwards:
            in_turn = where.type == "cpu"
            arms = _measure(takes, max(latent) - 1, clock, forwards, in_turn=in_turn, progress=stage.progress)
    report = PackReport(
        **stage.head,
        shape={**asdict(bench.shape), "attention_to_linear_flops_at_13": bench.attention_to_linear()},
        settings=stage.settings | {
            "steps": steps, "policy": policy.name, "policy_options": asdict(policy), "pixel_frames": list(frames),
            "seed": seed, "in_turn": where.type == "cpu",
        },
        calibration=calibration, arms=arms, missing=stage.others(SHAPES),
    )  # fmt: skip
    _rate(report, bench, policy.name, list(zip(frames, latent, strict=True)))
    if calibration["e"] is not None:
        for what in ("linear", "attention"):
            name = f"{what} part of a forward of {max(calibration['keys'])} keys"
            report.reach(name, stage.settings["dtype"], calibration[f"{what}_tflops"])
    report.judge()
    return report


# --- the takes --------------------------------------------------------------------------------------------------------


def _session(
    bench: LumosBench, host: Lumos, policy: KVPolicy, residency: str, frames: int, seed: int
) -> Iterator[Bytes]:
    """A take frame by frame; yields its bytes before each and after the last."""
    image = torch.zeros(3, host.config.height, host.config.width)
    # one frame more than are asked for: the last of a take is not written, and all measured ones are to be
    take = Session(
        host, policy, prompt_embeds=bench.prompt(host, seed), image=image, seed=seed, guidance_scale=GUIDANCE,
        chunks=frames, residency=residency, decode=False,
    )  # fmt: skip
    for _ in range(frames - 1):
        yield take.history.held_bytes, take.memory()["total"]
        next(take)
    yield take.history.held_bytes, take.memory()["total"]


def _authors(bench: LumosBench, host: Lumos, steps: int, frames: int, seed: int) -> Iterator[Bytes]:
    sampler = MaskedSampler(steps=steps)
    image = torch.zeros(1, 3, host.config.height, host.config.width)
    take = AuthorsLike(
        host, bench.prompt(host, seed), host.encode_image(image), sampler.noise([torch.Generator().manual_seed(seed)]),
        GUIDANCE, sampler,
    )  # fmt: skip
    for _ in range(frames - 1):
        yield take.nbytes, take.nbytes
        take.next_frame()
    yield take.nbytes, take.nbytes


def _measure(
    takes: dict[str, Callable[[], Iterator[Bytes]]], frames: int, clock: Clock, forwards: list[float], *, in_turn: bool,
    progress: Progress,
) -> dict[str, ArmRun]:  # fmt: skip
    arms = {name: ArmRun() for name in takes}
    groups = [list(takes)] if in_turn else [[name] for name in takes]
    done = 0
    for group in groups:
        live = {name: takes[name]() for name in group}
        held = {name: next(take) for name, take in live.items()}  # prompt and image are written
        for number in range(frames):
            at = number % len(group)
            for name in group[at:] + group[:at]:
                arm, before = arms[name], held[name]
                with clock.peak() as transient:
                    forwards.clear()
                    started = clock.now()
                    held[name] = next(live[name])
                    arm.clock_seconds.append(clock.now() - started)
                extra = len(forwards) * median(forwards) - sum(forwards)
                arm.seconds.append(arm.clock_seconds[-1] + extra)
                arm.held_bytes.append(held[name][0])
                arm.peak_bytes.append(None if transient[0] is None else before[1] + transient[0])
                done += 1
                progress("frames", done, frames * len(takes))
        live.clear()
        gc.collect()
        clock.empty()
    return arms


@contextmanager
def _forwards(host: Lumos, clock: Clock) -> Iterator[list[float]]:
    """Within `with`, the seconds of every forward of the model are added to the list."""
    found: list[float] = []
    begun: list[float] = []
    hooks = (
        host.model.register_forward_pre_hook(lambda *_: begun.append(clock.now())),
        host.model.register_forward_hook(lambda *_: found.append(clock.now() - begun.pop())),
    )
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


# --- predictions ------------------------------------------------------------------------------------------------------


def _calibrate(bench: LumosBench, host: Lumos, clock: Clock, frames: int) -> dict[str, Any]:
    """Seconds of a bare forward over a frame alone and over one with all the keys of the last frame's full history;
    from them, what a FLOP of a matrix product and of attention takes."""
    cost = bench.cost
    few, many = cost.frame_tokens, cost.full_keys(frames - 1)
    times = {keys: _bare(host, keys, clock) for keys in (few, many)}
    head = host.model.config.hidden_size * bench.shape.vocabulary * 2 * cost.frame_tokens
    linear = cost.forward_flops(few)[0] - head  # a bare forward makes no logits
    attention = {keys: cost.forward_flops(keys)[1] for keys in (few, many)}
    per_attention = (times[many] - times[few]) / (attention[many] - attention[few])
    per_linear = (times[few] - per_attention * attention[few]) / linear
    if per_attention <= 0 or per_linear <= 0:  # more keys took no longer: somebody else had the machine
        return {"keys": [few, many], "seconds": [times[few], times[many]], "e": None}
    return {
        "keys": [few, many], "seconds": [times[few], times[many]], "linear_tflops": 1e-12 / per_linear,
        "attention_tflops": 1e-12 / per_attention, "e": per_attention / per_linear,
    }  # fmt: skip


def _bare(host: Lumos, keys: int, clock: Clock) -> float:
    """Least seconds of a forward that attends to `keys` in all; every layer reads the same buffer."""
    geometry = host.geometry()
    n = geometry.tokens_per_frame
    base, _ = host.positions(geometry, 0, 1)
    phases = host.rotary.phases(base.to(host.device))
    k, v = (torch.randn(1, keys, host.kv_heads, host.head_dim, dtype=host.dtype, device=host.device) for _ in range(2))
    views = [LayerView(host.rotary, phases, k, v, slice(keys - n, keys), None, None, None, None)] * host.layers
    ids = torch.zeros(1, n, dtype=torch.int64, device=host.device)
    host.model(ids, views)
    seconds = []
    for _ in range(CALIBRATION_RUNS):
        started = clock.now()
        host.model(ids, views)
        seconds.append(clock.now() - started)
    return min(seconds)


def _rate(report: PackReport, bench: LumosBench, own: str, lengths: Sequence[tuple[int, int]]) -> None:
    """Ratios of every length, beside what FLOPs and the timed forwards predict."""
    cost, e = bench.cost, report.calibration["e"]
    options = report.settings["policy_options"]
    budget = options["history_frames"] if own == "packcache" and options["budget_tokens"] is None else None
    mine = report.arms[own].seconds
    for pixels, latent in lengths:
        for name in report.arms:
            if name == own:
                continue
            full = report.arms[name].seconds
            n = latent - 1
            found = Ratio(pixels, latent, name, sum(full[:n]) / sum(mine[:n]), full[n - 1] / mine[n - 1])
            if budget is not None:
                found.counted = cost.budget_speedup(latent, budget, 1.0)
                found.predicted = None if e is None else cost.budget_speedup(latent, budget, e)
            report.ratios.append(found)

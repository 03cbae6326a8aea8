"""`longtake bench flowcache`: what reuse and a compressed past save on diffusion forcing, and what they change.

    speed     whole takes, arm after arm in every round: diffusers' own asynchronous pipeline (the whole window under a
              dense block-causal mask at every step), chunk by chunk without reuse, and with it; on a named shape with
              random weights where forwards dominate, and on the embedded model
    shapes    a forward of every (queries, keys) that ran, timed by itself: their sum is to predict the takes
    quality   on the embedded model, takes from the same noise with and without (see `flowcache_quality`)

"slow" and "fast" skip the shares of steps that the published FLOPs imply; TeaCache is set to skip as many, in free
takes and, by another threshold, in continued ones.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LongtakeError
from ..history import History
from ..hosts.base import HostConfig
from ..hosts.loading import load
from ..hosts.skyreels import SkyReels
from ..plan import Entry, Plan
from ..session import Session, history_shape
from .bench_report import Target
from .bench_stage import Progress, Stage, staged
from .compare.cells import weights_of
from .flowcache_arms import Arm, arms
from .flowcache_compared import compared
from .flowcache_quality import quality
from .flowcache_report import PIPELINE, FlowCacheReport, ShapeTime, SpeedRow
from .machine import Clock, named, place
from .measure import Figure, ratios
from .random_weights import drawn

ROUNDS, SEEDS = 5, 16
MODEL = "tiny-skyreels"
SMALL = "shown only: forwards of so small a model do not dominate its takes"
REPEATS = 7  # of a forward by itself
PREDICTS = 0.10  # how near the sum over shapes has to come
PREDICTED = ("none", "flowcache slow", "flowcache fast", "teacache as slow", "teacache as fast")
TIMED_CARRY = "flowcache slow, carry residual"  # embedding and head of every reused step; the others add a tensor


@dataclass(frozen=True)
class SkyShape:
    """A named set of sizes of a SkyReels-V2 transformer and its takes, one window long."""

    name: str
    device: str
    about: str
    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_dim: int
    text_tokens: int
    height: int  # pixels, 16 to a token
    width: int
    chunks: int = 5
    chunk_frames: int = 3
    steps: int = 50
    lag: int = 5
    channels: int = 16
    freq_dim: int = 256
    shift: float = 8.0
    dtype: str = "float32"

    def host(self, device: torch.device, dtype: torch.dtype, seed: int) -> SkyReels:
        """A host of this shape, its weights drawn with `seed`."""
        from diffusers import SkyReelsV2Transformer3DModel

        make = lambda: SkyReelsV2Transformer3DModel(
            num_attention_heads=self.heads, attention_head_dim=self.head_dim, in_channels=self.channels,
            out_channels=self.channels, text_dim=self.text_dim, freq_dim=self.freq_dim, ffn_dim=self.ffn_dim,
            num_layers=self.layers,
        )  # fmt: skip
        config = HostConfig(
            host="skyreels", causal=True, chunk_frames=self.chunk_frames, shift=self.shift, height=self.height,
            width=self.width, text_tokens=self.text_tokens, training_frames=self.chunks * self.chunk_frames,
            sampler="staggered", steps=self.steps, lag=self.lag, overlap=self.chunk_frames,
        )  # fmt: skip
        return SkyReels(drawn(make, device, dtype, seed), config, name=self.name)


SHAPES = {
    shape.name: shape
    for shape in (
        SkyShape(
            "cpu-sky", "cpu", "a four-layer SkyReels-V2 on 192×192 pixels, five chunks of 432 tokens, all in flight",
            heads=4, head_dim=64, layers=4, ffn_dim=1024, text_dim=64, text_tokens=32, height=192, width=192,
        ),
        SkyShape(
            "cpu-micro", "cpu", "seconds for a whole run: to try the benchmark, not to measure",
            heads=2, head_dim=12, layers=2, ffn_dim=48, text_dim=8, text_tokens=4, height=32, width=32, channels=4,
            freq_dim=16, steps=12, lag=3,
        ),
        SkyShape(
            "gpu-skyreels-1.3b", "cuda", "SkyReels-V2 1.3B at 960×544, one window of 97 frames",
            heads=12, head_dim=128, layers=30, ffn_dim=8960, text_dim=4096, text_tokens=512, height=544, width=960,
            chunk_frames=5, dtype="bfloat16",
        ),
    )
}  # fmt: skip


def run(
    shape: str | SkyShape = "cpu-sky", *, model: str | None = MODEL, rounds: int = ROUNDS, seeds: int = SEEDS,
    device: str | None = None, dtype: str | None = None, threads: int | None = None, force: bool = False, seed: int = 0,
    judged: FlowCacheReport | None = None, command: str = "", progress: Progress | None = None,
) -> FlowCacheReport:  # fmt: skip
    """Measure takes of a named shape and of `model` (None: of the shape alone) in `rounds`, and what changes in takes
    of `seeds` seeds; 0 of either leaves that part out. `judged` is an earlier report of the same model, whose judgement
    of its takes is taken over instead: that needs no quiet machine.

    Raises LongtakeError for an unknown shape, device, dtype or model, for a report of another model, and on a busy
    machine unless `force`.
    """
    shape = named(shape, SHAPES)
    where = place(device or shape.device, shape.name, "cpu-sky")
    if rounds < 0 or seeds < 0 or not rounds + seeds:
        raise LongtakeError(f"{rounds} rounds, {seeds} seeds: give 1 or more of one; 0 leaves a part out")
    if seeds and model is None:
        raise LongtakeError(f"{seeds} seeds need a model to judge: give --model, or --seeds 0")
    trained = None if model is None else _trained(model, where)
    if judged is not None and (trained is None or not judged.quality):
        raise LongtakeError("a judgement is taken over from a report that has one, and for a model: see --rounds 0")
    with staged(where, dtype or shape.dtype, threads=threads, force=force, command=command, progress=progress) as stage:
        settings = stage.settings | {"rounds": rounds, "seeds": seeds, "seed": seed, "model": model, "repeats": REPEATS}
        report = FlowCacheReport(shape=asdict(shape), settings=settings, **stage.head)
        report.missing = stage.others(SHAPES)
        ways = [] if trained is None else arms(trained, trained.geometry(), trained.config.training_frames)
        if model is not None:
            report.settings["weights"] = weights_of(model)
            report.counts["thresholds"] = _thresholds(ways)
        if judged is not None:
            _take_over(report, judged)
        if rounds:
            host = shape.host(where, stage.dtype, seed)
            said = torch.randn(1, shape.text_tokens, shape.text_dim, generator=torch.Generator().manual_seed(seed))
            _speed(report, host, arms(host, host.geometry(), host.config.training_frames), said, rounds, stage)
            if trained is not None:
                words = trained.encode_prompt([next(iter(trained.config.prompts), "a ball")])
                _speed(report, trained, ways, words, rounds, stage)
            _judge(report)
        if trained is not None and seeds and judged is None:
            report.quality = quality(trained, ways, range(seeds), lambda n, of: stage.progress("quality", n, of))
            report.compared = compared(report.quality)
        report.counts["likeness"] = {
            row.arm: {"psnr": float(np.mean(row.psnr)), "ssim": float(np.mean(row.ssim))}
            for row in report.quality
            if row.psnr
        }
    return report


def _thresholds(ways: Sequence[Arm]) -> dict[str, float]:
    """Those of the trained model, which its preset takes over; of continued takes, where they are others."""
    found = {arm.name: getattr(arm.reuse, "threshold", None) for arm in ways if "," not in arm.name}
    found |= {f"{arm.name}, continued": getattr(arm.continued, "threshold", None) for arm in ways}
    return {name: float(f"{at:.4g}") for name, at in found.items() if at is not None}


def _take_over(report: FlowCacheReport, judged: FlowCacheReport) -> None:
    """The judgement of an earlier report, if it is of the same weights at the same thresholds."""
    for what, now, then in (
        ("weights", report.settings["weights"], judged.settings.get("weights")),
        ("thresholds", report.counts["thresholds"], judged.counts.get("thresholds")),
    ):
        if now != then:
            raise LongtakeError(f"the judgement is of {what} {then}, and now they are {now}: judge again (--rounds 0)")
    report.quality, report.compared = judged.quality, judged.compared
    report.settings |= {
        "seeds": judged.settings["seeds"], "judged": {"command": judged.command, "provenance": judged.provenance},
    }  # fmt: skip


def _trained(model: str, where: torch.device) -> SkyReels:
    host = load(model, device=where)
    if not isinstance(host, SkyReels):
        raise LongtakeError(f"{model} is no SkyReels-V2 model: give one made by `longtake train tiny-skyreels`")
    return host


# --- speed ------------------------------------------------------------------------------------------------------------


def _speed(report: FlowCacheReport, host: SkyReels, ways: list[Arm], embeds: Tensor, rounds: int, stage: Stage) -> None:
    """Takes one window long, all arms in every round, each round beginning with another. Of what may be carried over,
    the residual takes time of its own, since embedding and head run in reused steps too: it is one more arm, and what
    its shapes say falls short by that."""
    geometry, frames, clock = host.geometry(), host.config.training_frames, stage.clock
    ways = [arm for arm in ways if "carry" not in arm.name or arm.name == TIMED_CARRY]
    embeds, pipe = embeds.to(host.device, host.dtype), _pipeline(host)
    rows = {name: SpeedRow(host.name, name) for name in (PIPELINE, *(arm.name for arm in ways))}
    ran: dict[str, Counter[tuple[int, int]]] = {}
    call = lambda steps: pipe(
        None, prompt_embeds=embeds, height=geometry.height, width=geometry.width, num_inference_steps=steps,
        num_frames=geometry.pixel_frames(frames), guidance_scale=1.0, ar_step=host.config.lag, output_type="latent",
        causal_block_size=geometry.chunk_frames, base_num_frames=geometry.pixel_frames(frames),
        generator=torch.Generator().manual_seed(report.settings["seed"]),
    )  # fmt: skip
    call(1)  # warms up, as do the forwards by themselves

    def take(arm: Arm) -> float:
        session = Session(
            host, arm.policy, reuse=arm.reuse, prompt_embeds=embeds, seed=report.settings["seed"], decode=False,
            num_frames=geometry.pixel_frames(frames), sampler=arm.sampler(host), guidance_scale=1.0,
        )  # fmt: skip
        seen: Counter[tuple[int, int]] = Counter()
        ran[arm.name] = seen
        session.history.probe = lambda stream, block, write, layers: seen.update(
            [(layers[0].k_live.shape[1], layers[0].k.shape[1])]
        )
        seconds = clock.seconds(lambda: deque(session, 0))
        rows[arm.name].skipped = session.stats.reused / (session.stats.reused + _stepped(session))
        return seconds

    work: dict[str, Callable[[], float]] = {PIPELINE: lambda: clock.seconds(lambda: call(host.config.steps))}
    work |= {arm.name: partial(take, arm) for arm in ways}
    order = list(work)
    for number in range(rounds):
        for done, name in enumerate(order[number % len(order) :] + order[: number % len(order)]):
            rows[name].seconds.append(work[name]())
            stage.progress(f"takes, {host.name}", number * len(order) + done + 1, rounds * len(order))
    shapes = sorted({shape for counts in ran.values() for shape in counts})
    times = {}
    for done, (queries, keys) in enumerate(shapes):
        times[queries, keys] = forward_seconds(host, embeds, queries, keys, clock)
        stage.progress(f"shapes, {host.name}", done + 1, len(shapes))
    for name, counts in ran.items():
        rows[name].shapes = [ShapeTime(*shape, times[shape], counts[shape]) for shape in sorted(counts)]
    report.speed += list(rows.values())
    for arm in ways:
        seconds = rows[arm.name].seconds
        report.figures += [
            Figure.of(f"{host.name}: {base} / {arm.name}", "×", ratios(rows[base].seconds, seconds))
            for base in (PIPELINE, arm.against)
            if base != arm.name
        ]


def forward_seconds(host: SkyReels, embeds: Tensor, queries: int, keys: int, clock: Clock) -> float:
    """Median seconds of a forward of one chunk of `queries` tokens beside a random past, `keys` tokens in all."""
    geometry = host.geometry()
    per_frame, text = geometry.tokens_per_frame, host.text_state(embeds)
    span, past = queries // per_frame, keys - queries
    shape = history_shape(host, geometry)
    history = History(
        shape, host.rotary, capacity=max(keys, shape.chunk_tokens), visible=keys, dtype=host.dtype, device=host.device
    )
    seen: tuple[Entry, ...] = ()
    if past:
        block = history.admit(0, past // per_frame, host.positions(geometry, 0, past // per_frame), grid=geometry.grid)
        history.apply(Plan())
        size = (1, past, host.kv_heads, host.head_dim)
        for layer in history.layers("cond", block, write=True):
            layer.put(*(torch.randn(size, dtype=host.dtype, device=host.device) for _ in range(2)))
        history.commit(block)
        seen = (Entry(block),)
    frame = past // per_frame
    block = history.admit(frame, span, host.positions(geometry, frame, span), grid=geometry.grid)
    history.apply(Plan(seen))
    x = torch.randn(1, geometry.channels, span, *geometry.latent_size, device=host.device)
    step = lambda: host.forward(x, 500.0, text, history.layers("cond", block, write=True))
    step()
    return median(clock.seconds(step) for _ in range(REPEATS))


def _stepped(session: Session) -> int:
    """Steps that were computed: forwards, less one clean pass for every chunk."""
    return session.stats.forwards - session.stats.chunks


def _pipeline(host: SkyReels) -> Any:
    """Diffusers' own loop around the same weights; it attends through the stock processors."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=host.config.shift
    )
    pipe: Any = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, transformer=host.transformer, vae=host.vae, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- what it comes to -------------------------------------------------------------------------------------------------


def _judge(report: FlowCacheReport) -> None:
    for row in report.speed:
        if row.arm in PREDICTED and row.predicted is not None:
            off = row.predicted / row.median - 1
            judged = abs(off) <= PREDICTS if row.model == report.shape["name"] else None
            report.targets.append(Target(
                f"{row.model}, {row.arm}: times by (queries, keys) predict the take", f"within {PREDICTS:.0%}",
                f"{off:+.1%}", judged, "" if judged is not None else SMALL,
            ))  # fmt: skip

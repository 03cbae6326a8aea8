"""`longtake bench packforcing`: what a compressed, chosen middle costs and saves.

On one named shape with random weights, in one process:

    take      PackForcing for `chunks` chunks: time, attended tokens and bytes chunk by chunk, frames a second
    curves    beside it, in turn: full history (for its first chunks), and the window that holds as many bytes
    parts     of one steady chunk, apart from each other: scores and picks, the view with and without rotation
    score     one layer's score from key sums against the double sum over all queries and keys, by number of blocks

Without `decode` frames are not decoded, and frames a second are the transformer's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from ..attention import logits
from ..errors import LongtakeError
from ..history.parts import Chosen
from ..hosts.wan import CausalWan
from ..policies import FullHistory, KVPolicy, PackForcing, SlidingWindow
from ..samplers.one_by_one import OneByOne
from ..session import Session, history_shape
from .bench_shapes import SHAPES, Shape
from .bench_stage import Progress, Stage, staged
from .machine import named, place
from .measure import Figure
from .packforcing_report import Course, PackForcingReport

BLOCKS = (16, 64, 116)  # candidates a score is measured with; the last is the middle of two minutes
REPEATS = 5


class _Bench:
    def __init__(self, host: CausalWan, shape: Shape, seed: int, decode: bool, stage: Stage) -> None:
        self.host, self.shape, self.seed, self.decode = host, shape, seed, decode
        self.clock, self.progress = stage.clock, stage.progress

    def session(self, policy: KVPolicy, residency: str, chunks: int | None = None) -> Session:
        generator = torch.Generator().manual_seed(self.seed)
        embeds = torch.randn(1, self.shape.text_tokens, self.shape.text_dim, generator=generator)
        return Session(
            self.host, policy, prompt_embeds=embeds, seed=self.seed, residency=residency, chunks=chunks,
            decode=self.decode,
        )  # fmt: skip


def run(
    shape: str | Shape = "cpu-small", *, chunk: int | None = None, chunks: int = 40, full_chunks: int = 20,
    policy: PackForcing | None = None, residency: str = "scratch", repeats: int = REPEATS, decode: bool | None = None,
    blocks: Sequence[int] = BLOCKS, device: str | None = None, dtype: str | None = None, threads: int | None = None,
    force: bool = False, seed: int = 0, command: str = "", progress: Progress | None = None,
) -> PackForcingReport:  # fmt: skip
    """Measure `policy` over `chunks` chunks of `chunk` latent frames at a named shape.

    Full history is followed for `full_chunks` chunks. `decode` puts a video decoder of Wan's size, with random weights,
    behind the transformer (default: on a GPU). Raises LongtakeError for an unknown shape, device or dtype, for too few
    chunks, and on a busy machine unless `force`.
    """
    shape = named(shape, SHAPES)
    shape = replace(shape, chunk_frames=chunk or shape.chunk_frames)
    where = place(device or shape.device, shape.name, "cpu-small")
    policy = policy or PackForcing()
    least = policy.sink + policy.recent + policy.top_k + 4
    if chunks < least or full_chunks < 1 or repeats < 1:
        raise LongtakeError(
            f"{chunks} chunks, {full_chunks} of full history, {repeats} repeats: this policy chooses from chunk "
            f"{least - 2} on, so give --chunks {least} or more, and at least 1 of the others"
        )
    options: dict[str, Any] = {"threads": threads, "force": force, "command": command, "progress": progress}
    with staged(where, dtype or shape.dtype, **options) as stage:
        decode = where.type == "cuda" if decode is None else decode
        host = shape.host(where, stage.dtype, seed)
        if decode:
            host.vae = _decoder(where, stage.dtype)
        bench = _Bench(host, shape, seed, decode, stage)
        sizes = history_shape(host, host.geometry())
        report = PackForcingReport(
            **stage.head, shape=shape.as_dict(), missing=stage.others(SHAPES),
            settings=stage.settings | {
                "chunks": chunks, "full_chunks": full_chunks, "residency": residency, "repeats": repeats,
                "decode": decode, "seed": seed, "policy": asdict(policy), "compressor": host.compressor.describe(),
            },
        )  # fmt: skip
        session = _take(bench, report, policy, residency, chunks)
        _parts(bench, report, session, repeats)
        _arms(bench, report, policy, residency, chunks, full_chunks, sizes)
        _scores(bench, report, blocks, sizes.compressed_tokens, repeats)
    return report


# --- the take ---------------------------------------------------------------------------------------------------------


def _follow(bench: _Bench, session: Session, name: str, chunks: int) -> Course:
    """A take from its first chunk on."""
    course = Course()
    for number in range(chunks):
        course.seconds.append(bench.clock.seconds(lambda: next(session)))
        stats = session.stats.last
        assert stats is not None
        course.outside.append(stats.overhead_seconds)
        course.compress.append(stats.compress_seconds)
        course.attended.append(stats.attended_tokens)
        course.history_bytes.append(stats.history_bytes)
        bench.progress(name, number + 1, chunks)
    return course


def _take(bench: _Bench, report: PackForcingReport, policy: PackForcing, residency: str, chunks: int) -> Session:
    if bench.host.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.host.device)
    session = bench.session(policy, residency)
    course = report.courses["packforcing"] = _follow(bench, session, "packforcing", chunks)
    steady = slice(policy.sink + policy.recent + policy.top_k + 2, None)  # something is chosen in all of these
    times, frames = course.seconds[steady], 4 * bench.shape.chunk_frames  # pixel frames of a chunk
    share = lambda part: [a / b for a, b in zip(part[steady], times, strict=True)]
    report.figures += [
        Figure.of("chunk", "ms", [1e3 * s for s in times], bench.seed),
        Figure.of("frames a second", "frames/s", [frames / s for s in times], bench.seed),
        Figure.of("compression / chunk", "", share(course.compress), bench.seed),
        Figure.of("outside the model's forwards / chunk", "", share(course.outside), bench.seed),
    ]
    cost = bench.shape.flops.forward(session.history.shape.chunk_tokens, course.attended[-1], bench.shape.text_tokens)
    forwards = len(session.schedule.timesteps) + 1
    report.reach("a chunk", report.settings["dtype"], cost.total * forwards / float(np.median(times)) / 1e12)
    memory = session.memory()
    report.counts |= {
        "attended_tokens": course.attended[-1], "history_bytes": course.history_bytes[-1],
        "compressed_tokens": session.history.shape.compressed_tokens, "session_bytes": memory,
        "device_bytes": torch.cuda.max_memory_allocated(bench.host.device)
        if bench.host.device.type == "cuda" else None,
        "sustained_frames_per_second": frames * len(times) / sum(times),
        "seconds_of_video": chunks * frames / bench.host.config.fps,
    }  # fmt: skip
    return session


def _parts(bench: _Bench, report: PackForcingReport, session: Session, repeats: int) -> None:
    """What a chunk's view takes, each part by itself, against the median chunk."""
    chunk = report.figure("chunk").median
    assert chunk is not None
    host, history, rollout = bench.host, session.history, session.rollout
    assert isinstance(rollout, OneByOne)
    found: dict[str, list[float]] = {"selection": [], "view": [], "copy": []}
    for _ in range(repeats):
        block = rollout.admit(bench.shape.chunk_frames)
        view = history.views["cond"]
        size = (1, history.shape.chunk_tokens, host.kv_heads, host.head_dim)
        q = torch.randn(size, dtype=host.dtype, device=host.device)

        def select(choices: Sequence[Chosen] = tuple(view.choices), q: torch.Tensor = q) -> None:
            for choice in choices:
                if choice.entry.shared:
                    choice.settle(dict.fromkeys(range(host.layers), q))
                else:
                    for layer in range(host.layers):
                        choice.picked[layer] = choice._pick(choice.scores(layer, q))

        found["selection"].append(bench.clock.seconds(select))
        k, v = (torch.empty(1, view.n, *size[2:], dtype=host.dtype, device=host.device) for _ in range(2))

        def fill(view: Any = view, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            for layer in range(host.layers):
                start = 0
                for part in view.parts:
                    part.fill(layer, k[:, start : start + part.n], v[:, start : start + part.n], None)
                    start += part.n

        source = torch.randn(2, *k.shape, dtype=host.dtype, device=host.device)

        def copy(k: torch.Tensor = k, v: torch.Tensor = v, source: torch.Tensor = source) -> None:
            for _ in range(host.layers):
                k.copy_(source[0])
                v.copy_(source[1])

        fill()  # warms up
        found["view"].append(bench.clock.seconds(fill))
        found["copy"].append(bench.clock.seconds(copy))
        history.abandon(block)
    moved = 4 * host.layers * k.nbytes / 1e9  # of K and V, read and written
    report.reach("view of one forward (gather and rotate)", "copy", moved / float(np.median(found["view"])))
    report.reach("plain copy of as much", "copy", moved / float(np.median(found["copy"])))
    forwards = len(session.schedule.timesteps) + 1
    times = forwards if history.residency == "scratch" else 1  # a scratch view is built anew for every forward
    shares = {
        "selection / chunk": [1e3 * s / chunk for s in found["selection"]],
        "view (gather and rotate) / chunk": [times * 1e3 * s / chunk for s in found["view"]],
        "re-positioning (view less a plain copy) / chunk": [
            times * 1e3 * (a - b) / chunk for a, b in zip(found["view"], found["copy"], strict=True)
        ],
    }
    report.figures += [Figure.of(name, "", values, bench.seed) for name, values in shares.items()]


def _arms(
    bench: _Bench, report: PackForcingReport, policy: PackForcing, residency: str, chunks: int, full_chunks: int,
    sizes: Any,
) -> None:  # fmt: skip
    """The window of the same bytes, and full history as far as it is followed; then ratios to PackForcing."""
    budget = policy.capacity(sizes) * sizes.token_bytes
    window = SlidingWindow(sink=min(bench.shape.sink, sizes.chunk_frames)).fit(budget, sizes)
    steady = -(-window.frames // sizes.chunk_frames) + 2
    length = max(chunks, steady + 3)
    report.courses["window of the same bytes"] = _follow(bench, bench.session(window, residency), "window", length)
    full = bench.session(FullHistory(), residency, chunks=full_chunks)
    report.courses["full history"] = _follow(bench, full, "full history", full_chunks)
    report.settings |= {"window": asdict(window), "budget_bytes": budget}
    own = report.figure("chunk").median
    assert own is not None
    other = report.courses["window of the same bytes"]
    report.figures += [
        Figure.of("window's chunk / packforcing's", "", [1e3 * s / own for s in other.seconds[steady:]], bench.seed),
        Figure.of("full history's last chunks / packforcing's", "",
                  [1e3 * s / own for s in report.courses["full history"].seconds[-3:]], bench.seed),
    ]  # fmt: skip
    report.counts |= {
        "window_attended_tokens": other.attended[-1],
        "full_attended_tokens": report.courses["full history"].attended[-1],
    }


def _scores(bench: _Bench, report: PackForcingReport, blocks: Sequence[int], tokens: int, repeats: int) -> None:
    """One layer's score by key sums and by the whole double sum, of M blocks; the two must agree."""
    host, policy = bench.host, PackForcing()
    queries = host.geometry().tokens_per_frame * bench.shape.chunk_frames
    random = lambda *size: torch.randn(1, *size, host.kv_heads, host.head_dim, dtype=host.dtype, device=host.device)
    q = random(queries)
    for number, count in enumerate(blocks):
        keys = random(count * tokens)
        sums = keys.float().unflatten(1, (count, tokens)).sum(2)
        fast = lambda sums=sums: policy.score(q, sums)
        whole = lambda keys=keys, count=count: _double_sum(q, keys, count)
        fast()
        times = [bench.clock.seconds(fast) for _ in range(repeats)]
        report.figures.append(Figure.of(f"score of {count} blocks by key sums", "ms", [1e3 * s for s in times]))
        name = f"score of {count} blocks by all pairs"
        slow = [bench.clock.seconds(whole) for _ in range(repeats)]
        report.figures.append(Figure.of(name, "ms", [1e3 * s for s in slow]))
        a, b = fast().double(), whole().double()
        report.counts[f"score_agreement_{count}"] = float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))
        bench.progress("scores", number + 1, len(blocks))


def _double_sum(q: torch.Tensor, keys: torch.Tensor, blocks: int) -> torch.Tensor:
    """Eq. 11 as it is written, in blocks of queries: [B, M]."""
    total = torch.zeros(q.shape[0], blocks, device=q.device)
    for part in q.split(256, 1):
        total += logits(part, keys).sum((1, 2)).unflatten(1, (blocks, -1)).sum(2)
    return total


def _decoder(place: torch.device, dtype: torch.dtype) -> Any:
    """Wan2.1's autoencoder with random weights: decoding takes what it takes."""
    from diffusers import AutoencoderKLWan

    with torch.device(place):
        vae: Any = AutoencoderKLWan()
    return vae.to(dtype).eval().requires_grad_(False)

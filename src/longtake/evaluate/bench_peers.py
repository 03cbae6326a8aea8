"""`longtake bench peers`: our sessions beside other people's caches, in one process, in turn.

Peers are whole takes from the first chunk on, with random weights of the same sizes, dtype and attention call:

    growing     our host with a cache that `torch.cat` grows, as forks have it; ours sees the same: full history
    shifted     our host with a window that is moved to the left when it is full; ours: the window
    anyflow     diffusers' AnyFlow-FAR pipeline as it is; anyflow-sdpa: the same through SDPA
    skyreels    diffusers' asynchronous SkyReels-V2 pipeline; ours: the same transformer, K/V kept
    scoring     FlowCacheKV's score with whole matrices; ours: the streamed score, which keeps the same tokens

`match="tokens"`: ours attends to as many tokens as the peer does at its last chunk. `match="bytes"`: ours holds at most
the K/V bytes that the peer holds at its end, view included, and sees what fits. Ratios are peer / ours, paired by
repeat; which side begins changes from repeat to repeat.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..chunk import ChunkStats
from ..errors import LongtakeError
from ..hosts.wan import CausalWan
from ..named import spec
from ..plan import HistoryShape
from ..policies import FlowCacheKV, FullHistory, KVPolicy, SlidingWindow
from ..samplers.stagger import Stagger
from ..session import Session, history_shape
from .bench_flowcache_kv import explicit_score
from .bench_peer_caches import CachedTake, Growing, Shifted
from .bench_peer_pipelines import AnyFlow, AsyncSkyReels, Staggering
from .bench_report import Missing
from .bench_shapes import SHAPES, Shape
from .bench_stage import Progress, Stage, staged
from .machine import named, place
from .measure import Figure, ratios
from .peers_report import Pair, PeersReport, Run, Side

MATCHES = ("tokens", "bytes")
FITTING = 8  # tries to find the largest policy that holds no more than the peer
SCORED_CHUNKS = 3  # of history, for the score

Work = Callable[[], Run]


def run(
    shape: str | Shape = "cpu-small", *, peers: Sequence[str] | None = None, match: str = "tokens",
    policy: KVPolicy | None = None, chunks: int = 20, repeats: int = 5, device: str | None = None,
    dtype: str | None = None, threads: int | None = None, force: bool = False, seed: int = 0, command: str = "",
    progress: Progress | None = None,
) -> PeersReport:  # fmt: skip
    """Measure takes of `chunks` chunks, `repeats` times, ours and theirs in turn, for each of `peers` (default all).

    `policy` is what is fitted when `match` is "bytes" (default the window). A peer that cannot run here becomes a
    missing row with the reason. Raises LongtakeError for unknown names, and on a busy machine unless `force`.
    """
    shape = named(shape, SHAPES)
    where = place(device or shape.device, shape.name, "cpu-small")
    asked = list(peers or PEERS)
    if unknown := [name for name in asked if name not in PEERS]:
        raise LongtakeError(f"peer {unknown[0]!r}: use one of {', '.join(PEERS)}")
    if match not in MATCHES:
        raise LongtakeError(f"match {match!r}: use {' or '.join(MATCHES)}")
    if chunks < 4 or repeats < 2:
        raise LongtakeError(f"{chunks} chunks, {repeats} repeats: give at least 4 chunks and 2 repeats")
    policy = policy or SlidingWindow(shape.window, sink=shape.sink)
    options: dict[str, Any] = {"threads": threads, "force": force, "command": command, "progress": progress}
    with staged(where, dtype or shape.dtype, **options) as stage:
        report = PeersReport(
            **stage.head, shape=shape.as_dict(), missing=stage.others(SHAPES),
            settings=stage.settings | {
                "match": match, "policy": spec(policy), "chunks": chunks, "repeats": repeats, "seed": seed,
            },
        )  # fmt: skip
        bench = _Bench(shape, stage, match, policy, chunks, seed)
        for number, name in enumerate(asked):
            try:
                theirs, ours, work = PEERS[name](bench)
                _measure(report, Pair(name, Side(theirs), Side(ours)), work, repeats)
            except LongtakeError as error:
                report.missing.append(Missing(name, str(error)))
            gc.collect()
            stage.clock.empty()
            stage.progress("peers", number + 1, len(asked))
    return report


def _measure(report: PeersReport, pair: Pair, work: tuple[Work, Work], repeats: int) -> None:
    """Both sides in turn, after a run of each that only warms up. Raises LongtakeError if the peer does not run."""
    try:
        work[0]()
    except Exception as error:  # other people's code, of whatever version is installed
        told = str(error).strip().partition("\n")[0]
        raise LongtakeError(f"it does not run here, {type(error).__name__}: {told}") from error
    work[1]()
    for repeat in range(repeats):
        turn = list(zip((pair.theirs, pair.ours), work, strict=True))
        for side, one in turn if repeat % 2 == 0 else turn[::-1]:
            side.note(one())
    report.pairs.append(pair)
    report.figures += [
        Figure.of(f"{pair.peer}: peer / ours, whole", "", ratios(pair.theirs.whole, pair.ours.whole)),
        Figure.of(f"{pair.peer}: peer / ours, last chunk", "", ratios(pair.theirs.last, pair.ours.last)),
    ]
    for name, side in (("peer", pair.theirs), ("ours", pair.ours)):
        if side.flops:
            rate = 1e-12 * sum(side.flops) / float(np.median(side.whole))
            report.reach(f"{pair.peer}: {name}", report.settings["dtype"], rate)


# --- the pairs: what theirs and ours are, and a run of each -----------------------------------------------------------


@dataclass
class _Bench:
    shape: Shape
    stage: Stage
    match: str
    policy: KVPolicy
    chunks: int
    seed: int
    _host: CausalWan | None = None

    @property
    def host(self) -> CausalWan:
        self._host = self._host or self.shape.host(self.stage.device, self.stage.dtype, self.seed)
        return self._host

    def embeds(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(1, self.shape.text_tokens, self.shape.text_dim, generator=generator)

    def cost(self, keys: int) -> int:
        """FLOPs of a chunk that sees so many keys, its commit pass included."""
        cost = self.shape.flops.forward(self.shape.chunk_tokens, keys, self.shape.text_tokens)
        return cost.total * (len(self.shape.timesteps) + 1)

    def cached(self, cache: Callable[[], Any]) -> Work:
        """A take of our host with another cache."""

        def work() -> Run:
            take, done = CachedTake(self.host, self.embeds(), self.seed, cache), Run([])
            for _ in range(self.chunks):
                done.seconds.append(self.stage.clock.seconds(lambda: next(take)))
                done.attended.append(take.attended)
                done.flops.append(self.cost(take.attended))
            done.held_bytes = take.nbytes
            return done

        return work

    def session(self, policy: KVPolicy, residency: str, host: Any = None, **options: Any) -> Session:
        return Session(
            host or self.host, policy, prompt_embeds=self.embeds(), seed=self.seed, residency=residency, decode=False,
            chunks=self.chunks, **options,
        )  # fmt: skip

    def ours(self, policy: KVPolicy, residency: str) -> Work:
        def work() -> Run:
            take, done = self.session(policy, residency), Run([])
            for _ in range(self.chunks):
                done.seconds.append(self.stage.clock.seconds(lambda: next(take)))
                assert take.stats.last is not None
                done.attended.append(take.stats.last.attended_tokens)
                done.flops.append(self.cost(done.attended[-1]))
            done.held_bytes = _kv_bytes(take)
            return done

        return work

    def against(self, tokens: int, held: int, same: tuple[KVPolicy, str] | None = None) -> tuple[str, Work]:
        """Ours: what sees `tokens` at the last chunk (`same`, where there is a policy that sees just what the peer
        does), or what holds at most `held` bytes."""
        if self.match == "bytes":
            policy, residency = self._fitted(held)
        else:
            frames = tokens // (self.shape.chunk_tokens // self.shape.chunk_frames)
            policy, residency = same or (SlidingWindow(frames, sink=self.shape.sink), "resident")
        return f"{spec(policy)}, {residency} view", self.ours(policy, residency)

    def _fitted(self, held: int) -> tuple[KVPolicy, str]:
        """The largest configuration of the policy that holds at most so many bytes, view included."""
        sizes: HistoryShape = history_shape(self.host, self.host.geometry())
        budget = held
        for _ in range(FITTING):
            policy = self.policy.fit(budget, sizes)
            take = self.session(policy, "scratch")
            if (found := _kv_bytes(take)) <= held:
                return policy, "scratch"
            budget = min(budget - 1, budget * held // found)
        raise LongtakeError(f"no configuration of {spec(self.policy)} holds at most the peer's {held} bytes of K/V")


def _kv_bytes(take: Session) -> int:
    """Store and view."""
    return sum(take.history.memory().values())


Pairing = tuple[str, str, tuple[Work, Work]]


def _growing(bench: _Bench) -> Pairing:
    theirs = bench.cached(lambda: Growing(bench.host.rotary))
    tokens = bench.chunks * bench.shape.chunk_tokens
    sizes = history_shape(bench.host, bench.host.geometry())
    ours, work = bench.against(tokens, tokens * sizes.token_bytes, (FullHistory(), "alias"))
    return "our host, torch.cat", ours, (theirs, work)


def _shifted(bench: _Bench) -> Pairing:
    shape = bench.shape
    frame = shape.chunk_tokens // shape.chunk_frames
    size = (1, shape.window * frame, shape.heads, shape.head_dim)
    like = torch.empty(0, dtype=bench.stage.dtype, device=bench.stage.device)
    theirs = bench.cached(lambda: Shifted(bench.host.rotary, size, shape.sink * frame, like))
    held = 2 * shape.layers * like.itemsize * size[1] * size[2] * size[3]
    same = SlidingWindow(shape.window, sink=shape.sink)
    ours, work = bench.against(shape.window * frame, held, (same, "resident"))
    return f"our host, window of {shape.window} moved to the left", ours, (theirs, work)


def _anyflow(bench: _Bench, sdpa: bool = False) -> Pairing:
    # its last chunk is not written, and so not measured: one more
    peer = AnyFlow(bench.shape, bench.stage.device, bench.stage.dtype, bench.seed, bench.chunks + 1, sdpa)

    def theirs() -> Run:
        found = peer.take()
        return Run(found.seconds, found.attended, found.flops, peer.nbytes)

    ours, work = bench.against(peer.cost(bench.chunks - 1)[1], peer.nbytes)
    how = "through SDPA" if sdpa else "flex_attention, as it is"
    return f"diffusers' AnyFlow-FAR pipeline, {how}", ours, (theirs, work)


def _skyreels(bench: _Bench) -> Pairing:
    if bench.match == "bytes":
        raise LongtakeError("the pipeline keeps no K/V: only match=tokens compares it")
    # one window's worth in the chunks of the shape, with twice its steps: each chunk is two behind the one before
    how = Staggering(bench.shape.window // bench.shape.chunk_frames, bench.shape.chunk_frames,
                     2 * len(bench.shape.timesteps), 2)  # fmt: skip
    peer = AsyncSkyReels(bench.shape, bench.stage.device, bench.stage.dtype, bench.seed, how)
    sampler = Stagger(how.steps, how.lag, how.chunks * how.chunk_frames, commit="adopt")

    def theirs() -> Run:
        found = peer.take()
        return Run(found.seconds, found.attended, found.flops, 0)

    def ours() -> Run:
        take = Session(
            peer.host, FullHistory(), prompt_embeds=peer.embeds, seed=bench.seed, sampler=sampler, decode=False,
            residency="resident", chunks=how.chunks, guidance_scale=1.0,
        )  # fmt: skip
        made: list[ChunkStats] = []
        seconds = bench.stage.clock.seconds(lambda: made.extend(chunk.stats for chunk in take))
        attended, flops = max(s.attended_tokens for s in made), sum(s.flops.total for s in made)
        return Run([seconds], [attended], [flops], _kv_bytes(take))

    about = f"{how.chunks} chunks of {how.chunk_frames}, {how.steps} steps, lag {how.lag}"
    return f"diffusers' asynchronous SkyReels-V2 pipeline, {about}", "same transformer, K/V kept", (theirs, ours)


def _scoring(bench: _Bench) -> Pairing:
    shape, generator = bench.shape, torch.Generator().manual_seed(bench.seed)
    draw = lambda n: torch.randn(1, n, shape.heads, shape.head_dim, generator=generator).to(
        bench.stage.device, bench.stage.dtype
    )
    q, k = draw(shape.chunk_tokens), draw(SCORED_CHUNKS * shape.chunk_tokens)
    policy = FlowCacheKV(frame_tokens=shape.chunk_tokens // shape.chunk_frames, chunk_tokens=shape.chunk_tokens)
    one = lambda score: lambda: Run([bench.stage.clock.seconds(score)], [k.shape[1]])
    explicit = one(lambda: explicit_score(q, k, policy.mix, policy.pool))
    what = f"one layer's score of {k.shape[1]} keys"
    return f"{what}, whole matrices", f"{what}, streamed", (explicit, one(lambda: policy.score(q, k)))


PEERS: dict[str, Callable[[_Bench], Pairing]] = {
    "growing": _growing, "shifted": _shifted, "anyflow": _anyflow,
    "anyflow-sdpa": lambda bench: _anyflow(bench, sdpa=True), "skyreels": _skyreels, "scoring": _scoring,
}  # fmt: skip

"""Compressing one layer of a full-size past: with FlowCacheKV's score, and with the formulas written out per head.

Random K/V and queries of a model's shape, three chunks of history, one chunk of queries. Both ways score every token in
fp32, choose two chunks' worth per head, and gather the K/V of these in ascending order. Measured: time, each run of the
slow explicit way between two of the other; the most bytes of tensors alive beyond the inputs (the gathered K/V among
them); and how many survivors the two have in common.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LongtakeError
from ..policies import FlowCacheKV
from .bench_report import Report, Target, table
from .bench_stage import Progress, Stage, staged
from .machine import named, place
from .measure import Figure, ratios
from .peak import PeakBytes

LIMIT = 10**9  # bytes of transient memory held to
FEW = 6  # of fewer values than these, a 95 % interval of the median is their whole range


@dataclass(frozen=True)
class LayerShape:
    """One layer: tokens of a frame and a chunk, heads, and the model it is of."""

    about: str
    frame_tokens: int
    chunk_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    chunks: int = 3


SHAPES = {
    "magi-4.5b": LayerShape("MAGI-1 4.5B at 720x720", 2025, 12_150, 24, 8, 128),
    "micro": LayerShape("to try it", 12, 72, 6, 2, 16),
}


def explicit_score(q: Tensor, k: Tensor, mix: float, pool: int) -> Tensor:
    """The score [B, Hk, Nk] with whole matrices, one KV head at a time: all logits, and all cosines."""
    heads, dim = k.shape[2:]
    grouped = q.unflatten(2, (heads, -1))
    scores = []
    for h in range(heads):
        key = k[:, :, h].float()
        logits = torch.einsum("bqgd,bkd->bgqk", grouped[:, :, h].float(), key).amax(1) * dim**-0.5
        importance = F.max_pool1d(logits.softmax(-1).mean(1), pool, 1, pool // 2)
        del logits
        unit = F.normalize(key, dim=-1)
        cosine = unit @ unit.transpose(-1, -2)  # [B, Nk, Nk]
        cosine.diagonal(dim1=-2, dim2=-1).zero_()
        scores.append(mix * importance - (1 - mix) * cosine.mean(1).softmax(-1))
        del cosine
    return torch.stack(scores, 1)


Compressed = tuple[Tensor, Tensor, Tensor]  # survivors [B, Hk, n], their K and V [B, n, Hk, D]


def compressed(score: Tensor, k: Tensor, v: Tensor, count: int) -> Compressed:
    """The `count` best tokens of every head by score [B, Hk, Nk], in ascending order, and their K and V."""
    kept = score.topk(count, -1).indices.sort(-1).values
    at = kept.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, k.shape[3])
    return kept, k.gather(1, at), v.gather(1, at)


@dataclass(kw_only=True)
class CompressionReport(Report):
    """What a benchmark run found."""

    kind: ClassVar[str] = "flowcache-kv"

    transient_bytes: dict[str, int]  # beyond the inputs, by method
    common_survivors: float  # share that both methods keep

    def judge(self) -> None:
        factor = min(self.figure("explicit / streamed").values)
        streamed = self.transient_bytes["streamed"]
        self.targets = [
            Target("streamed: bytes above the inputs", f"< {LIMIT / 1e9:g} GB", _gb(streamed), streamed < LIMIT),
            Target("explicit / streamed, the least found", "> 1", f"{factor:.3g}", factor > 1),
        ]

    def own_lines(self) -> list[str]:
        return [
            *self._few(),
            *(f"{name}: {_gb(size)} above the inputs" for name, size in self.transient_bytes.items()),
            f"survivors in common: {self.common_survivors:.4%}",
        ]

    def own_tables(self) -> list[str]:
        rows = [(name, _gb(size)) for name, size in self.transient_bytes.items()]
        return [*self._few(), table(("method", "bytes above the inputs"), rows)]

    def _few(self) -> list[str]:
        """What the intervals below are, where they are none."""
        n = self.figure("explicit, per layer").n
        return [f"{n} runs of the explicit way: its intervals are from the least found to the most"] if n < FEW else []


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f} GB"


def run(
    shape: str = "magi-4.5b", *, pairs: int = 2, device: str | None = None, dtype: str | None = None,
    threads: int | None = None, force: bool = False, command: str = "", progress: Progress | None = None,
) -> CompressionReport:  # fmt: skip
    """Measure; `pairs` are runs of the explicit way, and one more of the streamed. Raises LongtakeError for unknown
    names, a busy machine or too little memory."""
    size = named(shape, SHAPES)
    if pairs < 1:
        raise LongtakeError(f"{pairs} pairs: give at least 1")
    where = place(device or ("cuda" if torch.cuda.is_available() else "cpu"), shape, f"{shape} --device cpu")
    options: dict[str, Any] = {"threads": threads, "force": force, "command": command, "progress": progress}
    with staged(where, dtype or "bfloat16", **options, ceilings=("float32",)) as stage:
        return _measured(size, shape, pairs, stage)


def _measured(size: LayerShape, name: str, pairs: int, stage: Stage) -> CompressionReport:
    device, progress, clock = stage.device, stage.progress, stage.clock
    noise = torch.Generator().manual_seed(0)
    keys = size.chunks * size.chunk_tokens
    draw = lambda n, heads: torch.randn(1, n, heads, size.head_dim, generator=noise).to(device, stage.dtype)
    q, k, v = draw(size.chunk_tokens, size.heads), draw(keys, size.kv_heads), draw(keys, size.kv_heads)
    count = (size.chunks - 1) * size.chunk_tokens
    policy = FlowCacheKV(frame_tokens=size.frame_tokens, chunk_tokens=size.chunk_tokens)
    methods: dict[str, Callable[[], Compressed]] = {
        "streamed": lambda: compressed(policy.score(q, k), k, v, count),
        "explicit": lambda: compressed(explicit_score(q, k, policy.mix, policy.pool), k, v, count),
    }
    if device.type == "cuda":
        for method in methods.values():  # kernels are compiled and chosen
            method()
    seconds: dict[str, list[float]] = {label: [] for label in methods}
    transient, kept = dict.fromkeys(methods, 0), dict[str, Tensor]()

    def once(label: str) -> None:
        kept[label] = methods[label]()[0]

    for pair in range(pairs + 1):  # explicit ones stand between, so that a drifting machine favours neither
        for label in ("explicit", "streamed")[0 if pair else 1 :]:
            with _Watch(device) as watch:
                seconds[label].append(clock.seconds(partial(once, label)))
            transient[label] = max(transient[label], watch.peak)
        progress("pairs", pair, pairs)
    around = [sum(two) / 2 for two in itertools.pairwise(seconds["streamed"])]
    how = "allocator" if device.type == "cuda" else "tensors alive; scratch inside kernels is not seen"
    report = CompressionReport(
        **stage.head, shape={"name": name, **asdict(size)},
        settings=stage.settings | {"pairs": pairs, "transient": how},
        counts={"keys": keys, "queries": size.chunk_tokens}, transient_bytes=transient,
        common_survivors=_common(kept["streamed"].cpu(), kept["explicit"].cpu()),
        figures=[
            *(Figure.of(f"{label}, per layer", "s", values) for label, values in seconds.items()),
            Figure.of("explicit / streamed", "×", ratios(seconds["explicit"], around)),
        ],
    )  # fmt: skip
    logits, cosines = (2 * n * keys * h * size.head_dim for n, h in ((len(q[0]), size.heads), (keys, size.kv_heads)))
    for label, flops in (("streamed", logits), ("explicit", logits + cosines)):  # sums do for the streamed cosines
        report.reach(f"{label}: its products", "float32", flops / float(np.median(seconds[label])) / 1e12)
    report.judge()
    return report


class _Watch:
    """`peak`: the most bytes alive within it beyond those at its beginning. On a CPU every operation is looked at, for
    less than a tenth of a millisecond each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak, self.tensors = device, 0, PeakBytes()

    def __enter__(self) -> Self:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.base = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.tensors.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.base
        else:
            self.tensors.stop()
            self.peak = self.tensors.peak


def _common(a: Tensor, b: Tensor) -> float:
    """Share of the tokens of `a` [B, H, n] that `b` has too."""
    rows: Sequence[tuple[Tensor, Tensor]] = list(zip(a.flatten(0, 1), b.flatten(0, 1), strict=True))
    return float(torch.stack([torch.isin(x, y).double().mean() for x, y in rows]).mean())

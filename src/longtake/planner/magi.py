"""MAGI-1: tokens, bytes and FLOPs of a staggered take, as the sampler runs it and as FlowCache's table counts it.

A chunk is 24 frames, 6 latent ones; `window` chunks are in flight, each `steps / window` steps behind the one before.
The distilled model runs the oldest one once more, alone, when it is nearly clean, and reads a finished chunk once more
for its K/V; the base model makes three passes of everything.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LongtakeError
from ..flops import FlopShape
from ..plan import HistoryShape
from ..policies import FlowCacheKV, FullHistory, KVPolicy, KVRange
from ..reuse import FlowCacheReuse
from ..reuse.theory import magi_levels, predicted_reuse, relative_l1
from .request import ModelShape, PlanRequest
from .staggered import Tally, Walk

TEXT_TOKENS = 100  # of a prompt with its special tokens, about
NULL_TOKENS = 50
CHUNK_FRAMES, FRAME_STRIDE = 6, 4


@dataclass(frozen=True, kw_only=True)
class MagiShape(ModelShape):
    """Sizes of a MAGI-1 checkpoint and how it is run."""

    layers: int = 34
    hidden: int = 3072
    ffn: int = 12_288
    heads: int = 24
    kv_heads: int = 8
    head_dim: int = 128
    steps: int = 64
    window: int = 4
    passes: int = 1  # 3: three-way guidance
    ranges: str = "5/4/3/2"

    @property
    def flop_shape(self) -> FlopShape:
        return FlopShape.of_magi(self.layers, self.hidden, self.ffn, self.kv_heads * self.head_dim, 4 * 16)


SHAPES = {
    shape.name: shape
    for shape in (
        MagiShape(
            name="magi-4.5b", about="MAGI-1 4.5B distilled, as FlowCache ran it (64 steps)", width=720, height=720,
            fps=24,
        ),
        MagiShape(
            name="magi-4.5b-base", about="MAGI-1 4.5B base, three-way guidance", width=720, height=720, fps=24,
            steps=32, passes=3,
        ),
    )
}  # fmt: skip

# FlowCache's table, PFLOPs for 10 chunks of 720x720 in 64 steps, and the steps of a chunk that are taken to be reused
REPORTED = (
    ("FlowCache-slow", 161.0, 15),
    ("FlowCache-fast", 140.0, 21),
)
BUDGET = 6  # chunks held, B_total; not in the paper's table, inferred from its configurations
WARMUP = 5


def nearly_clean_steps(steps: int, after: float = 0.3) -> set[int]:
    """Steps whose time is above `after`, in fp32 as the model sees it: the 0.3 of 64 even steps is a hair above."""
    y = torch.linspace(0, 1, steps + 1) ** 2
    return {k for k, t in enumerate((y / (3 - 2 * y)).tolist()[:-1]) if t > after}


def count(
    shape: MagiShape, chunks: int, steps: int, tokens_per_frame: int, policy: KVPolicy, *, nearly_clean: bool = True,
    clean: bool = True, text: int = 0, null_text: int = 0, skipped: Collection[int] = (),
) -> Tally:  # fmt: skip
    """The forwards of `chunks` chunks. `nearly_clean` and `clean` are the distilled model's extra passes."""
    model, c = shape.flop_shape, CHUNK_FRAMES * tokens_per_frame
    sizes = HistoryShape(
        shape.layers, shape.kv_heads, shape.head_dim, shape.itemsize, tokens_per_frame, CHUNK_FRAMES,
        frames=chunks * CHUNK_FRAMES, live_chunks=min(shape.window, chunks),
    )  # fmt: skip
    walk = Walk(
        policy, sizes, [CHUNK_FRAMES] * chunks, steps, steps // shape.window, "clean" if clean else "adopt",
        skipped=skipped, rereads_last=False,
    )  # fmt: skip
    alone_at = nearly_clean_steps(steps) if nearly_clean and shape.passes == 1 else set()
    tally = Tally()
    for visit in walk.visits():
        if visit.step == steps:
            tally.add("clean", [model.forward(c, visit.keys, null_text)] * (2 if shape.passes == 3 else 1))
            continue
        made = [model.forward(c, visit.keys, text)]
        if shape.passes == 3:
            made += [model.forward(c, visit.keys, null_text), model.forward(c, c, null_text)]
        tally.add("steps", made, visit.reused)
        if visit.oldest and visit.step in alone_at:
            tally.add("nearly_clean", [model.forward(c, c, text)], visit.reused)
    tally.held = walk.held
    return tally


def plan(request: PlanRequest) -> dict[str, Any]:
    """Costs of a text-to-video take. `pflops` is the sampler's under the policy; `paper_vanilla_pflops` counts what
    FlowCache's table does: every earlier chunk in view, nearly clean passes, no second reading of finished chunks, no
    text. `rows` are that table's, from stated numbers of reused steps; `fit` a model of them, no measurement."""
    shape = SHAPES[request.model]
    assert isinstance(shape, MagiShape)
    width, height = request.pixels(shape, 16)
    per_frame = width // 16 * (height // 16)
    asked = request.pixel_frames(shape.fps)
    per_chunk = CHUNK_FRAMES * FRAME_STRIDE
    if request.chunk not in (None, CHUNK_FRAMES):
        raise LongtakeError(f"--chunk {request.chunk}: a chunk of {shape.name} has {CHUNK_FRAMES} latent frames")
    chunks = (request.chunks or 0) if asked is None else -(-asked // per_chunk)
    steps = request.steps or shape.steps
    if steps % shape.window:
        raise LongtakeError(
            f"--steps {steps}: {shape.name} has {shape.window} chunks in flight, use a multiple of that"
        )
    policy = request.policy or KVRange(shape.ranges)
    ours = count(shape, chunks, steps, per_frame, policy, text=TEXT_TOKENS, null_text=NULL_TOKENS)
    vanilla = count(shape, chunks, steps, per_frame, FullHistory(), clean=False)
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.itemsize
    tokens = CHUNK_FRAMES * per_frame
    extra = "three passes" if shape.passes == 3 else "nearly clean passes"
    result = {
        "width": width, "height": height, "fps": shape.fps, "chunks": chunks, "pixel_frames": chunks * per_chunk,
        "latent_frames": chunks * CHUNK_FRAMES, "steps": steps, "chunks_in_flight": min(shape.window, chunks),
        "policy": policy.name, "tokens_per_frame": per_frame, "chunk_tokens": tokens, "token_bytes": token_bytes,
        "chunk_bytes": tokens * token_bytes, "history_bytes": ours.held * token_bytes,
        "full_history_bytes": chunks * tokens * token_bytes,
        "pflops": ours.total.peta, "pflops_counts": (
            f"{chunks} chunks of {steps} steps under {_spec(policy)}, {extra}, clean passes of all but the last "
            f"chunk, {TEXT_TOKENS} text tokens ({NULL_TOKENS} of the null caption)"
        ),
        "flops": ours.as_dict(),
        "paper_vanilla_pflops": vanilla.total.peta, "paper_vanilla_counts": (
            f"{chunks} chunks of {steps} steps, every chunk sees all before it, {extra}, no clean passes, no text"
        ),
    }  # fmt: skip
    if shape.passes == 1 and chunks >= BUDGET and steps > 2 * WARMUP:
        result |= {"rows": _rows(shape, chunks, steps, per_frame), "fit": _fit(shape, chunks, steps, per_frame)}
    return result


def _rows(shape: MagiShape, chunks: int, steps: int, per_frame: int) -> list[dict[str, Any]]:
    def row(
        name: str, policy: KVPolicy, reported: float | None = None, skip: int = 0, **passes: bool
    ) -> dict[str, Any]:
        skipped = range(WARMUP, WARMUP + skip)
        made = count(shape, chunks, steps, per_frame, policy, skipped=skipped, **passes)
        return {
            "name": name, "pflops": made.total.peta, "reported_pflops": reported if published else None,
            "reused_steps_per_chunk": skip, "policy": _spec(policy), **passes,
        }  # fmt: skip

    published = (chunks, steps, per_frame) == (10, 64, 2025)
    bare = {"nearly_clean": False, "clean": False}
    budget = FlowCacheKV(BUDGET)
    return [
        row("vanilla with clean passes", FullHistory()),
        row("vanilla", FullHistory(), 306.0, clean=False),
        row("vanilla, no nearly clean passes", FullHistory(), **bare),
        row("compressed, nothing reused", budget, **bare),
        *(row(name, budget, reported, min(skip, steps - WARMUP), **bare) for name, reported, skip in REPORTED),
    ]


def _fit(shape: MagiShape, chunks: int, steps: int, per_frame: int) -> dict[str, Any]:
    """Reuse as Gaussian data would have it."""
    rows = []
    for threshold in (0.01, 0.015):
        policy = FlowCacheReuse(threshold, "latent", warmup=WARMUP, last="take", rescale="identity")
        skipped = predicted_reuse(policy, relative_l1(magi_levels(steps), 1.0))
        made = count(
            shape, chunks, steps, per_frame, FlowCacheKV(BUDGET), nearly_clean=False, clean=False, skipped=skipped
        )
        rows.append({"threshold": threshold, "reused_steps": skipped, "pflops": made.total.peta})
    return {
        "what": "a fit, not a measurement: relative L1 of Gaussian data with standard deviation s, where s = 1 comes "
        "closest to the published table",
        "s": 1.0, "policy": _spec(FlowCacheKV(BUDGET)), "rows": rows,
    }  # fmt: skip


def _spec(policy: KVPolicy) -> str:
    size = {"FlowCacheKV": "chunks", "KVRange": "ranges"}.get(type(policy).__name__)
    return policy.name if size is None else f"{policy.name}:{size}={getattr(policy, size)}"

"""SkyReels-V2 diffusion forcing: tokens, bytes and FLOPs of a staggered take in windows, as the sampler runs it and as
FlowCache's table counts it.

A chunk is 5 latent frames; windows of 25 latent frames (31 for 720P) overlap by 5, chunks are 5 steps apart. Everything
is done twice, for guidance.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..flops import Flops, FlopShape
from ..plan import HistoryShape
from ..policies import FullHistory, KVPolicy
from .request import ModelShape, PlanRequest
from .staggered import Tally, Walk

TEXT_TOKENS = 512  # padded, and attended to
STREAMS = 2
FRAME_STRIDE = 4


@dataclass(frozen=True, kw_only=True)
class SkyReelsShape(ModelShape):
    """Sizes of a SkyReels-V2 diffusion-forcing checkpoint and how it is run."""

    layers: int
    hidden: int
    ffn: int
    window: int = 25  # latent frames
    overlap: int = 5
    chunk_frames: int = 5
    steps: int = 50
    lag: int = 5

    @property
    def flop_shape(self) -> FlopShape:
        return FlopShape.of_wan(self.layers, self.hidden, self.ffn, 4 * 16)

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers, one stream."""
        return 2 * self.layers * self.hidden * self.itemsize


SHAPES = {
    shape.name: shape
    for shape in (
        SkyReelsShape(
            name="skyreels-v2-1.3b", about="SkyReels-V2-DF-1.3B-540P", width=960, height=544, fps=24, layers=30,
            hidden=1536, ffn=8960,
        ),
        SkyReelsShape(
            name="skyreels-v2-14b", about="SkyReels-V2-DF-14B-540P", width=960, height=544, fps=24, layers=40,
            hidden=5120, ffn=13_824,
        ),
        SkyReelsShape(
            name="skyreels-v2-14b-720p", about="SkyReels-V2-DF-14B-720P", width=1280, height=720, fps=24, layers=40,
            hidden=5120, ffn=13_824, window=31,
        ),
    )
}  # fmt: skip

# FlowCache's table, PFLOPs for 177 frames of 960x544 in 50 steps, and the steps of a chunk that are taken to be reused
REPORTED = (("FlowCache-slow", 36.0, 27), ("FlowCache-fast", 28.0, 32))
WARMUP = 5


@dataclass(frozen=True)
class Window:
    """A window of a take: latent frames that are given to it, and those of each chunk it makes."""

    given: int
    spans: tuple[int, ...]


def windows(shape: SkyReelsShape, frames: int, chunk: int) -> list[Window]:
    """The windows of a take of `frames` latent frames."""
    result, made = [], 0
    while made < frames:
        given = min(shape.overlap, made)
        fresh = min(shape.window - given, frames - made)
        spans = (chunk,) * (fresh // chunk) + ((fresh % chunk,) if fresh % chunk else ())
        result.append(Window(given, spans))
        made += fresh
    return result


def count(
    shape: SkyReelsShape, frames: int, per_frame: int, policy: KVPolicy, *, chunk: int, steps: int,
    commit: str = "clean", skipped: Collection[int] = (),
) -> Tally:  # fmt: skip
    """The forwards of `frames` latent frames, text K/V made once."""
    model = shape.flop_shape
    tally = Tally({"text": model.text(TEXT_TOKENS) * STREAMS})
    for window in windows(shape, frames, chunk):
        flight = max(1, min(len(window.spans), -(-steps // shape.lag)))
        sizes = HistoryShape(
            shape.layers, shape.hidden // 128, 128, shape.itemsize, per_frame, chunk, streams=STREAMS,
            frames=min(shape.window, frames), live_chunks=flight,
        )  # fmt: skip
        walk = Walk(policy, sizes, window.spans, steps, shape.lag, commit, window.given, skipped)
        for visit in walk.visits():
            made = [model.forward(visit.tokens, visit.keys, TEXT_TOKENS)] * STREAMS
            kind = "given" if visit.step < 0 else "clean" if visit.step == steps else "steps"
            tally.add(kind, made, visit.reused)
        tally.held = max(tally.held, walk.held)
    return tally


def vanilla_flops(shape: SkyReelsShape, frames: int, per_frame: int, chunk: int, steps: int) -> Flops:
    """What FlowCache's table counts: in every row of every window each block goes through the model, whether it has
    begun, is done or is given, and sees those before it; text K/V anew in every call."""
    model, total = shape.flop_shape, Flops()
    for window in windows(shape, frames, chunk):
        spans = [*([window.given] if window.given else []), *window.spans]
        rows = steps + shape.lag * (len(window.spans) - 1)
        call, keys = model.text(TEXT_TOKENS), 0
        for span in spans:
            keys += span * per_frame
            call += model.forward(span * per_frame, keys, TEXT_TOKENS)
        total += call * (rows * STREAMS)
    return total


def plan(request: PlanRequest) -> dict[str, Any]:
    """Costs of a text-to-video take. `pflops` is the sampler's under the policy; `paper_vanilla_pflops` is what
    FlowCache's table counts (see `vanilla_flops`); `rows` are that table's, from stated numbers of reused steps."""
    shape = SHAPES[request.model]
    assert isinstance(shape, SkyReelsShape)
    width, height = request.pixels(shape, 16)
    per_frame = width // 16 * (height // 16)
    chunk, steps = request.chunk or shape.chunk_frames, request.steps or shape.steps
    asked = request.pixel_frames(shape.fps)
    frames = (request.chunks or 0) * chunk if asked is None else -(-(asked - 1) // FRAME_STRIDE) + 1
    policy = request.policy or FullHistory()
    ours = count(shape, frames, per_frame, policy, chunk=chunk, steps=steps)
    vanilla = vanilla_flops(shape, frames, per_frame, chunk, steps)
    parts = windows(shape, frames, chunk)
    rows = sum(steps + shape.lag * (len(window.spans) - 1) for window in parts)
    return {
        "width": width, "height": height, "fps": shape.fps, "pixel_frames": FRAME_STRIDE * (frames - 1) + 1,
        "latent_frames": frames, "windows": len(parts), "chunks": sum(len(window.spans) for window in parts),
        "chunk_frames": chunk, "steps": steps, "sampler_rows": rows, "streams": STREAMS, "policy": policy.name,
        "tokens_per_frame": per_frame, "token_bytes": shape.token_bytes,
        "history_bytes": STREAMS * ours.held * shape.token_bytes,
        "pflops": ours.total.peta, "pflops_counts": (
            f"{steps} steps of every chunk in {STREAMS} streams under {policy.name}, idle and finished chunks not "
            f"forwarded, given frames once a window, a clean pass of every chunk, text K/V once"
        ),
        "flops": ours.as_dict(),
        "paper_vanilla_pflops": vanilla.peta, "paper_vanilla_counts": (
            f"block-causal, all blocks of a window in each of {rows} rows and {STREAMS} streams, idle, finished and "
            "given ones too, text K/V in every call"
        ),
        "rows": _rows(shape, frames, per_frame, chunk, steps),
    }  # fmt: skip


def _rows(shape: SkyReelsShape, frames: int, per_frame: int, chunk: int, steps: int) -> list[dict[str, Any]]:
    published = (shape.name, frames, per_frame, chunk, steps) == ("skyreels-v2-1.3b", 45, 2040, 5, 50)
    cases = [("nothing reused", None, 0), *((name, pf, min(skip, steps - WARMUP)) for name, pf, skip in REPORTED)]
    result = []
    for name, reported, skip in cases:
        skipped = range(WARMUP, WARMUP + max(0, skip))
        made = count(shape, frames, per_frame, FullHistory(), chunk=chunk, steps=steps, commit="adopt", skipped=skipped)
        result.append({
            "name": name, "pflops": made.total.peta, "reported_pflops": reported if published else None,
            "reused_steps_per_chunk": len(skipped), "commit": "adopt",
        })  # fmt: skip
    return result

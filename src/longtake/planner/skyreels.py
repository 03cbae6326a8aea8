"""SkyReels-V2 diffusion forcing: tokens, bytes and FLOPs of a staggered take in windows, as the sampler runs it and as
FlowCache's table counts it.

A chunk is 5 latent frames; windows of 25 latent frames (31 for 720P) overlap by 5, chunks are 5 steps apart. Everything
is done twice, for guidance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ..flops import Flops
from ..geometry import Geometry
from ..plan import HistoryShape
from ..policies import FullHistory, KVPolicy
from .anatomy import Anatomy, Forward
from .request import PlanRequest
from .staggered import Tally, Walk
from .wan_sizes import WanSizes

FRAME_STRIDE = 4
SOLVER_TENSORS = 3  # what UniPC remembers of a chunk: its last latents and two predictions


@dataclass(frozen=True, kw_only=True)
class SkyReelsShape(WanSizes):
    """Sizes of a SkyReels-V2 diffusion-forcing checkpoint and how it is run."""

    window: int | None = 25  # latent frames; None: one history without an end
    training_frames: int | None = 25
    overlap: int = 5
    chunk_frames: int = 5
    steps: int = 50
    lag: int = 5
    streams: int = 2
    commit: str = "clean"

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers, one stream."""
        return 2 * self.layers * self.hidden * self.itemsize

    def in_flight(self, chunks: int, steps: int) -> int:
        """Most chunks in flight at once."""
        return max(1, min(chunks, -(-steps // max(1, min(self.lag, steps)))))


SHAPES = {
    shape.name: shape
    for shape in (
        SkyReelsShape(
            name="skyreels-v2-1.3b", about="SkyReels-V2-DF-1.3B-540P", width=960, height=544, fps=24, layers=30,
            hidden=1536, ffn=8960, rates=True, sizes=((480, 272),),
        ),
        SkyReelsShape(
            name="skyreels-v2-14b", about="SkyReels-V2-DF-14B-540P", width=960, height=544, fps=24, layers=40,
            hidden=5120, ffn=13_824, sizes=((480, 272),),
        ),
        SkyReelsShape(
            name="skyreels-v2-14b-720p", about="SkyReels-V2-DF-14B-720P", width=1280, height=720, fps=24, layers=40,
            hidden=5120, ffn=13_824, window=31, training_frames=31,
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
        given = 0 if shape.window is None else min(shape.overlap, made)
        fresh = frames - made if shape.window is None else min(shape.window - given, frames - made)
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
    streams, text = shape.streams, shape.text_tokens
    tally = Tally({"text": model.text(text) * streams})
    chunks = 0  # of the windows before
    for window in windows(shape, frames, chunk):
        sizes = HistoryShape(
            shape.layers, shape.heads, shape.head_dim, shape.itemsize, per_frame, chunk, streams=streams,
            frames=_most(shape, frames), live_chunks=shape.in_flight(len(window.spans), steps), decay=shape.decay,
        )  # fmt: skip
        walk = Walk(policy, sizes, window.spans, steps, shape.lag, commit, window.given, skipped)
        for visit in walk.visits():
            made = [model.forward(visit.tokens, visit.keys, text)] * streams
            kind = "given" if visit.step < 0 else "clean" if visit.step == steps else "steps"
            tally.add(kind, made, visit.reused)
            if not visit.reused:
                number = chunks + max(0, visit.chunk)
                tally.forwards_made.append(Forward(number, visit.tokens, visit.keys, text, streams))
        chunks += len(window.spans)
        tally.held = max(tally.held, walk.held)
    return tally


def _most(shape: SkyReelsShape, frames: int) -> int:
    """Most latent frames that one history ever holds."""
    return frames if shape.window is None else min(shape.window, frames)


def vanilla_flops(shape: SkyReelsShape, frames: int, per_frame: int, chunk: int, steps: int) -> Flops:
    """What FlowCache's table counts: in every row of every window each block goes through the model, whether it has
    begun, is done or is given, and sees those before it; text K/V anew in every call."""
    model, total = shape.flop_shape, Flops()
    for window in windows(shape, frames, chunk):
        spans = [*([window.given] if window.given else []), *window.spans]
        rows = steps + shape.lag * (len(window.spans) - 1)
        call, keys = model.text(shape.text_tokens), 0
        for span in spans:
            keys += span * per_frame
            call += model.forward(span * per_frame, keys, shape.text_tokens)
        total += call * (rows * shape.streams)
    return total


def plan(request: PlanRequest) -> dict[str, Any]:
    """Costs of a text-to-video take. `pflops` is the sampler's under the policy; `paper_vanilla_pflops` is what
    FlowCache's table counts (see `vanilla_flops`); `rows` are that table's, from stated numbers of reused steps."""
    shape, geometry, frames = _take(request)
    width, height, per_frame = geometry.width, geometry.height, geometry.tokens_per_frame
    chunk, steps = geometry.chunk_frames, request.steps or shape.steps
    policy = request.policy or FullHistory()
    ours = count(shape, frames, per_frame, policy, chunk=chunk, steps=steps, commit=shape.commit)
    vanilla = vanilla_flops(shape, frames, per_frame, chunk, steps)
    parts = windows(shape, frames, chunk)
    rows = sum(steps + shape.lag * (len(window.spans) - 1) for window in parts)
    return {
        "width": width, "height": height, "fps": shape.fps, "pixel_frames": FRAME_STRIDE * (frames - 1) + 1,
        "latent_frames": frames, "windows": len(parts), "chunks": sum(len(window.spans) for window in parts),
        "chunk_frames": chunk, "steps": steps, "sampler_rows": rows, "streams": shape.streams, "policy": policy.name,
        "tokens_per_frame": per_frame, "token_bytes": shape.token_bytes,
        "history_bytes": shape.streams * ours.held * shape.token_bytes,
        "pflops": ours.total.peta, "pflops_counts": (
            f"{steps} steps of every chunk in {shape.streams} streams under {policy.name}, idle and finished chunks "
            f"not forwarded, given frames once a window, a clean pass of every chunk, text K/V once"
        ),
        "flops": ours.as_dict(),
        "paper_vanilla_pflops": vanilla.peta, "paper_vanilla_counts": (
            f"block-causal, all blocks of a window in each of {rows} rows and {shape.streams} streams, idle, finished "
            "and given ones too, text K/V in every call"
        ),
        "rows": _rows(shape, frames, per_frame, chunk, steps),
    }  # fmt: skip


def anatomy(request: PlanRequest) -> Anatomy:
    """What a session of this request is made of."""
    shape, geometry, frames = _take(request)
    steps = request.steps or shape.steps
    ends = None if request.endless else frames
    lengths = [n for n in (shape.window, ends) if n is not None]
    most = min(lengths) if lengths else None
    chunks = steps if most is None else -(-most // geometry.chunk_frames)
    flight = shape.in_flight(chunks, steps)
    sizes = shape.history(geometry, most, live_chunks=flight, **request.held)
    h, w = geometry.latent_size
    frame = 4 * geometry.channels * h * w
    latents = flight * geometry.chunk_frames * (1 + SOLVER_TENSORS) + (shape.overlap if shape.window else 0)
    return shape.anatomy_of(geometry, sizes, latents=frame * latents, idle_rope=False, held_first=True)


def forwards(request: PlanRequest) -> Iterator[Forward]:
    """Every forward of the take."""
    shape, geometry, frames = _take(request)
    policy, steps = request.policy or FullHistory(), request.steps or shape.steps
    made = count(
        shape, frames, geometry.tokens_per_frame, policy, chunk=geometry.chunk_frames, steps=steps, commit=shape.commit
    )
    yield from made.forwards_made


def _take(request: PlanRequest) -> tuple[SkyReelsShape, Geometry, int]:
    """The model, its geometry, and the latent frames of the take."""
    shape = request.shape or SHAPES[request.model]
    assert isinstance(shape, SkyReelsShape)
    return shape, *request.take(shape)


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

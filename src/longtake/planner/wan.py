"""Causal Wan2.1 (Self-Forcing and its descendants): tokens, bytes and FLOPs of a few-step take, chunk by chunk.

At 832×480 a latent frame is 30 × 52 = 1560 tokens, a token 184,320 bytes of K and V in the 1.3B model. Bytes of history
are those found there when the last chunk is made, that chunk apart, as PackForcing (arXiv 2603.25730) counts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import LongtakeError
from ..flops import Flops, FlopShape
from ..geometry import Geometry
from ..plan import HistoryShape
from ..policies import FullHistory, KVPolicy, PackForcing
from .anatomy import Anatomy, Forward
from .request import PlanRequest
from .walk import Layout, Step, walk
from .wan_sizes import WanSizes


@dataclass(frozen=True, kw_only=True)
class WanShape(WanSizes):
    """Sizes of a causal Wan2.1 checkpoint and how it is run; the clean pass that writes a chunk's K and V comes to its
    `steps`."""

    own: str = "window:frames=21,sink=3"


SHAPES = {
    shape.name: shape
    for shape in (
        WanShape(
            name="wan-1.3b", about="causal Wan2.1 T2V 1.3B", width=832, height=480, fps=16, layers=30, hidden=1536,
            ffn=8960, training_frames=21, sizes=((480, 272), (640, 352)),
        ),
        WanShape(
            name="wan-14b", about="causal Wan2.1 T2V 14B", width=832, height=480, fps=16, layers=40, hidden=5120,
            ffn=13_824, training_frames=21, sizes=((480, 272), (1280, 720)),
        ),
    )
}  # fmt: skip


def plan(request: PlanRequest) -> dict[str, Any]:
    """Costs of a text-to-video take.

    `attended_tokens` are the keys of the last chunk, its own among them; `history_bytes` is what it sees of the past,
    `archive_bytes` all blocks of PackForcing's middle, those it sees among them, `held_bytes` everything held;
    `allocated_bytes` is what a session reserves for history (chunk in flight included) and for its view, on the device.
    """
    shape, geometry, chunks = _take(request)
    sizes = shape.history(geometry, chunks * geometry.chunk_frames)
    policy = (request.policy or FullHistory()).settle(sizes)
    policy.check(sizes)
    width, height, steps = geometry.width, geometry.height, request.steps or shape.steps
    taken = list(_walk(policy, geometry, sizes, chunks))
    full = (chunks - 1) * geometry.chunk_frames * geometry.tokens_per_frame
    token, last = sizes.token_bytes, taken[-1]
    capacity, visible = policy.capacity(sizes), policy.visible(sizes)
    away, staged = policy.offloaded(sizes)
    model = shape.flop_shape
    forward = model.forward(sizes.chunk_tokens, last.seen + sizes.chunk_tokens, shape.text_tokens)
    total, whole = Flops(), Flops()
    for step in taken:
        total += _chunk_flops(shape, model, sizes, policy, step.seen, steps)
        whole += _chunk_flops(shape, model, sizes, FullHistory(), step.frame * geometry.tokens_per_frame, steps)
    pixels = geometry.pixel_frames(chunks * geometry.chunk_frames)
    return {
        "task": "text to video", "width": width, "height": height, "fps": shape.fps, "policy": policy.name,
        "chunk_frames": geometry.chunk_frames, "chunks": chunks, "latent_frames": chunks * geometry.chunk_frames,
        "pixel_frames": pixels, "steps": steps, "tokens_per_frame": geometry.tokens_per_frame,
        "chunk_tokens": sizes.chunk_tokens, "compressed_tokens": sizes.compressed_tokens, "token_bytes": token,
        "attended_tokens": last.seen + sizes.chunk_tokens, "history_tokens": last.seen,
        "history_bytes": last.seen * token, **_archive(policy, last, sizes), "held_bytes": last.held * token,
        "host_bytes": away * token, "full_history_tokens": full, "full_history_bytes": full * token,
        "allocated_bytes": None if capacity is None or visible is None else {
            "history": capacity * token, "fetched": staged * token, "resident_view": visible * token,
            "scratch_view": visible * token // shape.layers,
        },
        "weight_bytes": shape.weights,
        "forward_flops": forward.as_dict(), "attention_share": forward.attention / forward.total,
        "flops": total.total, "full_flops": whole.total,
        "flops_per_second_in_real_time": total.total / pixels * shape.fps,
        "attended": [step.seen + sizes.chunk_tokens for step in taken],
    }  # fmt: skip


def anatomy(request: PlanRequest) -> Anatomy:
    """What a session of this request is made of."""
    shape, geometry, chunks = _take(request)
    # a session allows for a first image: one frame more than its chunks
    ends = None if request.endless else chunks * geometry.chunk_frames + 1
    sizes = shape.history(geometry, ends, **request.held)
    return shape.anatomy_of(geometry, sizes, idle_rope=True, held_first=False)


def forwards(request: PlanRequest) -> Iterator[Forward]:
    """Every forward of the take."""
    shape, geometry, chunks = _take(request)
    sizes = shape.history(geometry, chunks * geometry.chunk_frames)
    policy = (request.policy or FullHistory()).settle(sizes)
    steps, text = request.steps or shape.steps, shape.text_tokens
    for number, step in enumerate(_walk(policy, geometry, sizes, chunks)):
        for tokens, count in _passes(sizes, policy, steps):
            yield Forward(number, tokens, step.seen + tokens, text, count * sizes.streams)


def _take(request: PlanRequest) -> tuple[WanShape, Geometry, int]:
    """The model, its geometry, and how many chunks there are."""
    shape = request.shape or SHAPES[request.model]
    assert isinstance(shape, WanShape)
    geometry, frames = request.take(shape)
    return shape, geometry, -(-frames // geometry.chunk_frames)


def _walk(policy: KVPolicy, geometry: Geometry, sizes: HistoryShape, chunks: int) -> Iterator[Step]:
    layout = Layout(geometry.tokens_per_frame, geometry.grid, compressed=sizes.compressed_tokens)
    try:
        yield from list(walk(policy, layout, [geometry.chunk_frames] * chunks))
    except LongtakeError:  # it depends on a model's own queries: what it promises is never exceeded
        capacity, visible = policy.capacity(sizes), policy.visible(sizes)
        if capacity is None or visible is None:
            raise
        chunk = sizes.chunk_tokens
        for number in range(chunks):
            past = number * chunk
            yield Step(number * geometry.chunk_frames, geometry.chunk_frames, min(past, visible - chunk),
                       min(past, capacity - chunk))  # fmt: skip


def _archive(policy: KVPolicy, last: Step, sizes: HistoryShape) -> dict[str, int]:
    """PackForcing's middle, shown or not, when the last chunk is made."""
    if not isinstance(policy, PackForcing):
        return {}
    past = last.frame // sizes.chunk_frames
    blocks = min(policy.archive, max(0, past - policy.sink - policy.recent))
    tokens = sizes.compressed_tokens if policy.middle == "compressed" else sizes.chunk_tokens
    return {"archive_blocks": blocks, "archive_bytes": blocks * tokens * sizes.token_bytes}


def _passes(sizes: HistoryShape, policy: KVPolicy, steps: int) -> list[tuple[int, int]]:
    """Tokens of a pass and how many passes of a chunk have them, the clean one and that of its compressed tokens
    included."""
    compressed = [(sizes.compressed_tokens, 1)] if "compressed" in policy.requires else []
    return [(sizes.chunk_tokens, steps + 1), *compressed]


def _chunk_flops(
    shape: WanShape, model: FlopShape, sizes: HistoryShape, policy: KVPolicy, seen: int, steps: int
) -> Flops:
    """All forwards of one chunk."""
    made = (model.forward(n, seen + n, shape.text_tokens) * count for n, count in _passes(sizes, policy, steps))
    return sum(made, Flops()) * sizes.streams

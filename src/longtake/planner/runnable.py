"""What can I run: every known model and size on one card, under its own policy, with everything kept, and fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..named import spec
from ..policies import FullHistory, SlidingWindow, parse
from .anatomy import Anatomy
from .answer import Room, largest_that_fits, longest, sessions, settled
from .registry import families, family_of
from .request import ModelShape, PlanRequest

LONGEST = 100_000  # chunks: whatever fits so long fits for ever
ENOUGH = 64  # chunks that fill a bounded history


def runnable(room: Room, request: PlanRequest, shapes: Sequence[ModelShape] = ()) -> list[dict[str, Any]]:
    """One row for each model and size: the named ones, or `shapes`. Of `request` only the settings count: residency,
    how the past is kept, whether pixels are wanted, and a size if it names one."""
    known = shapes or [shape for family in families().values() for shape in family.SHAPES.values()]
    return [
        row(room, replace(request, model=shape.name, shape=shape, size=size))
        for shape in known
        for size in ([request.size] if request.size else [(shape.width, shape.height), *shape.sizes])
    ]


def row(room: Room, request: PlanRequest) -> dict[str, Any]:
    """Whether a model runs at a size, how, and for how long. Lengths are in seconds of video; None is no end."""
    shape = request.shape
    assert shape is not None and request.size is not None
    _, family = family_of(request)
    own = replace(request, policy=parse(shape.own), chunks=ENOUGH, frames=None, seconds=None, endless=True)
    anatomy = family.anatomy(own)
    if anatomy.sizes.frames is None and isinstance(own.policy, FullHistory):
        own = replace(own, policy=SlidingWindow())  # a model that is run with everything kept
        anatomy = family.anatomy(own)
    policy = settled(own, anatomy)
    parts = anatomy.memory(policy, request.residency, request.decode)
    total = sum(parts.values())
    least = largest_that_fits(own, anatomy, policy, room)
    full = longest(request, room, FullHistory(), LONGEST)
    return {
        "model": shape.name, "width": request.size[0], "height": request.size[1], "fits": total <= room.free,
        "runs": total <= room.free or least is not None or full is not None,
        "weights": parts["weights"], "needs": total, "policy": spec(policy), "seconds": None,
        "sessions": sessions(parts, room), "full_history_seconds": _seconds(full, shape, anatomy),
        "largest": None if least is None else {
            "policy": spec(least.policy), "residency": least.residency, "needs": least.bytes,
        },
        "host_ram": anatomy.encoder, "uncounted": list(anatomy.uncounted) if request.decode else [],
        "lacks": max(0, total - room.free),
    }  # fmt: skip


def _seconds(chunks: int | None, shape: ModelShape, anatomy: Anatomy) -> float | None:
    """Seconds of video of the longest take that keeps everything: 0 if there is none, None if there is no end."""
    if chunks is None:
        return 0.0
    if chunks >= LONGEST:
        return None
    return chunks * anatomy.sizes.chunk_frames * shape.frame_stride / shape.fps

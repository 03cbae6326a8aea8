"""What can I run: every known model and size on one card, under its own policy, with everything kept, and fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import LongtakeError
from ..policies import FullHistory, parse
from .anatomy import Anatomy
from .answer import Room, largest_that_fits, longest, sessions, settled, short
from .registry import families, family_of
from .request import ModelShape, PlanRequest

LONGEST = 100_000  # chunks: whatever fits so long fits for ever
ENOUGH = 64  # chunks that fill a bounded history
TIGHT = "scratch"  # the view that takes least
NOTHING: dict[str, Any] = {  # a row of what does not work at all, `why` in words
    "fits": False, "weights": None, "needs": None, "policy": None, "residency": None, "sessions": 0, "lacks": None,
    "full_history_seconds": 0.0, "largest": None, "text_encoder": None, "uncounted": [],
}  # fmt: skip


def runnable(room: Room, request: PlanRequest, shapes: Sequence[ModelShape] = ()) -> list[dict[str, Any]]:
    """One row for each model and size: the named ones, or `shapes`. Of `request` only the settings count: residency,
    how the past is kept, whether pixels are wanted, and a size if it names one."""
    known = shapes or [shape for family in families().values() for shape in family.SHAPES.values()]
    rows = []
    for shape in known:
        for size in [request.size] if request.size else [(shape.width, shape.height), *shape.sizes]:
            asked = replace(request, model=shape.name, shape=shape, size=size)
            try:
                rows.append(row(room, asked))
            except LongtakeError as error:  # a size or a policy that is not for this model
                rows.append(NOTHING | {"model": shape.name, "width": size[0], "height": size[1], "why": str(error)})
    return rows


def row(room: Room, request: PlanRequest) -> dict[str, Any]:
    """Whether a model runs at a size, how, and for how long. Lengths are in seconds of video; None is no end."""
    shape = request.shape
    assert shape is not None and request.size is not None
    _, family = family_of(request)
    own = replace(
        request, policy=request.policy or parse(shape.own), chunks=ENOUGH, frames=None, seconds=None, endless=True
    )
    anatomy = family.anatomy(own)
    policy = settled(own, anatomy)
    for residency in dict.fromkeys((request.residency, TIGHT)):
        parts = anatomy.memory(policy, residency, request.decode)
        if (total := sum(parts.values())) <= room.free:
            break
    tight = replace(request, residency=TIGHT)
    return {
        "model": shape.name, "width": request.size[0], "height": request.size[1], "fits": total <= room.free,
        "weights": parts["weights"], "needs": total, "policy": short(policy), "residency": residency,
        "sessions": sessions(parts, room), "lacks": max(0, total - room.free),
        "full_history_seconds": _seconds(longest(tight, room, FullHistory(), LONGEST), shape, anatomy),
        "largest": largest_that_fits(own, anatomy, policy, room, TIGHT), "text_encoder": anatomy.encoder,
        "uncounted": list(anatomy.uncounted) if request.decode else [], "why": None,
    }  # fmt: skip


def _seconds(chunks: int | None, shape: ModelShape, anatomy: Anatomy) -> float | None:
    """Seconds of video of the longest take that keeps everything: 0 if there is none, None if there is no end."""
    if chunks is None:
        return 0.0
    if chunks >= LONGEST:
        return None
    return chunks * anatomy.sizes.chunk_frames * shape.frame_stride / shape.fps

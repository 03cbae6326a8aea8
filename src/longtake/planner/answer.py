"""The whole answer to one question: what a family counts, the bytes of a take by part, its work, and how it stands to a
card."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import LongtakeError
from ..named import describe
from ..policies import KVPolicy, parse
from .anatomy import Anatomy
from .footprint import RESIDENCIES, largest
from .registry import family_of, plan
from .request import PlanRequest
from .speed import GB, Ceilings, predict

RESERVE = GB  # of a card, for the CUDA context and what the allocator rounds up
SHARED = ("weights", "activations")  # one for all takes of a process, whose forwards come one after the other


@dataclass(frozen=True)
class Room:
    """A card's memory, and how much of it is nobody's to plan with."""

    name: str
    memory: int
    reserve: int = RESERVE

    @property
    def free(self) -> int:
        return self.memory - self.reserve


def answer(request: PlanRequest, room: Room | None = None, known: Ceilings | None = None) -> dict[str, Any]:
    """Everything that is known of a take."""
    request = named(request)
    _, family = family_of(request)
    found = plan(request)
    found |= memory(request) | {"work": predict(family.anatomy(request), family.forwards(request), known)}
    if room is not None:
        found["card"] = card(request, room)
    return found


def named(request: PlanRequest) -> PlanRequest:
    """The request with a policy: where it names none, the one that others are compared with."""
    if request.policy is not None:
        return request
    shape = request.shape or family_of(request)[1].SHAPES[request.model]
    return replace(request, policy=parse(shape.planned))


def memory(request: PlanRequest) -> dict[str, Any]:
    """Bytes on the device and in host memory, by part, once the take has all it will ever hold."""
    request = named(request)
    _, family = family_of(request)
    anatomy = family.anatomy(request)
    policy = settled(request, anatomy)
    parts = anatomy.memory(policy, request.residency, request.decode)
    held = anatomy.history(policy, request.residency)
    host = {"archive": held.archive, "text_encoder": anatomy.encoder}
    uncounted = list(anatomy.uncounted) if request.decode else []
    return {
        "residency": request.residency,
        "vram": {**parts, "total": sum(parts.values())},
        "activation_peaks": anatomy.moments(policy, request.residency, request.decode),
        "host_ram": {**host, "total": sum(host.values())},
        **({"uncounted": uncounted} if uncounted else {}),
    }


def settled(request: PlanRequest, anatomy: Anatomy) -> KVPolicy:
    """The policy as a session of this take would run it. Raises LongtakeError if it cannot."""
    assert request.policy is not None
    policy = request.policy.settle(anatomy.sizes)
    policy.check(anatomy.sizes)
    return policy


def card(request: PlanRequest, room: Room) -> dict[str, Any]:
    """Whether the take fits, how many of its kind do, and the largest history that its policy could have."""
    _, family = family_of(request)
    anatomy = family.anatomy(request)
    policy = settled(request, anatomy)
    parts = anatomy.memory(policy, request.residency, request.decode)
    total = sum(parts.values())
    return {
        "name": room.name, "memory": room.memory, "reserve": room.reserve, "fits": total <= room.free,
        "needs": total, "sessions": sessions(parts, room),
        "largest": {each: largest_that_fits(request, anatomy, policy, room, each) for each in RESIDENCIES},
    }  # fmt: skip


def sessions(parts: dict[str, int], room: Room) -> int:
    """Takes of one process that fit at once: weights and activations are shared, since forwards come one by one."""
    shared = sum(parts[part] for part in SHARED)
    each = sum(parts.values()) - shared
    return max(0, (room.free - shared) // each) if each else 0


def largest_that_fits(
    request: PlanRequest, anatomy: Anatomy, policy: KVPolicy, room: Room, residency: str
) -> dict[str, Any] | None:
    """The policy with the most history that one take can have on the card; None if it cannot be made to fit."""

    def cost(candidate: KVPolicy, residency: str) -> int:
        return sum(anatomy.memory(candidate, residency, request.decode).values())

    found = largest(policy, anatomy.sizes, cost, room.free, residency)
    if found is None:
        return None
    history = anatomy.history(found.policy.settle(anatomy.sizes), residency).history
    return {"policy": short(found.policy), "needs": found.bytes, "history": history}


def short(policy: KVPolicy) -> str:
    """A policy as the command line takes it, with what it does not leave at its default."""
    changed = [f.name for f in fields(policy) if f.repr and getattr(policy, f.name) != f.default]
    options = ",".join(f"{name}={getattr(policy, name)}" for name in changed)
    return (describe(policy)[0] or type(policy).__name__) + (f":{options}" if options else "")


def longest(request: PlanRequest, room: Room, policy: KVPolicy, limit: int = 100_000) -> int | None:
    """Most chunks of a take under a policy that grows with it; None if even one does not fit; `limit` if all do."""
    _, family = family_of(request)

    def fits(chunks: int) -> bool:
        asked = replace(request, policy=policy, chunks=chunks, frames=None, seconds=None, endless=False)
        anatomy = family.anatomy(asked)
        try:
            kept = settled(asked, anatomy)
        except LongtakeError:
            return False
        return sum(anatomy.memory(kept, request.residency, request.decode).values()) <= room.free

    if not fits(1):
        return None
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if high > limit:
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

"""Bytes of a session before it exists, and who has reserved what.

Everything follows from the policy's `capacity` and `visible`, the model's shape and two measurements made once per
model: what a prompt leaves behind, and what the decoder keeps per pixel (every tensor it keeps is a feature map, so its
bytes are in proportion to the area).
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, replace

import torch

from ..errors import LongtakeError
from ..geometry import Geometry
from ..hosts.base import Host
from ..named import spec
from ..plan import HistoryShape
from ..policies import KVPolicy
from ..samplers import default_sampler
from ..samplers.staggered import Stagger
from ..session import history_shape
from .errors import NoRoom
from .protocol import Fits

_PROBE = 4  # side of the picture that the decoder is measured with, in its smallest units


@dataclass(frozen=True)
class Constants:
    """What a model costs a session beside its history."""

    text: int  # bytes of one prompt
    anchors: int  # tokens of a prompt that is part of the sequence
    decoder: float  # bytes per pixel


@dataclass(frozen=True)
class Footprint:
    """Bytes that a session holds between two chunks once it is full, by part."""

    store: int  # K/V of what is kept, the chunks in flight included
    view: int
    archive: int  # in host memory
    text: int
    decoder: int
    latents: int
    residency: str = "resident"

    @property
    def total(self) -> int:
        return sum(value for value in asdict(self).values() if isinstance(value, int))


@torch.no_grad()
def measure(host: Host) -> Constants:
    """The constants of a model, from one prompt and three latent frames."""
    text = host.text_state(host.encode_prompt(["a"]))
    host.prompts_encoded()
    at = host.prefix(text)
    own = host.geometry()
    sides = [min(own.stride[axis] * own.patch[axis] * _PROBE, side) for axis, side in ((1, own.height), (2, own.width))]
    small, decoder = host.geometry(*sides), host.decoder()
    with host.lock:
        decoder.push(torch.zeros(1, small.channels, 3, *small.latent_size, device=host.device))
    return Constants(text.nbytes, 0 if at is None else len(at[0]), decoder.nbytes / (small.height * small.width))


def shape_of(
    host: Host, geometry: Geometry, constants: Constants, guidance: float | None, steps: int | None, chunks: int | None,
    given_frames: int = 0,
) -> HistoryShape:  # fmt: skip
    """What a session will ask its policy's capacity for. `chunks`: of a take whose end its session is told."""
    scale = host.config.guidance_scale if guidance is None else guidance
    frames = None if chunks is None else chunks * geometry.chunk_frames + 1
    anchors = constants.anchors + (given_frames * geometry.tokens_per_frame if constants.anchors else 0)
    shape = replace(
        history_shape(host, geometry, streams=len(host.streams(scale))), frames=frames, anchor_tokens=anchors
    )
    sampler = default_sampler(host.config, steps)
    if isinstance(sampler, Stagger):
        known = None if chunks is None else chunks * geometry.chunk_frames + given_frames
        _, live, frames = sampler.layout(geometry, len(host.timetable(sampler.steps)[0]), known)
        live += host.lingering if sampler.commit == "clean" else 0
        shape = replace(shape, frames=frames, live_chunks=live)
    return shape


def footprint(
    host: Host, geometry: Geometry, policy: KVPolicy, shape: HistoryShape, constants: Constants, keep_latents: bool,
    residency: str = "resident",
) -> Footprint:  # fmt: skip
    """The bytes of a session. Raises LongtakeError for a policy that grows with the take."""
    capacity, visible = policy.capacity(shape), policy.visible(shape)
    if capacity is None or visible is None:
        raise LongtakeError(
            f"policy {policy.name} grows with the take: say how many chunks it has, or use a bounded policy"
        )
    rows, shown = capacity + shape.anchor_tokens, visible + shape.anchor_tokens
    positions = 2 * 8 * host.rotary.axes * shape.streams  # base and step of a row, in fp64
    view = {
        "resident": shown * shape.token_bytes,
        "scratch": shown * shape.token_bytes // (shape.layers * shape.streams),
    }[residency]
    away, fetched = policy.offloaded(shape)
    h, w = geometry.latent_size
    latents = 4 * geometry.channels * h * w * (capacity // shape.tokens_per_frame) if keep_latents else 0
    return Footprint(
        store=rows * (shape.token_bytes + positions), view=view + fetched * shape.token_bytes,
        archive=away * (shape.token_bytes + positions), text=constants.text * shape.streams,
        decoder=round(constants.decoder * geometry.height * geometry.width), latents=latents, residency=residency,
    )  # fmt: skip


def fitting(
    host: Host, geometry: Geometry, policy: KVPolicy, shape: HistoryShape, constants: Constants, keep_latents: bool,
    free: int,
) -> Fits | None:  # fmt: skip
    """A configuration of `policy` whose session takes at most `free` bytes, as large as `policy.fit` makes it."""
    for residency in ("resident", "scratch"):
        budget = free
        for _ in range(12):
            try:
                fitted = policy.fit(budget, shape)
                fitted.check(shape)
                total = footprint(host, geometry, fitted, shape, constants, keep_latents, residency).total
            except LongtakeError:
                break
            if total <= free:
                return Fits(policy=spec(fitted), bytes=total)
            budget = min(int(budget * free / total), budget - 1)
    return None


class Ledger:
    """Bytes of one device: the budget, and what each session has reserved. Threads may share it."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def reserved(self) -> int:
        with self._lock:
            return sum(self._held.values())

    @property
    def free(self) -> int:
        return self.budget - self.reserved

    def of(self, session: str) -> int:
        return self._held.get(session, 0)

    def reserve(self, session: str, count: int) -> None:
        """Set a session's share. Raises NoRoom, and changes nothing, if the others leave less."""
        with self._lock:
            free = self.budget - sum(self._held.values()) + self._held.get(session, 0)
            if count > free:
                raise NoRoom(count, free)
            self._held[session] = count

    def correct(self, session: str, count: int) -> None:
        """What was measured takes the place of what was reckoned; it is held already, so nothing is refused."""
        with self._lock:
            if session in self._held:
                self._held[session] = count

    def release(self, session: str) -> None:
        with self._lock:
            self._held.pop(session, None)

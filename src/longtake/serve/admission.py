"""Bytes of a session before it exists, and who has reserved what.

The history's are the planner's arithmetic (`planner.footprint`); the rest follows from measurements made once per
model: what a prompt leaves behind, and what the decoder and the compressor keep per pixel (every tensor they keep is a
feature map, so its bytes are in proportion to the area). Only score tables are left out: they are small.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, replace

import torch

from ..compressors import TakeState
from ..errors import LongtakeError
from ..geometry import Geometry
from ..hosts.base import Host
from ..named import spec
from ..plan import HistoryShape
from ..planner.footprint import RESIDENCIES, history_bytes, largest
from ..policies import KVPolicy
from ..reuse import ReusePolicy
from ..samplers import default_sampler
from ..samplers.staggered import Stagger
from ..session import history_shape
from .errors import NoRoom
from .protocol import Fits

_PROBE = 4  # side of the picture that decoder and compressor are measured with, in their smallest units
_LATENT = 4  # bytes of a channel of a latent
_SOLVED = 3  # latents that the solver of a staggered chunk keeps beside its own: UniPC of order 2


@dataclass(frozen=True)
class Constants:
    """What a model costs a session beside its history."""

    text: int  # bytes of one prompt
    anchors: int  # tokens of a prompt that is part of the sequence
    decoder: float  # bytes per pixel
    compressor: float = 0.0  # bytes per pixel
    compressed: int = 0  # bytes of one compressed token, as it is kept beside latents


@dataclass(frozen=True)
class Footprint:
    """Bytes that a session holds between two chunks once it is full, by part."""

    store: int  # K/V of what is kept, the chunks in flight included; key and query sums
    view: int
    archive: int  # in host memory
    text: int
    decoder: int
    latents: int
    compressor: int
    reuse: int
    residency: str = "resident"

    @property
    def total(self) -> int:
        return sum(value for value in asdict(self).values() if isinstance(value, int))


@torch.no_grad()
def measure(host: Host) -> Constants:
    """The constants of a model, from one prompt and a few latent frames."""
    text = host.text_state(host.encode_prompt(["a"]))
    host.prompts_encoded()
    at = host.prefix(text)
    own = host.geometry()
    sides = [min(own.stride[axis] * own.patch[axis] * _PROBE, side) for axis, side in ((1, own.height), (2, own.width))]
    small, decoder = host.geometry(*sides), host.decoder()
    with host.lock:
        decoder.push(torch.zeros(1, small.channels, 3, *small.latent_size, device=host.device))
    area = small.height * small.width
    return Constants(text.nbytes, 0 if at is None else len(at[0]), decoder.nbytes / area, *_compressing(host, small))


def _compressing(host: Host, geometry: Geometry) -> tuple[float, int]:
    """What the model's compressor keeps per pixel, and the bytes of one of its tokens, from two chunks."""
    if isinstance(host.compressor, torch.nn.Module):
        host.compressor.to(host.device)
    span, state, decoder = geometry.chunk_frames, TakeState(), host.decoder()
    latents = torch.zeros(1, geometry.channels, span, *geometry.latent_size, device=host.device)
    try:
        with host.lock:
            for _ in range(2):
                pixels = decoder.push(latents).cpu() if host.compressor.wants_pixels else None
                tokens, state = host.compressor.compress(latents, pixels, state, host, geometry)
    except LongtakeError:  # a model without compressed histories
        return 0.0, 0
    return state.nbytes / (geometry.height * geometry.width), tokens.nbytes // tokens.shape[1]


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
    residency: str = "resident", reuse: ReusePolicy | None = None,
) -> Footprint:  # fmt: skip
    """The bytes of a session. Raises LongtakeError for a policy that grows with the take."""
    history = history_bytes(policy, shape, axes=host.rotary.axes, residency=residency)
    pixels, compresses = geometry.height * geometry.width, "compressed" in policy.requires
    chunks, small = policy.chunks_held(shape) if keep_latents else (0, 0)
    tokens = small * shape.compressed_tokens * constants.compressed
    moving, reused = _in_flight(host, geometry, shape, reuse)
    return Footprint(
        store=history.store, view=history.view + history.fetched, archive=history.archive,
        text=constants.text * shape.streams, decoder=round(constants.decoder * pixels),
        latents=chunks * shape.chunk_frames * _latent_bytes(geometry) + moving,
        compressor=tokens + (round(constants.compressor * pixels) if compresses else 0), reuse=reused,
        residency=residency,
    )  # fmt: skip


def _latent_bytes(geometry: Geometry) -> int:
    """Of one latent frame, in fp32."""
    height, width = geometry.latent_size
    return _LATENT * geometry.channels * height * width


def _in_flight(host: Host, geometry: Geometry, shape: HistoryShape, reuse: ReusePolicy | None) -> tuple[int, int]:
    """Latents of chunks that several denoising steps are going on in between two chunks, with what their solvers keep;
    and what reuse remembers of them. Chunks that come one by one leave nothing behind."""
    if host.config.sampler != "staggered":
        return 0, 0
    chunk = _latent_bytes(geometry) * shape.chunk_frames
    moving = shape.live_chunks * chunk * (1 + (_SOLVED if host.solver == "unipc" else 0))
    if reuse is None or reuse.name == "none":
        return moving, 0
    before = chunk if reuse.measure() == "latent" else 0
    residual = shape.chunk_tokens * shape.kv_heads * shape.head_dim * shape.itemsize * shape.streams
    return moving, shape.live_chunks * (before + (residual if reuse.carries() == "residual" else chunk))


def fitting(
    host: Host, geometry: Geometry, policy: KVPolicy, shape: HistoryShape, constants: Constants, keep_latents: bool,
    free: int, reuse: ReusePolicy | None = None,
) -> Fits | None:  # fmt: skip
    """A configuration of `policy` whose session takes at most `free` bytes, as large as `policy.fit` makes it."""

    def cost(candidate: KVPolicy, residency: str) -> int:
        return footprint(host, geometry, candidate, shape, constants, keep_latents, residency, reuse).total

    found = (largest(policy, shape, cost, free, residency) for residency in RESIDENCIES)
    return next((Fits(policy=spec(fitted.policy), bytes=fitted.bytes) for fitted in found if fitted is not None), None)


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

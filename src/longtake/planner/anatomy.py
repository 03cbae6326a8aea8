"""What a family says of one take, for bytes and seconds to follow from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..flops import Flops, FlopShape
from ..plan import HistoryShape
from ..policies import KVPolicy
from . import peaks
from .footprint import HistoryBytes, history_bytes


@dataclass(frozen=True)
class Forward:
    """`count` equal forwards of a chunk: tokens of the pass, and the keys and text tokens each of them attends to."""

    chunk: int
    tokens: int
    keys: int
    text: int
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model at one size and length, as a session runs it. Bytes, unless a field says otherwise."""

    sizes: HistoryShape  # what the session asks its policy's capacity for
    chunk_latents: int  # of the latents of a chunk, in fp32
    velocities: int = 1  # a number: how many forwards' results are alive at once
    weights: Mapping[str, int]  # on the device, by part
    encoder: int = 0  # text encoder: in host memory, and on the device only while a prompt is encoded
    text: int = 0  # what prompts leave behind, all streams
    decoder: int | None = 0  # state of the decoder; None: a tokenizer that is not known
    latents: int = 0  # held between two chunks: of chunks in flight, with what their solvers remember
    compressor: int = 0  # its weights and what it remembers of a take, if the policy wants one
    forward: peaks.ForwardPeak
    draw: int = 0  # drawing codes
    decode: int | None = 0  # most alive within a decode, beside the decoder's state
    axes: int = 3  # numbers that say where a token stands
    pairs: int  # rotary phases of a token
    query: int  # width of a token's queries in a layer
    pairing: str = "interleaved"
    flop_shape: FlopShape
    streamed: int  # weights that a forward reads
    token_traffic: int  # read and written by a token's matrix products and attention in one forward
    uncounted: tuple[str, ...] = ()  # what these figures leave out, in words

    def history(self, policy: KVPolicy, residency: str) -> HistoryBytes:
        return history_bytes(policy, self.sizes, axes=self.axes, residency=residency)

    def memory(self, policy: KVPolicy, residency: str, decode: bool = True) -> dict[str, int]:
        """Bytes on the device by part, for one take; `activations` is the largest of `moments`."""
        held = self.history(policy, residency)
        wants = "compressed" in policy.requires
        return {
            "weights": sum(size for part, size in self.weights.items() if decode or part != "vae"),
            "history": held.history, "live": held.live + self.latents, "view": held.view + held.fetched,
            "decoder": (self.decoder or 0) if decode else 0, "text": self.text,
            "compressor": self.compressor if wants else 0,
            "activations": max(self.moments(policy, residency, decode).values()),
        }  # fmt: skip

    def moments(self, policy: KVPolicy, residency: str, decode: bool = True) -> dict[str, int]:
        """The most alive at once beside what is kept: within a forward, while the view is made, and so on."""
        held, sizes = self.history(policy, residency), self.sizes
        shown = held.shown * self.pairs * peaks.PHASE * sizes.streams
        places = held.live_rows * 16 * self.axes * sizes.streams
        past = held.shown - held.live_rows
        turned = peaks.fill(past, sizes.kv_heads * sizes.head_dim, sizes.itemsize, self.pairing)
        latents = 4 * self.chunk_latents  # noise, the step's input, its velocity, the prediction
        scratch = residency == "scratch"
        fused = peaks.fused_phases(policy, sizes, self.pairs)
        scored = peaks.scoring(policy, sizes, self.query, self.pairs)
        within = max(scored, max(turned, fused) if scratch else 0)
        forward = max(self.forward.most, self.forward.attending + within if within else 0)
        made = max(peaks.phases(past, self.pairs), 0 if scratch else max(turned, fused))
        others = (self.velocities - 1) * self.chunk_latents  # of other chunks and passes
        found = {"forward": forward + shown + places + latents + others, "view": made + shown + places + latents}
        if self.draw:
            found["draw"] = self.draw + shown + places
        if decode and self.decode is not None:
            found["decode"] = self.decode + shown + places + latents
        return found

    def traffic(self, forward: Forward) -> int:
        """Bytes that one forward moves at least: every weight read once, keys and values of all it attends to, and what
        its matrix products read and write. Norms, gates and rotations count as part of these."""
        stream = self.sizes.view_token_bytes // self.sizes.streams
        return self.streamed + forward.keys * stream + forward.tokens * self.token_traffic

    def flops(self, forward: Forward) -> Flops:
        return self.flop_shape.forward(forward.tokens, forward.keys, forward.text)


def by_chunk(forwards: Iterator[Forward]) -> dict[int, list[Forward]]:
    """Forwards of each chunk, in the order of their first."""
    found: dict[int, list[Forward]] = {}
    for forward in forwards:
        found.setdefault(forward.chunk, []).append(forward)
    return found

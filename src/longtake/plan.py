"""What a policy sees and what it answers: the table of blocks, and the plan over it. Metadata only, no K/V.

A block's tokens keep their *original* numbering (frame-major, 0 … tokens−1) for ever: a token set in survivor numbering
breaks nesting and frame arithmetic. Positions are *shifts* in latent frames, default 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

TokenSet = range | Tensor  # ascending token numbers; a tensor is 1-D int64 on the CPU

FULL = "full"
COMPRESSED = "compressed"


@dataclass(frozen=True)
class HistoryShape:
    """The sizes a policy needs to turn bytes into tokens."""

    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int  # bytes of one K or V element
    tokens_per_frame: int
    chunk_frames: int
    batch: int = 1  # takes in lockstep
    streams: int = 1  # guidance branches, each with its own K/V
    frames: int | None = None  # latent frames of the whole take, if its end is known
    anchor_tokens: int = 0  # tokens of anchor blocks a host puts before the first frame (Lumos-1: the prompt)
    structural_tokens: int = 0  # of a frame: what frames its content (Lumos-1: begin, height, width, end)
    decay: float | None = None  # measured fall of attention per latent frame of distance, if the model's is known
    compressed_tokens: int = 0  # of a chunk's compressed form; 0: the take has no compressor
    training_frames: int | None = None  # latent frames of a clip that the model was trained on, if known
    live_chunks: int = 1  # most chunks in flight at once (staggered samplers)
    head_bytes: int | None = None  # of one token's K, or V, of one head as it is held; None: as it is computed

    @property
    def token_bytes(self) -> int:
        """Bytes of one token as it is held: K and V, all layers, all takes and streams."""
        held = self.head_dim * self.itemsize if self.head_bytes is None else self.head_bytes
        return 2 * self.layers * self.kv_heads * held * self.batch * self.streams

    @property
    def view_token_bytes(self) -> int:
        """Bytes of one token in view, which is never quantised: K and V, all layers, all takes and streams."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize * self.batch * self.streams

    @property
    def frame_bytes(self) -> int:
        return self.token_bytes * self.tokens_per_frame

    @property
    def chunk_tokens(self) -> int:
        return self.tokens_per_frame * self.chunk_frames

    @property
    def live_frames(self) -> int:
        """Most latent frames in flight at once."""
        return self.chunk_frames * self.live_chunks


@dataclass(frozen=True, eq=False)
class Form:
    """One form of a block's K/V: how many tokens it had when written, and which it still owns (None: all)."""

    tokens: int
    kept: TokenSet | None = None

    @property
    def owned(self) -> TokenSet:
        return range(self.tokens) if self.kept is None else self.kept

    @property
    def count(self) -> int:
        return len(self.owned)


@dataclass(frozen=True, eq=False)
class Block:
    """One committed (or live) chunk of the take."""

    id: int
    role: str  # "anchor" | "committed" | "live" | "fused"
    frame: int  # first latent frame
    span: int  # latent frames; 0 for text
    forms: Mapping[str, Form]
    grid: tuple[int, int] = (0, 0)  # token rows and columns of a frame
    packable: TokenSet | None = None  # tokens a policy may drop one by one; None: all
    structural: TokenSet = range(0)  # tokens that frame the content (Lumos-1's frame markers)

    @property
    def end(self) -> int:
        return self.frame + self.span

    @property
    def complete(self) -> bool:
        """Whether the full form still owns every token it was written with; a fused block has lost some by nature."""
        form = self.forms.get(FULL)
        return self.role != "fused" and form is not None and form.count == form.tokens

    def of_frames(self, first: int, last: int, form: str = FULL) -> TokenSet:
        """Tokens of the latent frames [first, last) that the form still owns; none of a text's."""
        if not self.span:
            return range(0)
        tokens, owned = self.forms[form].tokens, self.forms[form].owned
        per_frame = tokens // self.span
        span = range(
            per_frame * (max(first, self.frame) - self.frame), per_frame * max(0, min(last, self.end) - self.frame)
        )
        return span if isinstance(owned, range) and owned == range(tokens) else intersect(owned, span)

    def runs(self, first: int, last: int, form: str = FULL) -> list[tuple[int, int]]:
        """Runs [first, last) of latent frames, within the given ones, of which the form still owns tokens."""
        per_frame = self.forms[form].tokens // self.span
        frames = (as_tensor(self.of_frames(first, last, form)) // per_frame).unique() + self.frame
        cuts = [0, *((frames.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(frames)]
        return [(int(frames[a]), int(frames[b - 1]) + 1) for a, b in pairwise(cuts) if a < b]


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Everything a policy may know of the past."""

    blocks: tuple[Block, ...] = ()  # what the history holds, in time order
    live: tuple[Block, ...] = ()  # chunks in flight, in time order
    frames_seen: int = 0  # latent frames ever committed, held or not

    @property
    def now(self) -> int:
        """Temporal position of the first frame in flight: everything in the history lies before it."""
        return self.live[0].frame if self.live else self.frames_seen

    @property
    def span(self) -> int:
        """Latent frames in flight."""
        return sum(block.span for block in self.live)

    @property
    def complete(self) -> bool:
        """Whether nothing of the past has been lost so far."""
        return sum(b.span for b in self.blocks) == self.frames_seen and all(b.complete for b in self.blocks)


@dataclass(frozen=True, eq=False)
class Entry:
    """A block to be seen: in which form, which of its owned tokens (None: all), moved by how many frames."""

    block: int
    form: str = FULL
    tokens: TokenSet | None = None
    shift: float = 0
    log_weight: float = 0.0  # added to the logits of these keys
    heads: Mapping[str, Tensor] | None = None  # stream → [L, B, H] bool: which heads see it; None: all


@dataclass(frozen=True, eq=False)
class Choose:
    """An open entry: `k` of the candidate blocks, picked per layer by `policy.score` with the queries of the first
    forward that needs them, then frozen for the life of the plan. All candidates own equally many tokens.

    The i-th picked block, in time order, is moved to start at `starts[i]` (None: it stays where it was). While they are
    scored, candidate i stands at `scored_at[i]` (None: where it was). The score gets one key sum per candidate, or with
    `evidence="keys"` all their keys, of which each block is then worth the sum.
    `shared` makes one choice for all layers, before the first forward, with the query sums that the last commit pass
    left in every layer (the policy `requires` "query_sums"), as though they stood where the chunk in flight stands.
    """

    candidates: tuple[int, ...]
    k: int
    form: str = FULL
    starts: tuple[float, ...] | None = None
    scored_at: tuple[float, ...] | None = None
    evidence: str = "sums"  # or "keys"
    shared: bool = False


@dataclass(frozen=True, eq=False)
class Fuse:
    """Replace `blocks` by one whose tokens are chosen per layer and head, and see that one.

    `keep` [L, B, H, n], or one such per stream: indices into the concatenation of the blocks' owned tokens. Left open
    (None), the history asks `policy.score` for the best `n` with the queries of the first forward that needs them,
    every stream for itself.
    Survivors are stored in ascending order, or with `sort=False` best first (the published FlowCache pools its scores
    over that order). With `per_frame` they move, in order, to consecutive frames from the first block's first frame on,
    so many to a frame (Deep Forcing's unified positions); else each keeps its own.
    """

    blocks: tuple[int, ...]
    n: int
    keep: Tensor | Mapping[str, Tensor] | None = None
    shift: float = 0
    sort: bool = True
    per_frame: int | None = None


@dataclass(frozen=True, eq=False)
class Drop:
    """Forget a form of a block, or some of its tokens, for ever."""

    block: int
    form: str = FULL
    tokens: TokenSet | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What is seen while the chunks in flight are generated, in view order, and what is forgotten before that."""

    entries: tuple[Entry | Choose | Fuse, ...] = ()
    drops: tuple[Drop, ...] = ()
    live_shift: float = 0  # moves the chunk in flight itself (a RoPE cut)
    # Blocks whose keys `score` gets at the policy's moment, if the pass sees them; None: all it sees; (): nothing is
    # scored, and what was scored before stays. Blocks that are being fused stand for what they become.
    observe: tuple[int, ...] | None = None
    forms: tuple[str, ...] = ()  # in which the chunk in flight is to be written besides `full`: (COMPRESSED,)
    away: tuple[tuple[int, str], ...] = ()  # forms (block, form) that move to host memory, for good
    score: Callable[[Tensor, Tensor], Tensor] | None = None  # in place of the policy's, with what this plan knows


@dataclass(frozen=True, eq=False)
class Signals:
    """What was collected at a policy's request. Empty unless it declares `moment` or `requires`."""

    chunk: int = 0  # index of the chunk about to be generated
    # stream → layer → what `score` returned at the policy's moment, the last time it came
    scores: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)


def intersect(a: TokenSet, b: TokenSet) -> TokenSet:
    """Tokens in both sets, ascending."""
    if isinstance(a, range) and isinstance(b, range) and a.step == b.step == 1:
        return range(max(a.start, b.start), max(max(a.start, b.start), min(a.stop, b.stop)))
    a = as_tensor(a)
    return a[_within(a, b)]


def difference(a: TokenSet, b: TokenSet) -> TokenSet:
    """Tokens of `a` that are not in `b`, ascending."""
    a = as_tensor(a)
    return a[~_within(a, b)]


def _within(a: Tensor, b: TokenSet) -> Tensor:
    """Which tokens of `a` are in the ascending set `b`."""
    if isinstance(b, range) and b.step == 1:
        return (a >= b.start) & (a < b.stop)
    if not len(b):
        return torch.zeros_like(a, dtype=torch.bool)
    b = as_tensor(b)
    return b[torch.searchsorted(b, a).clamp(max=len(b) - 1)] == a


def as_tensor(tokens: TokenSet) -> Tensor:
    return tokens.start + tokens.step * torch.arange(len(tokens)) if isinstance(tokens, range) else tokens


Moved = TypeVar("Moved", Entry, Fuse, Entry | Fuse)


def pack_right(entries: Sequence[tuple[Moved, float, int]], anchor: float) -> list[Moved]:
    """Move kept segments, given as (entry, first frame, frames) in time order, so that they lie without gaps right
    before the frame `anchor`: p_n = A − w_n, p_i = p_{i+1} − w_i (PackForcing §3.4; slot-relative positions of
    Infinity-RoPE and LongLive are the same up to a constant, which attention does not see). Where a host has tokens
    that do not move with the frames, as Lumos-1's text, pack left and move the chunk in flight (`Plan.live_shift`)."""
    packed: list[Moved] = []
    start = anchor
    for entry, frame, frames in reversed(entries):
        start -= frames
        packed.append(replace(entry, shift=start - frame))
    return packed[::-1]

"""PackForcing (arXiv 2603.25730): sink, compressed middle, recent.

The first chunks of a take (sink) and the newest (recent) stay at full resolution; everything between is kept in a
compressed form of a thirty-second of the tokens, in an archive of which only the `top_k` blocks that the chunk's own
queries like best are shown. What is shown is packed against the recent part, so that the gaps left by blocks that are
not shown never become distances the model has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from ..attention import logits
from ..errors import LongtakeError
from ..plan import COMPRESSED, FULL, Block, BlockTable, Choose, Drop, Entry, HistoryShape, Plan, Signals, pack_right
from .base import KVPolicy

_CHOICES = {
    "middle": ("compressed", "full"),
    "select": ("top", "recent"),
    "score_by": ("sum", "half", "sampled", "mass"),
    "score_at": ("rebased", "level", "original"),
    "layers": ("each", "shared"),
    "positions": ("packed", "sink", "absolute"),
}


@dataclass(frozen=True)
class PackForcing(KVPolicy):
    """Sink and recent chunks whole, the middle compressed and chosen from (§3.2).

    `sink`, `recent`, `top_k` and `archive` count chunks; a first image of one frame counts as one. The archive holds
    what is shown of the middle and what is not; its oldest block is forgotten for a new one. `archive_bytes`, if given,
    is its cap in bytes of the take instead.
    `score_by`: "sum" of all heads' logits, exactly, from one key sum per block (Eq. 11 has no softmax, so its double
    sum factorises); "half" the heads; "sampled" every eighth query and half the heads, as published; "mass" is the
    softmax mass that a block would get of the middle. `score_at`: while scored, blocks stand "rebased" (the i-th of M
    at slot ⌊i·k/M⌋, its place if the picks were spread evenly), all at the middle slot ("level": what stands at equal
    distance differs by content only) or where they were written ("original").
    `layers`: each layer picks for itself by the queries of the chunk's first step, or all "shared" one pick by the
    queries of the last chunk's commit pass. `offload` keeps the archive in host memory; it needs the shared pick, known
    before the first forward, so that fetching overlaps.
    `positions`: "packed" moves sink and middle (§3.4), "sink" the sink alone, against the oldest block of the archive,
    "absolute" nothing.
    """

    sink: int = 2
    recent: int = 1
    top_k: int = 16
    archive: int = 128
    archive_bytes: int | None = None
    middle: str = "compressed"
    select: str = "top"
    score_by: str = "sum"
    score_at: str = "rebased"
    layers: str = "each"
    positions: str = "packed"
    offload: bool = False

    name: ClassVar[str] = "packforcing"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("sink", "recent", "top_k", "archive"):
            if getattr(self, field) < 0:
                raise LongtakeError(f"packforcing: {field}={getattr(self, field)}: give 0 chunks or more")
        if self.archive_bytes is not None and self.archive_bytes < 0:
            raise LongtakeError(f"packforcing: archive_bytes={self.archive_bytes}: give 0 bytes or more")
        for field, accepted in _CHOICES.items():
            if getattr(self, field) not in accepted:
                raise LongtakeError(f"packforcing: {field}={getattr(self, field)!r}: use {' or '.join(accepted)}")
        if self.offload and self.layers != "shared" and self.select == "top":
            raise LongtakeError("packforcing: an archive in host memory needs one pick for all layers: layers=shared")
        if self.layers == "shared" and self.select == "top" and self.score_by in ("sampled", "mass"):
            raise LongtakeError(
                f"packforcing: a shared pick knows query sums only; score_by={self.score_by}: layers=each"
            )

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        wanted = set()
        if self.middle == "compressed":
            wanted.add("compressed")
        if self.select == "top" and self.score_by != "mass":
            wanted.add("key_sums")
        if self.select == "top" and self.layers == "shared":
            wanted.add("query_sums")
        return frozenset(wanted)

    @property
    def form(self) -> str:
        """Of the middle's blocks."""
        return COMPRESSED if self.middle == "compressed" else FULL

    # --- what is seen ---------------------------------------------------------------------------------------------

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        anchors = [b for b in table.blocks if b.role == "anchor"]
        sink, middle, recent = self.parts(table)
        gone, middle = middle[: max(0, len(middle) - self.archive)], middle[max(0, len(middle) - self.archive) :]
        drops = [Drop(b.id, form) for b in gone for form in b.forms]
        drops += [Drop(b.id, form) for b in middle for form in b.forms if form != self.form]
        middle = [b for b in middle if self.form in b.forms]
        start = recent[0].frame if recent else table.now
        kept = [(Entry(b.id), b.frame, b.span) for b in (*anchors, *sink)]
        shown: list[Entry | Choose] = []
        if len(middle) <= self.top_k or self.select == "recent":
            seen = middle[max(0, len(middle) - self.top_k) :]
            entries = [(Entry(b.id, self.form), b.frame, b.span) for b in seen]
            shown += [entry for entry, _, _ in self._packed(kept, entries, middle, start)]
        else:
            slots = _slots(middle, self.top_k, start)
            first = slots[0] if slots else start
            shown += [entry for entry, _, _ in self._packed(kept, [], middle, first)]
            if self.top_k:
                shown.append(self._choice(middle, slots))
        return Plan(
            (*shown, *(Entry(b.id) for b in recent)), tuple(drops),
            forms=(COMPRESSED,) if self.middle == "compressed" and self._leaves_sink(table) else (),
            away=tuple((b.id, self.form) for b in middle) if self.offload else (),
        )  # fmt: skip

    def parts(self, table: BlockTable) -> tuple[list[Block], list[Block], list[Block]]:
        """Sink, middle and recent blocks of a table, the middle as it will be when the plan is made true."""
        blocks = [b for b in table.blocks if b.role != "anchor"]
        sink = self.sink
        if not sink and len(blocks) > 1 and blocks[0].span < blocks[1].span:
            sink = 1  # a first image has no place among blocks of a chunk's length
        last = len(blocks)  # of a chunk that is written anew, the middle may be the newest that is left before it
        while last > max(sink, len(blocks) - self.recent) and FULL in blocks[last - 1].forms:
            last -= 1
        return blocks[:sink], blocks[sink:last], blocks[max(sink, last) :]

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """s_m = Σ_h ⟨Σ_i q_{h,i}, Σ_j k_{m,h,j}⟩ / √d (Eq. 11 without its constants), of key sums k [B, M, Hk, D] →
        [B, M]; for "mass", the mean softmax mass of every key [B, N]."""
        if self.score_by == "mass":
            return logits(q, k).softmax(-1).mean(2).sum(1)
        heads = k.shape[2]
        if self.score_by == "sampled":
            q = q[:, rows(q.shape[1])]
        total = q.float().sum(1).unflatten(1, (heads, -1)).sum(2)  # [B, Hk, D]: heads that share a key
        if self.score_by in ("half", "sampled"):
            heads = max(1, heads // 2)
        return (total[:, None, :heads] * k[:, :, :heads].float()).sum((2, 3)) * q.shape[-1] ** -0.5

    # --- what is held ---------------------------------------------------------------------------------------------

    def settle(self, shape: HistoryShape) -> Self:
        """`archive_bytes` as a number of blocks. Raises LongtakeError if it is none."""
        if self.archive_bytes is None:
            return self
        block = max(1, self._block(shape) * shape.token_bytes)
        if 0 < self.archive_bytes < block:
            raise LongtakeError(
                f"packforcing: archive_bytes={self.archive_bytes} hold no block of the middle: give {block} bytes or "
                "more, or 0 for no middle"
            )
        return replace(self, archive=self.archive_bytes // block)

    def capacity(self, shape: HistoryShape) -> int:
        whole, archived = self._counts(shape)
        chunk, small = shape.chunk_tokens, shape.compressed_tokens if self.middle == "compressed" else 0
        tokens = whole * chunk + min(whole, self.recent + 1) * small
        if not self.sink:  # a first image takes the place of a sink
            tokens += shape.tokens_per_frame + small
        return tokens + (0 if self.offload else archived * self._block(shape))

    def visible(self, shape: HistoryShape) -> int:
        whole, archived = self._counts(shape)
        image = 0 if self.sink else shape.tokens_per_frame
        return whole * shape.chunk_tokens + image + min(self.top_k, archived) * self._block(shape)

    def offloaded(self, shape: HistoryShape) -> tuple[int, int]:
        if not self.offload:
            return 0, 0
        _, archived = self._counts(shape)
        # while a whole middle is recached, its newest blocks stand for the recent ones
        shown = self.top_k + (self.recent if self.middle == "full" else 0)
        return archived * self._block(shape), min(shown, archived) * self._block(shape)

    def summed(self, shape: HistoryShape) -> int:
        if "key_sums" not in self.requires:
            return 0
        return sum(self._counts(shape)) + (0 if self.sink else 1)

    def chunks_held(self, shape: HistoryShape) -> tuple[int, int]:
        whole, archived = self._counts(shape)
        return whole + archived, min(whole, self.recent + 1) + archived if self.middle == "compressed" else 0

    def fit(self, budget: int, shape: HistoryShape) -> Self:
        """First a smaller sink, if it must be; then an archive of up to four times `top_k` blocks, then more recent
        chunks whole, and what is left again for the archive. Of it no more blocks are shown than stand within a
        training clip, packed: a model that was not trained under this policy knows no further places."""
        self.check(shape)
        tokens, block = budget // shape.token_bytes, self._block(shape)
        per_recent = shape.chunk_tokens + (shape.compressed_tokens if self.middle == "compressed" else 0)
        endless = replace(shape, frames=None)
        for sink in range(self.sink, -1, -1):
            least = replace(self, sink=sink, archive=0, archive_bytes=None)
            left = tokens - least.capacity(endless)
            if left < block and not self.offload:
                continue
            if left < 0:
                continue
            archive = self.archive if self.offload else min(self.archive, 4 * self.top_k, left // block)
            left -= 0 if self.offload else archive * block
            recent = self.recent + left // per_recent
            archive += 0 if self.offload else left % per_recent // block
            top_k = self.top_k
            if shape.training_frames is not None:
                top_k = min(top_k, max(1, shape.training_frames // shape.chunk_frames - sink - recent - 1))
            return replace(least, recent=recent, archive=archive, top_k=top_k)
        needed = replace(self, sink=0, archive=0 if self.offload else 1, archive_bytes=None).capacity(endless)
        raise LongtakeError(
            f"{budget} bytes: packforcing needs {needed * shape.token_bytes} bytes for the newest chunk and the one in "
            "flight"
        )

    def check(self, shape: HistoryShape) -> None:
        if self.middle == "compressed" and not shape.compressed_tokens:
            raise LongtakeError(
                "packforcing keeps its middle compressed, and this model has no compressed form: use middle=full"
            )

    # --- within ---------------------------------------------------------------------------------------------------

    def _block(self, shape: HistoryShape) -> int:
        """Tokens of one block of the middle."""
        return shape.compressed_tokens if self.middle == "compressed" else shape.chunk_tokens

    def _counts(self, shape: HistoryShape) -> tuple[int, int]:
        """Most chunks held whole, the one in flight included, and most in the archive."""
        whole, archived = self.sink + self.recent + 1, self.archive
        if shape.frames is not None:
            chunks = math.ceil(shape.frames / shape.chunk_frames)
            whole, archived = min(whole, chunks), min(archived, max(0, chunks - whole))
        return whole, archived

    def _leaves_sink(self, table: BlockTable) -> bool:
        """Whether the chunk in flight will not be part of the sink."""
        return sum(b.role != "anchor" for b in table.blocks) >= self.sink

    def _packed(
        self, sink: list[tuple[Entry, int, int]], middle: list[tuple[Entry, int, int]], archive: Sequence[Block],
        start: int | float,
    ) -> list[tuple[Entry, int, int]]:  # fmt: skip
        """The entries where they are to stand, before the frame `start`."""
        if self.positions == "absolute":
            return [*sink, *middle]
        if self.positions == "sink":
            start, rest = (archive[0].frame if archive else int(start)), middle
            moved = sink
        else:
            moved, rest = [*sink, *middle], []
        entries = pack_right(moved, start)
        return [(entry, f, n) for entry, (_, f, n) in zip(entries, moved, strict=True)] + rest

    def _choice(self, middle: Sequence[Block], slots: tuple[float, ...]) -> Choose:
        packed = self.positions == "packed"
        scored = None
        if packed and self.score_at != "original":
            level, n = self.score_at == "level", len(middle)
            scored = tuple(slots[self.top_k // 2 if level else i * self.top_k // n] for i in range(n))
        return Choose(
            tuple(b.id for b in middle), self.top_k, self.form, slots if packed else None, scored,
            "keys" if self.score_by == "mass" else "sums", self.layers == "shared",
        )  # fmt: skip


def _slots(middle: Sequence[Block], count: int, start: float) -> tuple[float, ...]:
    """Where `count` blocks of equal span stand that are packed against the frame `start`."""
    span = middle[-1].span
    return tuple(start - (count - i) * span for i in range(count))


def rows(queries: int) -> list[int]:
    """The queries of the published subsample: every eighth, but at least 32, evenly spread."""
    n = min(queries, max(32, queries // 8))
    return [i * queries // n for i in range(n)]

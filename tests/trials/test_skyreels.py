"""The SkyReels-V2 seam against the published implementation, with a memory that says the rules in the fewest words.

How FlowCache's fusing fits into one forward of block g on one branch (`clean`: finished blocks, oldest first; b: budget
in blocks):

1. `begin(g)`: fusing is due if more than b blocks are clean. So it happens in the first forward of *any* block on that
   branch after a block finished: the next block of the same row if one is computed, else the first computed in a later
   row. Only in that one, because `end` shortens the list again.
2. In each layer, in this order: rotate q and k of g at their absolute frames; overwrite g's K/V; if fusing is due,
   score the tokens of *all* clean blocks (survivors of earlier events first, then the newly finished block in grid
   order) with all of g's own rotated queries, and keep, per head, the best b blocks' worth of tokens;
   attend to those and to every unfinished block <= g. So the forward that fuses already attends to survivors only, and
   g itself is never a candidate.
3. Each layer, head and branch chooses alone. Layer 1 of the fusing forward runs on hidden states of a layer 0 that
   already attended to survivors, so the choices of all layers cannot be made in one place beforehand.
4. `end(g)`, after the last layer: the clean list keeps its last b names (they now name the fused set), then g joins it
   if finished.

Keys keep the rotation of the frame they came from for ever, and later events score them so. Survivors stay in the order
of their scores, best first, per head. The next event depends on that order, because max-pooling runs over the
candidates as they lie: survivors sorted by position choose other tokens from the second event on (4 % output error in
`compress_b1`, from row 15). Up to rounding it makes no difference whether keys are stored rotated, or un-rotated with a
position per head and token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .skyreels import BRANCHES, Golden, walk

TOLERANCE = 2e-5  # max |error| / max |recorded output|, per row


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Wan's rotary embedding: x [B, N, H, D] at positions [N, 3] (latent frame, row, column), interleaved pairs."""
    side = 2 * (x.shape[-1] // 6)
    channels = (x.shape[-1] - 2 * side, side, side)
    ladders = [theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d) for d in channels]
    angles = torch.cat([positions[:, axis, None].double() * ladder for axis, ladder in enumerate(ladders)], -1)
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]  # [N, 1, D/2]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def fuse_score(q: Tensor, k: Tensor, weight: float = 0.07, pool: int = 7) -> Tensor:
    """FlowCache's worth of each key: rotated q [M, H, D] and k [N, H, D] -> [H, N]; importance minus redundancy."""
    logits = torch.einsum("mhd,nhd->hmn", q, k) / q.shape[-1] ** 0.5
    importance = logits.softmax(-1).mean(1)  # softmax over candidates only, not over all that is attended to
    importance = F.max_pool1d(importance, pool, stride=1, padding=pool // 2)
    unit = F.normalize(k, dim=-1)
    cosine = torch.einsum("mhd,nhd->hmn", unit, unit)
    cosine.diagonal(dim1=1, dim2=2).zero_()
    return weight * importance - (1 - weight) * cosine.mean(1).softmax(-1)


@dataclass
class ReferenceLayer:
    """Rotated K/V [1, N, H, D] by block. The memory sets the last four fields before each forward."""

    grid: tuple[int, int, int]  # latent frames, rows and columns of tokens in one block
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    block: int = 0
    fusing: Sequence[int] = ()  # blocks whose tokens are candidates
    fused: Sequence[int] = ()  # names under which the survivors go on, as many blocks as the budget
    visible: Sequence[int] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames, rows, columns = self.grid
        first = self.block * frames
        positions = torch.cartesian_prod(torch.arange(first, first + frames), torch.arange(rows), torch.arange(columns))
        q, k = rotate(q, positions), rotate(k, positions)
        self.kv[self.block] = k, v
        if self.fusing:
            self.fuse(q)
        keys, values = (torch.cat(part, 1) for part in zip(*(self.kv[b] for b in self.visible), strict=True))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        return out.transpose(1, 2)

    def fuse(self, q: Tensor) -> None:
        """Replace the clean blocks by each head's own tokens that score highest under the queries q [1, M, H, D]."""
        keys, values = (torch.cat(part, 1) for part in zip(*(self.kv.pop(b) for b in self.fusing), strict=True))
        budget = len(self.fused) * q.shape[1]
        keep = fuse_score(q[0], keys[0]).topk(budget, dim=-1).indices  # [H, budget], best first
        index = keep.T[None, :, :, None].expand(1, -1, -1, keys.shape[-1])
        parts = zip(*(x.gather(1, index).chunk(len(self.fused), 1) for x in (keys, values)), strict=True)
        self.kv.update(zip(self.fused, parts, strict=True))


@dataclass
class ReferenceMemory:
    """One branch. Everything stays visible by default.

    `window`: of the finished blocks only so many, the last ones. `budget`: finished blocks are fused into so many.
    """

    layers: list[ReferenceLayer]
    window: int | None = None
    budget: int | None = None
    clean: list[int] = field(default_factory=list)  # finished, oldest first; fused ones keep the last names
    live: list[int] = field(default_factory=list)  # started and not finished
    seen: list[int] = field(default_factory=list)  # number of blocks attended to, one entry per forward

    def begin(self, block: int) -> None:
        if block not in self.live:
            self.live.append(block)
        limit = self.window or self.budget or len(self.clean)
        kept = self.clean[-limit:]
        fusing = self.clean if self.budget and len(self.clean) > self.budget else ()
        visible = [*kept, *(b for b in self.live if b <= block)]
        for layer in self.layers:
            layer.block, layer.fusing, layer.fused, layer.visible = block, fusing, kept, visible
        self.seen.append(len(visible))

    def end(self, block: int, finished: bool) -> None:
        if self.budget:
            self.clean = self.clean[-self.budget :]
        if finished:
            self.live.remove(block)
            self.clean = [*self.clean, block]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.read(Path(__file__).parents[1] / "goldens" / "skyreels_tiny_block_causal.safetensors")


def replay(golden: Golden, run: str, memories: dict[str, ReferenceMemory]) -> dict[tuple[int, str], float]:
    """Worst error of each (row, branch), relative to the largest recorded output of that row and branch."""
    pairs: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
    for out in walk(golden.model(), golden, run, memories):
        pairs.setdefault((out.row, out.branch), []).append((out.velocity, out.expected))
    errors = {}
    for key, blocks in pairs.items():
        got, expected = (torch.stack(side) for side in zip(*blocks, strict=True))
        errors[key] = ((got - expected).abs().max() / expected.abs().max()).item()
    return errors


def fresh(golden: Golden, **rule: int) -> dict[str, ReferenceMemory]:
    frames, _, rows, columns = golden.config["BS"], *golden.config["patch_size"]
    grid = (frames, golden.config["H"] // rows, golden.config["W"] // columns)
    layers = golden.config["m"]["num_layers"]
    return {branch: ReferenceMemory([ReferenceLayer(grid) for _ in range(layers)], **rule) for branch in BRANCHES}


RUNS: dict[str, dict[str, int]] = {
    "off": {},
    "on_a": {},
    "on_b": {},
    "on_noret": {},
    "prefix_off": {},
    "prefix_on": {},
    "kvrange1": {"window": 1},
    "compress_b1": {"budget": 1},
    "compress_b2_on": {"budget": 2},
}


@pytest.mark.parametrize("run", RUNS)
def test_one_block_at_a_time_equals_the_published_run(golden: Golden, run: str) -> None:
    """Velocity of every computed block; a reused block only leaves its K/V as they were, its output is not replayed."""
    memories = fresh(golden, **RUNS[run])
    errors = replay(golden, run, memories)
    assert max(errors.values()) < TOLERANCE
    calls = golden.runs[run]["kv_groups_seen_per_call"]  # alternating between the branches
    for first, branch in enumerate(BRANCHES):
        assert memories[branch].seen == [blocks for call in calls[first::2] for blocks in call]


@pytest.mark.parametrize(
    ("run", "rule", "row"),
    [
        ("kvrange1", {}, 13),
        ("compress_b1", {}, 13),
        ("compress_b1", {"window": 1}, 13),
        ("compress_b2_on", {"budget": 1}, 14),
    ],
)
def test_another_rule_departs_where_the_first_block_is_fused(golden: Golden, run: str, rule: dict, row: int) -> None:
    """The recorded runs tell the rules apart: exact before the named row, off by more than a percent in it."""
    errors = replay(golden, run, fresh(golden, **rule))
    assert max(error for (at, _), error in errors.items() if at < row) < TOLERANCE
    assert min(error for (at, _), error in errors.items() if at == row) > 1e-2

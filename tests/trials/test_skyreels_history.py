"""SkyReels-V2 on the library's own history: FlowCache's fusing in the middle of a forward, per layer, head and branch.

The rules are those of `test_skyreels`; here the past is a `History`: keys un-rotated, a position per row or, after
fusing, per layer, head and token. A policy sees the table only. Its plan is remade when a block enters or finishes, and
leaves the choice of survivors open: the next block to be computed resolves it, layer by layer, with its own queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.history import History, LayerView
from longtake.plan import FULL, BlockTable, Drop, Entry, Fuse, HistoryShape, Plan, Signals
from longtake.policies import FullHistory, KVPolicy
from longtake.rope import wan_table

from .skyreels import BRANCHES, Golden, walk
from .test_skyreels import TOLERANCE, fuse_score


@dataclass(frozen=True)
class LastBlocks(KVPolicy):
    """Of the finished blocks only the last few."""

    blocks: int

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        old, seen = table.blocks[: -self.blocks], table.blocks[-self.blocks :]
        return Plan(tuple(Entry(b.id) for b in seen), tuple(Drop(b.id) for b in old))

    def capacity(self, shape: HistoryShape) -> None:
        return None  # the trial makes its history itself


@dataclass(frozen=True)
class FuseTo(KVPolicy):
    """Finished blocks are fused into `blocks` blocks' worth of tokens, best first, once there are more."""

    blocks: int
    sort: bool = False

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        budget = self.blocks * table.live[0].forms[FULL].count
        if sum(block.forms[FULL].count for block in table.blocks) <= budget:
            return Plan(tuple(Entry(block.id) for block in table.blocks))
        return Plan((Fuse(tuple(block.id for block in table.blocks), budget, sort=self.sort),))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.stack([fuse_score(*pair) for pair in zip(q, k, strict=True)])

    def capacity(self, shape: HistoryShape) -> None:
        return None  # as above


@dataclass
class Take:
    """A history and the policy that plans over it. `eager` remakes the plan before every forward of a block."""

    history: History
    policy: KVPolicy
    grid: tuple[int, int, int]  # latent frames, rows and columns of tokens in one block
    eager: bool = False
    ids: dict[int, int] = field(default_factory=dict)  # block in flight → its id in the history
    left: set[str] = field(default_factory=set)  # streams in which the block being forwarded has finished
    changed: bool = True

    def enter(self, block: int) -> int:
        frames, rows, columns = self.grid
        if block not in self.ids:
            first = block * frames
            base = torch.cartesian_prod(torch.arange(first, first + frames), torch.arange(rows), torch.arange(columns))
            step = torch.tensor([1.0, 0, 0]).expand(len(base), -1)
            self.ids[block] = self.history.admit(first, frames, (base.double(), step), grid=(rows, columns))
            self.changed = True
        if self.changed or self.eager:
            self.history.apply(self.policy.plan(self.history.table(), self.history.signals()))
            self.changed = False
        return self.ids[block]

    def leave(self, block: int, stream: str) -> None:
        """The block has finished in `stream`; once it has in all of them, it belongs to the past."""
        self.left.add(stream)
        if len(self.left) == len(self.history.streams):
            self.history.commit(self.ids.pop(block))
            self.left, self.changed = set(), True


@dataclass
class HistoryMemory:
    """One branch of a take, as the driver wants it."""

    take: Take
    stream: str
    layers: Sequence[LayerView] = ()
    seen: list[float] = field(default_factory=list)  # blocks attended to, one entry per forward
    fusings: int = 0  # forwards that resolved an open choice

    def begin(self, block: int) -> None:
        if self.take.eager and self.stream != self.take.history.streams[0]:
            number = self.take.ids[block]  # the plan of this block's first stream holds for all
        else:
            number = self.take.enter(block)
        self.layers = self.take.history.layers(self.stream, number, write=True)
        frames, rows, columns = self.take.grid
        self.seen.append(self.layers[0].k.shape[1] / (frames * rows * columns))
        self.fusings += self.take.history.residency == "resident" and self.layers[0].prepare is not None

    def end(self, block: int, finished: bool) -> None:
        if finished:
            self.take.leave(block, self.stream)


def takes(
    golden: Golden, policy: KVPolicy, residency: str, *, shared: bool = True, eager: bool = False
) -> dict[str, HistoryMemory]:
    """A memory per branch: streams of one history, or one history each."""
    sizes, frames, (_, rows, columns) = golden.config["m"], golden.config["BS"], golden.config["patch_size"]
    grid = (frames, golden.config["H"] // rows, golden.config["W"] // columns)
    heads = sizes["num_heads"]
    head_dim = sizes["dim"] // heads
    shape = HistoryShape(sizes["num_layers"], heads, head_dim, 4, grid[1] * grid[2], frames, streams=len(BRANCHES))
    room = golden.config["NB"] * golden.config["tokens_per_block"]

    def take(*streams: str) -> Take:
        history = History(
            shape, wan_table(head_dim), streams=streams, capacity=room, residency=residency, score=policy.score
        )
        return Take(history, policy, grid, eager)

    both = take(*BRANCHES)
    return {branch: HistoryMemory(both if shared else take(branch), branch) for branch in BRANCHES}


def replay(golden: Golden, run: str, memories: dict[str, HistoryMemory], shared: bool = True) -> dict[int, float]:
    """Worst error of each row, relative to the largest recorded output of its branch."""
    pairs: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
    for out in walk(golden.model(), golden, run, memories, order="block" if shared else "branch"):
        pairs.setdefault((out.row, out.branch), []).append((out.velocity, out.expected))
    errors: dict[int, float] = {}
    for (row, _), blocks in pairs.items():
        got, expected = (torch.stack(side) for side in zip(*blocks, strict=True))
        errors[row] = max(errors.get(row, 0.0), float((got - expected).abs().max() / expected.abs().max()))
    return errors


RUNS: dict[str, KVPolicy] = {
    "off": FullHistory(),
    "on_b": FullHistory(),
    "prefix_off": FullHistory(),
    "kvrange1": LastBlocks(1),
    "compress_b1": FuseTo(1),
    "compress_b2_on": FuseTo(2),
}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.read(Path(__file__).parents[1] / "goldens" / "skyreels_tiny_block_causal.safetensors")


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("run", RUNS)
def test_the_history_reproduces_the_published_run(golden: Golden, run: str, residency: str) -> None:
    memories = takes(golden, RUNS[run], residency)
    assert max(replay(golden, run, memories).values()) < TOLERANCE
    calls = golden.runs[run]["kv_groups_seen_per_call"]  # alternating between the branches
    for first, branch in enumerate(BRANCHES):
        assert memories[branch].seen == [blocks for call in calls[first::2] for blocks in call]


def test_with_a_history_for_each_branch_the_published_order_can_be_kept(golden: Golden) -> None:
    """Whole row of one branch, then of the other, as a pipeline calls its model: then finishing is no shared event."""
    memories = takes(golden, FuseTo(1), "resident", shared=False)
    assert max(replay(golden, "compress_b1", memories, shared=False).values()) < TOLERANCE


@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_remaking_the_plan_before_every_block_changes_nothing(golden: Golden, residency: str) -> None:
    memories = takes(golden, FuseTo(1), residency, eager=True)
    assert max(replay(golden, "compress_b1", memories).values()) < TOLERANCE


def test_survivors_are_chosen_once_and_then_frozen(golden: Golden) -> None:
    """Three blocks finish while another one is still to come; all other forwards find a view that is ready."""
    memories = takes(golden, FuseTo(1), "resident")
    replay(golden, "compress_b1", memories)
    assert [memory.fusings for memory in memories.values()] == [3, 3]


def test_every_layer_head_and_branch_has_survivors_of_its_own(golden: Golden) -> None:
    memories = takes(golden, FuseTo(1), "resident")
    replay(golden, "compress_b1", memories)
    history = memories["cond"].take.history
    fused = history.table().blocks[0]
    assert (fused.role, fused.frame, fused.span, fused.forms[FULL].count) == ("fused", 0, 8, 8)
    positions = torch.stack([history.stores[branch].held[fused.id, FULL].head_base[:, 0] for branch in BRANCHES])
    sets = [
        {frozenset(map(tuple, head.tolist())) for head in branch.transpose(1, 2).flatten(0, 1)} for branch in positions
    ]
    assert [len(one) for one in sets] == [4, 4]  # two layers with two heads each
    assert sets[0] != sets[1]


def test_a_fused_past_is_not_the_whole_past(golden: Golden) -> None:
    covered = {}
    for run in ("off", "compress_b1"):
        memories = takes(golden, RUNS[run], "resident")
        replay(golden, run, memories)
        covered[run] = FullHistory().covers(memories["cond"].take.history.table())
    assert covered == {"off": True, "compress_b1": False}


@pytest.mark.parametrize(
    ("run", "policy", "row"),
    [
        ("kvrange1", FullHistory(), 13),
        ("compress_b1", LastBlocks(1), 13),
        ("compress_b1", FuseTo(1, sort=True), 15),
        ("compress_b2_on", FuseTo(1), 14),
    ],
)
def test_another_policy_would_be_noticed(golden: Golden, run: str, policy: KVPolicy, row: int) -> None:
    errors = replay(golden, run, takes(golden, policy, "resident"))
    assert max(error for at, error in errors.items() if at < row) < TOLERANCE
    assert errors[row] > 1e-2


@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_branches_need_not_compute_in_step(residency: str) -> None:
    """One branch fuses, another block enters, and only then does the other branch compute: as if each were alone."""
    layers, heads, tokens, dim = 2, 2, 4, 12
    policy, steps = FuseTo(1), torch.tensor([1.0, 0, 0]).expand(tokens, -1)

    def outputs(histories: dict[str, History]) -> dict[tuple[str, int, int], Tensor]:
        out: dict[tuple[str, int, int], Tensor] = {}
        everyone = list({id(history): history for history in histories.values()}.values())

        def enter(frame: int) -> None:
            for history in everyone:
                history.admit(frame, 1, (torch.arange(tokens)[:, None] + steps * frame, steps))
                history.apply(policy.plan(history.table(), history.signals()))

        def forward(stream: str, frame: int) -> None:
            history = histories[stream]
            number = next(block.id for block in history.table().live if block.frame == frame)
            noise = torch.Generator().manual_seed(len(stream) + 10 * frame)
            for layer, view in enumerate(history.layers(stream, number, write=True)):
                q, k, v = torch.randn(3, 1, tokens, heads, dim, generator=noise)
                out[stream, frame, layer] = view.attend(q, k, v)

        for frame in (0, 1):
            enter(frame)
            for stream in BRANCHES:
                forward(stream, frame)
            for history in everyone:
                history.commit(history.table().live[0].id)
        enter(2)  # two blocks are finished: one of them is to be left
        forward("cond", 2)
        enter(3)
        for stream in BRANCHES:
            forward(stream, 2)
            forward(stream, 3)
        assert all([block.role for block in history.table().blocks] == ["fused"] for history in everyone)
        return out

    def history(*streams: str) -> History:
        shape = HistoryShape(layers, heads, dim, 4, tokens, 1, streams=len(streams))
        return History(
            shape, wan_table(dim), streams=streams, capacity=4 * tokens, residency=residency, score=policy.score
        )

    together = outputs(dict.fromkeys(BRANCHES, history(*BRANCHES)))
    alone = outputs({branch: history(branch) for branch in BRANCHES})
    assert all(torch.equal(together[key], alone[key]) for key in alone)

"""MAGI-1 on the library's own history: the authors' loop, fusing between steps with the last forward's queries.

The loop is that of `test_magi`, its order to `compress` is ignored: here the policy finds out by itself. A chunk that
enters makes the table one chunk too long; the plan fuses the oldest ones, by the scores that the last forward left, and
the chunk enters into the rows that this frees. Keys are held un-rotated (75 % of their channels turn), fewer heads than
queries have.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from longtake.history import History, LayerView
from longtake.plan import FULL, BlockTable, Entry, Fuse, HistoryShape, Plan, Signals
from longtake.policies import FullHistory, KVPolicy
from longtake.rope import RotaryTable

from .magi import rotary_table
from .test_magi import GOLDEN, Golden, Select, Trace, flowcache_loop, token_scores


@dataclass(frozen=True)
class FuseOldest(KVPolicy):
    """At most `total` chunks are held; before that is exceeded, the `finished` oldest are fused into one fewer.

    group: tokens that stay or go together (1, or those of a frame). asking: the last queries of a chunk that count.
    """

    total: int
    finished: int
    mix: float
    group: int = 1
    asking: int | None = None
    sort: bool = False
    moment: ClassVar[str] = "last_forward"

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        chunk = table.live[-1].forms[FULL].count
        held = sum(block.forms[FULL].count for block in (*table.blocks, *table.live))
        fuses = held > self.total * chunk
        oldest, tokens = [], -chunk if fuses else 0  # fusing makes the past one chunk shorter
        for block in (*table.blocks, *table.live):
            if tokens < self.finished * chunk:
                oldest.append(block.id)
                tokens += block.forms[FULL].count
        if not fuses:
            return Plan(tuple(Entry(block.id) for block in table.blocks), observe=tuple(oldest))
        n = (self.finished - 1) * chunk
        scored = signals.scores["cond"]
        scores = torch.stack([scored[layer] for layer in sorted(scored)])  # [L, B, H, candidates]
        best = scores.unflatten(-1, (-1, self.group)).mean(-1).topk(n // self.group, dim=-1).indices
        keep = (best[..., None] * self.group + torch.arange(self.group)).flatten(-2)
        return Plan((Fuse(tuple(block.id for block in table.blocks), n, keep, sort=self.sort),), observe=tuple(oldest))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, candidates] of the oldest chunks, which the plan has observed."""
        q = q if self.asking is None else q[:, -self.asking :]
        return torch.stack([token_scores(*pair, self.mix) for pair in zip(q, k.transpose(1, 2), strict=True)])

    def capacity(self, shape: HistoryShape) -> int:
        return self.total * shape.chunk_tokens


@dataclass
class HistoryMemory:
    """The authors' loop on a history: a chunk finishes when the one that takes its place in the window enters."""

    history: History
    policy: KVPolicy
    window: int
    chunk_frames: int
    observe: bool
    layers: Sequence[LayerView] = ()
    ids: dict[int, int] = field(default_factory=dict)  # chunk in flight → its id in the history
    forwarded: set[int] = field(default_factory=set)  # ids of chunks in flight that have K/V
    positions: Tensor | None = None  # of the chunk forwarded last

    def enter(self, chunk: int, positions: Tensor) -> None:
        if chunk - self.window in self.ids:
            self.history.commit(self.ids.pop(chunk - self.window))
        step = torch.tensor([1.0, 0, 0]).expand_as(positions)
        first = chunk * self.chunk_frames
        self.ids[chunk] = self.history.admit(first, self.chunk_frames, (positions, step))
        self.history.apply(self.policy.plan(self.history.table(), self.history.signals(chunk)))

    def begin(self, chunk: int, positions: Tensor) -> None:
        if chunk not in self.ids:
            self.enter(chunk, positions)
        self.positions = positions
        self.forwarded.add(self.ids[chunk])
        self.layers = self.history.layers("cond", self.ids[chunk], write=True, observe=self.observe)

    def tokens(self) -> int:
        table = self.history.table()
        live = [block for block in table.live if block.id in self.forwarded]
        return sum(block.forms[FULL].count for block in (*table.blocks, *live))

    def compress(self, clean: list[int], select: Select) -> None:
        """The moment at which the next chunk enters, before any forward of the next step; the policy does the rest."""
        newest, ahead = max(self.ids), torch.tensor([float(self.chunk_frames), 0, 0])
        assert self.positions is not None
        assert clean[-1] == newest + 1 - self.window
        first = self.positions - self.positions[0, 0] * torch.tensor([1.0, 0, 0])
        self.enter(newest + 1, first + (newest + 1) * ahead)


def replay(golden: Golden, key: str, residency: str, sort: bool = False) -> tuple[Trace, HistoryMemory]:
    run, sizes, inputs = golden.run(key), golden.config["model"], golden.runs[key]["inputs"]
    noise, text, mask = (golden.tensors[f"{inputs}/{name}"] for name in ("noise", "y", "text_mask"))
    weights, cfg = golden.model(run.num_steps)
    table = rotary_table(weights)
    rotary = RotaryTable(tuple(table.axis.tolist()), tuple(table.frequency.tolist()), "half")
    shape = HistoryShape(sizes["num_layers"], cfg.kv_heads, sizes["kv_channels"], 4, run.frame_tokens, run.chunk_frames)
    policy: KVPolicy = FullHistory()
    if run.compress:
        policy = FuseOldest(
            total=run.B_total,
            finished=run.B_total - run.window + 1,
            mix=run.mix_lambda,
            group={"token": 1, "frame": run.frame_tokens}[run.strategy],
            asking={"chunk": None, "frame": run.frame_tokens}[run.query_granularity],
            sort=sort,
        )
    history = History(shape, rotary, capacity=policy.capacity(shape), residency=residency, score=policy.score)
    memory = HistoryMemory(history, policy, run.window, run.chunk_frames, observe=run.compress)
    with torch.no_grad():
        return flowcache_loop(weights, cfg, run, noise, text[0], mask[0], memory), memory


FULL_RUNS = ["off", "on", "off_keep_nearly_clean"]
COMPRESSED = ["compress_B5_token_chunk", "compress_B5_on", "compress_B6_frame_frame_on"]


@pytest.fixture(scope="module")
def golden() -> Golden:
    with safe_open(GOLDEN, "pt") as file:
        about = file.metadata()
    runs = {run["key"]: run for run in json.loads(about["runs"])}
    return Golden(load_file(GOLDEN), json.loads(about["config"]), runs)


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("key", FULL_RUNS + COMPRESSED)
def test_the_history_reproduces_the_authors_run(golden: Golden, key: str, residency: str) -> None:
    trace, _ = replay(golden, key, residency)
    want = {name: golden.tensors[f"{key}/{name}"] for name in ("decision", "accumulator", "latents_after_step")}
    assert torch.equal(trace.decision, want["decision"])
    assert trace.compressions == golden.runs[key]["compressions"]
    torch.testing.assert_close(trace.accumulator, want["accumulator"], rtol=0, atol=1e-6)
    torch.testing.assert_close(trace.latents, want["latents_after_step"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("key", COMPRESSED)
def test_the_store_ends_with_the_authors_rows_in_their_order(golden: Golden, key: str) -> None:
    """Un-rotated rows, rotated to where each head's tokens come from, are the published store of rotated ones."""
    _, memory = replay(golden, key, "resident")
    history = memory.history
    store, table, parts = history.stores["cond"], history.table(), []
    for block in (*table.blocks, *table.live):
        held = store.held[block.id, FULL]
        position = store.base[held.rows] if held.head_base is None else held.head_base[0]
        k = history.rotary.rotate(store.k[0][:, held.rows], history.rotary.phases(position))
        parts.append(torch.cat([k, store.v[0][:, held.rows]], -1))
    torch.testing.assert_close(torch.cat(parts, 1)[0], golden.tensors[f"{key}/kv_cache_layer0"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("key", COMPRESSED)
def test_the_order_of_survivors_matters_from_the_second_compression_on(golden: Golden, key: str) -> None:
    trace, _ = replay(golden, key, "resident", sort=True)
    error = (trace.latents - golden.tensors[f"{key}/latents_after_step"]).abs().amax(dim=(1, 2, 3, 4))
    second = golden.runs[key]["compressions"][1]["step"]
    assert error[: second + 1].max() < 1e-4
    assert error[-1] > 5e-2


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pass_that_does_not_write_leaves_no_trace(residency: str, alone: bool) -> None:
    """MAGI-1's three passes share one K/V, one of them writes: later chunks must not see what another pass computed."""
    layers, tokens, query_heads, kv_heads, dim = 2, 4, 6, 2, 8
    rotary = RotaryTable((0, 1, 2), (1.0, 0.5, 0.25), "half")  # 6 of 8 channels turn
    steps = torch.tensor([1.0, 0, 0]).expand(tokens, -1)

    def output(extra: bool) -> list[Tensor]:
        shape = HistoryShape(layers, kv_heads, dim, 4, tokens, 1)
        history = History(shape, rotary, capacity=2 * tokens, residency=residency)
        ids = [history.admit(t, 1, (torch.arange(tokens)[:, None] + steps * t, steps)) for t in range(2)]
        history.apply(Plan())

        def forward(chunk: int, seed: int, write: bool, seen: bool = True) -> list[Tensor]:
            noise = torch.Generator().manual_seed(seed)
            out = []
            for view in history.layers("cond", ids[chunk], write=write, history=seen):
                q = torch.randn(1, tokens, query_heads, dim, generator=noise)
                out.append(view.attend(q, *torch.randn(2, 1, tokens, kv_heads, dim, generator=noise)))
            return out

        forward(0, seed=1, write=True)
        if extra:
            forward(0, seed=2, write=False, seen=not alone)
        return forward(1, seed=3, write=True)

    assert all(torch.equal(*pair) for pair in zip(output(extra=True), output(extra=False), strict=True))

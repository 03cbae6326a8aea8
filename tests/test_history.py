"""The memory of a take, driven with random K/V and random plans beside a slow twin that keeps every row it ever saw."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtake import FullHistory, LongtakeError, PlanError, SlidingWindow, policies
from longtake.history import History
from longtake.plan import FULL, Drop, Entry, HistoryShape, Plan, as_tensor
from longtake.policies import KVPolicy
from longtake.rope import wan_table

LAYERS, HEADS, DIM, PER_FRAME = 2, 2, 12, 4
ROTARY = wan_table(DIM)
random_tables = settings(max_examples=40, deadline=None, derandomize=True)


def shape_of(chunk: int, **changes) -> HistoryShape:
    return HistoryShape(LAYERS, HEADS, DIM, 4, PER_FRAME, chunk, **changes)


# a given chunk has a commit pass only, which stands in for its last forward
PASSES = ("commit", "last_forward")


class Driven:
    """A history, and beside it the twin: all K/V [B, n, H, D] ever committed, by (stream, block, layer)."""

    def __init__(self, shape: HistoryShape, policy: KVPolicy, seed: int = 0, residency: str = "resident"):
        self.policy, self.frame, self.takes = policy, 0, shape.batch
        self.streams = ("cond", "uncond")
        scores = type(policy).score is not KVPolicy.score
        self.history = History(
            shape, ROTARY, streams=self.streams, capacity=policy.capacity(shape), visible=policy.visible(shape),
            residency=residency, score=policy.score if scores else None, key_sums="key_sums" in policy.requires,
        )  # fmt: skip
        self.random = torch.Generator().manual_seed(seed)
        self.kv: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        self.places: dict[int, tuple[Tensor, Tensor]] = {}
        self.plan = Plan()

    def normal(self, *size: int) -> Tensor:
        return torch.randn(self.takes, *size, HEADS, DIM, generator=self.random)

    def positions(self, span: int) -> tuple[Tensor, Tensor]:
        base = torch.stack(
            torch.meshgrid(*(torch.arange(n).double() for n in (span, 2, PER_FRAME // 2)), indexing="ij"), -1
        ).flatten(0, 2)
        base[:, 0] += self.frame
        step = torch.zeros_like(base)
        step[:, 0] = 1
        return base, step

    def announce(self, span: int, role: str = "live", tokens: int | None = None) -> int:
        base, step = self.positions(span) if tokens is None else (torch.zeros(tokens, 3).double(),) * 2
        block = self.history.admit(self.frame, span, (base, step), role=role, grid=(2, PER_FRAME // 2))
        self.places[block] = (base, step)
        self.plan = self.policy.plan(self.history.table(), self.history.signals(len(self.places) - 1))
        self.history.apply(self.plan)
        return block

    def forward(self, block: int, *, write: bool, compare: bool = True) -> None:
        n = len(self.places[block][0])
        for stream in self.streams:
            views = self.history.layers(stream, block, write=write, observe=write and self.policy.moment in PASSES)
            for layer, view in enumerate(views):
                q, k, v = (self.normal(n) for _ in range(3))
                out = view.attend(q, k, v)
                if compare:
                    torch.testing.assert_close(out, self.expected(stream, block, layer, q, k, v), atol=1e-5, rtol=0)
                if write:
                    self.kv[stream, block, layer] = (k, v)

    def expected(self, stream: str, block: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the planned rows and the chunk itself, all of it rotated from the numbers once written."""
        keys, values, weights = [], [], []
        for entry in self.plan.entries:
            owned = next(b for b in self.history.table().blocks if b.id == entry.block).forms[FULL].owned
            tokens = as_tensor(owned if entry.tokens is None else entry.tokens)
            base, step = (x[tokens] for x in self.places[entry.block])
            past_k, past_v = (x[:, tokens] for x in self.kv[stream, entry.block, layer])
            keys.append(ROTARY.rotate(past_k, ROTARY.phases(base + entry.shift * step)))
            values.append(past_v)
            weights.append(torch.full((len(tokens),), float(entry.log_weight)))
        base, step = self.places[block]
        here = ROTARY.phases(base + self.plan.live_shift * step)
        keys, values = torch.cat([*keys, ROTARY.rotate(k, here)], 1), torch.cat([*values, v], 1)
        weights = torch.cat([*weights, torch.zeros(len(base))])
        logits = torch.einsum("bqhd,bkhd->bhqk", ROTARY.rotate(q, here), keys) * DIM**-0.5 + weights
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), values)

    def chunk(self, span: int, compare: bool = True, **announced) -> int:
        block = self.announce(span, **announced)
        self.forward(block, write=False, compare=compare)
        self.forward(block, write=True, compare=compare)
        self.history.commit(block)
        self.frame += span
        return block

    def check_rows(self) -> None:
        """Rows belong to one block each, are counted as used, and hold what was written, to the bit."""
        for stream, store in self.history.stores.items():
            rows = torch.cat([torch.empty(0, dtype=torch.int64), *(held.rows for held in store.held.values())])
            assert len(rows.unique()) == len(rows) == int(store.used.sum()) and bool(store.used[rows].all())
            for (block, form), held in store.held.items():
                if form != FULL or held.head_base is not None or (stream, block, 0) not in self.kv:
                    continue
                for layer in range(LAYERS):
                    k, v = self.kv[stream, block, layer]
                    assert torch.equal(store.k[layer][:, held.rows], k[:, held.tokens])
                    assert torch.equal(store.v[layer][:, held.rows], v[:, held.tokens])
                base, step = self.places[block]
                assert torch.equal(store.base[held.rows], base[held.tokens])
                assert torch.equal(store.step[held.rows], step[held.tokens])
            for block in self.history.table().blocks:
                for form, kept in block.forms.items():
                    if (block.id, form) in store.held:
                        assert as_tensor(kept.owned).tolist() == store.held[block.id, form].tokens.tolist()


class Arbitrary(KVPolicy):
    """Whatever `draw` says: forgets blocks and tokens, shows parts, moves them, weighs them, shows some twice."""

    def __init__(self, draw, rows: int):
        object.__setattr__(self, "draw", draw)
        object.__setattr__(self, "rows", rows)

    def capacity(self, shape):
        return self.rows

    def plan(self, table, signals):
        draw, entries, drops = self.draw, [], []
        held = sum(b.forms[FULL].count for b in table.blocks) + sum(b.forms[FULL].count for b in table.live)
        for block in table.blocks:
            tokens = as_tensor(block.forms[FULL].owned)
            full = held > self.rows
            fate = draw(st.sampled_from(["drop", "cut"] if full else ["drop", "cut", "see", "see", "hide"]))
            if fate == "cut" and not full:
                gone = tokens[torch.tensor(draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))))]
            else:
                gone = tokens if fate in ("drop", "cut") else tokens[:0]
            if len(gone):
                drops.append(Drop(block.id, tokens=None if draw(st.booleans()) and len(gone) == len(tokens) else gone))
                tokens = tokens[~torch.isin(tokens, gone)]
                held -= len(gone)
            if not len(tokens) or fate == "hide":
                continue
            for _ in range(draw(st.integers(1, 2))):
                some = tokens[torch.tensor(draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))))]
                some = None if not len(some) or draw(st.booleans()) else some
                shift = draw(st.sampled_from([0, 0, -2.5, 7, 3000]))
                entries.append(
                    Entry(block.id, tokens=some, shift=shift, log_weight=draw(st.sampled_from([0.0, 0.0, -1.5])))
                )
        order = draw(st.permutations(entries))
        return Plan(tuple(order), tuple(drops), live_shift=draw(st.sampled_from([0, 0, 11])))


@random_tables
@given(st.data(), st.lists(st.integers(1, 4), min_size=2, max_size=6), st.sampled_from(["resident", "scratch"]))
def test_any_plan_is_shown_as_a_slow_twin_computes_it(data, spans, residency):
    shape = shape_of(4, batch=data.draw(st.sampled_from([1, 2])))
    driven = Driven(shape, Arbitrary(data.draw, rows=10 * PER_FRAME), residency=residency)
    for span in spans:
        driven.chunk(span)
        driven.check_rows()


windows = st.builds(
    lambda sink, chunk, more, positions: (SlidingWindow(sink + chunk + more, sink, positions), chunk),
    st.integers(0, 5), st.integers(1, 4), st.integers(0, 7), st.sampled_from(["absolute", "slots"]),
)  # fmt: skip


@random_tables
@given(windows, st.integers(0, 1), st.integers(0, 5), st.sampled_from(["resident", "scratch"]))
def test_a_window_keeps_its_promises_on_random_tables(window, first, text, residency):
    """With a first image of one frame, or without, and with text before the first frame, or without."""
    policy, chunk = window
    shape = shape_of(chunk, anchor_tokens=text)
    driven = Driven(shape, policy, residency=residency)
    anchor = driven.chunk(0, role="anchor", tokens=text) if text else None
    owned: dict[int, set[int]] = {}
    for span in [*[1] * first, *[chunk] * 8]:
        driven.chunk(span)
        driven.check_rows()
        blocks = driven.history.table().blocks
        assert sum(b.forms[FULL].count for b in blocks) <= policy.capacity(shape) + text
        assert all(store.size == policy.capacity(shape) + text for store in driven.history.stores.values())
        if anchor is not None:
            assert blocks[0].id == anchor and blocks[0].role == "anchor" and blocks[0].complete
            assert driven.plan.entries == () or driven.plan.entries[0].block == anchor
        frames = {b.frame + t // PER_FRAME for b in blocks if b.span for t in as_tensor(b.forms[FULL].owned).tolist()}
        assert frames >= set(range(min(policy.sink, driven.frame)))  # the sink is never lost
        assert max(frames) == driven.frame - 1
        for b in blocks:
            tokens = set(as_tensor(b.forms[FULL].owned).tolist())
            assert tokens <= owned.get(b.id, tokens)  # what is forgotten stays forgotten
            owned[b.id] = tokens


@random_tables
@given(windows)
def test_positions_in_a_window_increase_and_slots_leave_no_gap(window):
    policy, chunk = window
    driven = Driven(shape_of(chunk), policy)
    for _ in range(8):
        driven.chunk(chunk, compare=False)
        start = driven.frame - chunk
        frames = []
        for entry in driven.plan.entries:
            tokens = as_tensor(entry.tokens if entry.tokens is not None else range(chunk * PER_FRAME))
            places = driven.places[entry.block][0][tokens][:, 0] + entry.shift
            frames += sorted(set(places.tolist()))
        assert frames == sorted(set(frames)) and (not frames or frames[-1] < start)
        assert len(frames) <= policy.frames - chunk
        if policy.positions == "slots":
            assert frames == list(range(start - len(frames), start))


@pytest.mark.parametrize("name", sorted(policies.available()))
@random_tables
@given(frames=st.integers(6, 40), chunk=st.integers(1, 3), first=st.booleans())
def test_every_policy_stays_within_the_rows_it_asked_for(name, frames, chunk, first):
    shape = shape_of(chunk, streams=2)
    try:
        policy = policies.available()[name]().fit(frames * shape.frame_bytes, shape)
        policy.check(shape)
        assert policy.capacity(shape) * shape.token_bytes <= frames * shape.frame_bytes
    except LongtakeError:
        policy = policies.available()[name]()
    policy = policy.settle(shape)  # as a session does
    driven = Driven(shape, policy)
    for span in [*[1] * first, *[chunk] * 10]:
        driven.chunk(span, compare=False)
        driven.check_rows()
        limit = policy.capacity(shape)
        for store in driven.history.stores.values():
            assert limit is None or int(store.used.sum()) <= store.size == limit


@random_tables
@given(windows, st.integers(0, 7), st.booleans())
def test_an_abandoned_chunk_leaves_no_trace(window, chunks, computed):
    policy, chunk = window
    steady, shaken = (Driven(shape_of(chunk), policy, seed=3) for _ in range(2))
    for _ in range(chunks):
        steady.chunk(chunk, compare=False)
        shaken.chunk(chunk, compare=False)
    state = shaken.random.get_state()
    block = shaken.announce(chunk)
    if computed:
        shaken.forward(block, write=True)
    shaken.history.abandon(block)
    for layer in range(LAYERS):
        shaken.kv.pop(("cond", block, layer), None), shaken.kv.pop(("uncond", block, layer), None)
    shaken.check_rows()
    assert block not in {b.id for b in shaken.history.table().blocks} and not shaken.history.table().live
    assert shaken.history.frames_seen == steady.history.frames_seen and shaken.history.attended() == 0
    shaken.random.set_state(state)
    for _ in range(3):
        steady.chunk(chunk)
        shaken.chunk(chunk)
        assert shaken.history.held_bytes == steady.history.held_bytes
        for a, b in zip(steady.history.table().blocks, shaken.history.table().blocks, strict=True):
            assert (a.frame, a.span, list(a.forms[FULL].owned)) == (b.frame, b.span, list(b.forms[FULL].owned))


def test_frames_are_forgotten_out_of_the_middle_of_a_block():
    """Sink 1 and window 6 of chunks of 3: the first block loses its middle, and later all but its first frame."""
    driven = Driven(shape_of(3), SlidingWindow(6, sink=1))
    first = driven.chunk(3)
    driven.chunk(3)
    driven.chunk(3)
    owned = [list(b.forms[FULL].owned) for b in driven.history.table().blocks]
    assert owned == [list(range(4)), list(range(4, 12)), list(range(12))]
    driven.chunk(3)
    table = driven.history.table()
    assert table.blocks[0].id == first and list(table.blocks[0].forms[FULL].owned) == list(range(4))
    driven.check_rows()


def test_more_rows_than_promised_are_refused_before_anything_is_written():
    class Hoarder(FullHistory):
        """Promises six frames and keeps all."""

        name = ""

        def capacity(self, shape):
            return 6 * PER_FRAME

    driven = Driven(shape_of(3), Hoarder())
    driven.chunk(3), driven.chunk(3)
    with pytest.raises(PlanError, match="free"):
        driven.announce(3)
    driven.history.abandon(2)
    driven.check_rows()


def test_a_chunk_is_not_committed_before_its_rows_are_written():
    driven = Driven(shape_of(3), FullHistory())
    block = driven.announce(3)
    driven.forward(block, write=False)
    with pytest.raises(RuntimeError, match="before its K/V were written"):
        driven.history.commit(block)


def test_full_history_grows_and_keeps_every_row():
    driven = Driven(shape_of(2), FullHistory())
    for _ in range(14):
        driven.chunk(2)
    driven.check_rows()
    assert int(driven.history.stores["cond"].used.sum()) == 28 * PER_FRAME
    assert driven.history.table().complete


def test_a_scratch_view_is_one_layer_for_all_streams_and_an_alias_view_is_none():
    sizes = {}
    for residency in ("resident", "scratch", "alias"):
        driven = Driven(shape_of(3), SlidingWindow(9, sink=3), residency=residency)
        sizes[residency] = driven.history.memory()
    rows = 9 * PER_FRAME * HEADS * DIM * 4 * 2
    assert [sizes[r]["view"] for r in sizes] == [rows * LAYERS * 2, rows, 0]
    assert len({sizes[r]["store"] for r in sizes}) == 1


def test_an_unknown_residency_is_refused_in_one_line():
    with pytest.raises(LongtakeError, match="resident, scratch, alias"):
        Driven(shape_of(3), SlidingWindow(9), residency="disk")

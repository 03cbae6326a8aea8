"""KV policies on a real history: what they show, where, and what they hold; and policies by name."""

import json
import math
from dataclasses import dataclass, field, fields
from textwrap import dedent

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longtake import FullHistory, KVPolicy, LongtakeError, SlidingWindow
from longtake.history import History
from longtake.plan import Block, BlockTable, Choose, Drop, Entry, Form, HistoryShape, Plan, Signals, as_tensor
from longtake.policies import available, build, describe, parse
from longtake.rope import RotaryTable

from .reference.window import window

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
RADIANS = 1e-2  # per frame: the keys of a take tell their position
SLOW = RotaryTable((0,), (RADIANS,), "half", axes=1)


@dataclass
class Seen:
    """One chunk of a take: what it saw. A past token is (frame, token of the frame, position); a text's frame is −1."""

    past: list[tuple[int, int, float]]
    live: list[float]  # positions of its own tokens
    covers: bool
    held: list[tuple[int, int, list[int]]]  # (block, frame, owned tokens) of the table, after the plan
    rows: int  # of the store, in use

    @property
    def frames(self) -> list[int]:
        return sorted({frame for frame, _, _ in self.past if frame >= 0})


@dataclass
class Take:
    """Chunks of `spans` frames under a policy, on a history whose values say which token they are."""

    policy: KVPolicy
    spans: list[int]
    per_frame: int = 2
    text: int = 0
    image: bool = False  # the first chunk is a given image, never to be evicted
    chunks: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        anchors = self.text + self.image * self.per_frame
        self.shape = HistoryShape(1, 1, 2, 4, self.per_frame, max(self.spans), anchor_tokens=anchors)
        capacity, visible = self.policy.capacity(self.shape), self.policy.visible(self.shape)
        self.history = History(self.shape, SLOW, capacity=capacity, visible=visible)
        if self.text:
            base = torch.zeros(self.text, 1)
            self._chunk(self.history.admit(0, 0, (base, base), role="anchor"), -1, self.text)
        frame = 0
        for span in self.spans:
            base = torch.arange(frame, frame + span).repeat_interleave(self.per_frame)[:, None].double()
            role = "anchor" if self.image and not frame else "live"
            block = self.history.admit(frame, span, (base, torch.ones_like(base)), role=role, grid=(1, self.per_frame))
            self.chunks.append(self._chunk(block, frame, span * self.per_frame))
            frame += span

    def _chunk(self, block: int, frame: int, tokens: int) -> Seen:
        table = self.history.table()
        covers, plan = self.policy.covers(table), self.policy.plan(table, self.history.signals())
        self.history.apply(plan)
        held = [(b.id, b.frame, as_tensor(b.forms["full"].owned).tolist()) for b in self.history.table().blocks]
        (view,) = self.history.layers("cond", block, write=True)
        number = torch.arange(tokens)
        name = torch.stack((number // self.per_frame + frame, number % self.per_frame), -1)
        v = (name if frame >= 0 else torch.stack((number * 0 - 1, number), -1)).float().view(1, tokens, 1, 2)
        k = torch.tensor([1.0, 0.0]).expand(1, tokens, 1, 2)
        view.attend(k, k, v)
        position = torch.atan2(view.k[0, :, 0, 1], view.k[0, :, 0, 0]) / RADIANS
        rows = [(int(f), int(t), round(float(p), 3)) for (f, t), p in zip(view.v[0, :, 0], position, strict=True)]
        self.history.commit(block)
        past, live = rows[: len(rows) - tokens], [p for _, _, p in rows[len(rows) - tokens :]]
        return Seen(past, live, covers, held, int(self.history.stores["cond"].used.sum()))


@st.composite
def takes(draw) -> list[int]:
    """Spans of the chunks of a take: perhaps a first image, equal chunks, perhaps a shorter last one."""
    chunk = draw(st.integers(1, 4))
    spans = [1] * draw(st.integers(0, 1)) + [chunk] * draw(st.integers(1, 8))
    return spans + draw(st.lists(st.integers(1, chunk), max_size=1))


def windows(spans: list[int], frames: int, sink: int, positions: str) -> SlidingWindow:
    policy = SlidingWindow(frames, sink, positions)
    assume(frames >= sink + max(spans))
    return policy


# --- sliding window ---------------------------------------------------------------------------------------------------


@PROPERTY
@given(takes(), st.integers(1, 14), st.integers(0, 4), st.integers(1, 3), st.integers(0, 3))
def test_a_window_shows_the_frames_a_list_would_keep(spans, frames, sink, per_frame, text):
    take = Take(windows(spans, frames, sink, "absolute"), spans, per_frame, text)
    for chunk, kept in zip(take.chunks, window(spans, frames, sink), strict=True):
        tokens = [(-1, t, 0.0) for t in range(text)] + [(f, t, float(f)) for f in kept for t in range(per_frame)]
        assert chunk.past == tokens  # every token once, in time order, where it was written


@PROPERTY
@given(takes(), st.integers(1, 14), st.integers(0, 4), st.integers(0, 3))
def test_slots_pack_the_kept_frames_right_before_the_chunk_in_flight(spans, frames, sink, text):
    take = Take(windows(spans, frames, sink, "slots"), spans, 2, text)
    now = 0
    for chunk, kept, span in zip(take.chunks, window(spans, frames, sink), spans, strict=True):
        packed = [(f, t, float(now - len(kept) + i)) for i, f in enumerate(kept) for t in range(2)]
        assert chunk.past == [(-1, t, 0.0) for t in range(text)] + packed
        assert chunk.live == [float(now + i) for i in range(span) for _ in range(2)]
        now += span


@PROPERTY
@given(takes(), st.integers(1, 14), st.integers(0, 4), st.sampled_from(["absolute", "slots"]), st.integers(0, 3))
def test_what_was_dropped_never_reappears_and_anchors_and_sink_never_go(spans, frames, sink, positions, text):
    take = Take(windows(spans, frames, sink, positions), spans, 2, text)
    before: set[int] = set()
    for i, chunk in enumerate(take.chunks):
        now = sum(spans[:i])
        new = set(range(now - spans[i - 1], now)) if i else set()
        assert set(chunk.frames) <= before | new
        assert set(range(min(sink, now))) <= set(chunk.frames)
        assert [t for f, t, _ in chunk.past if f < 0] == list(range(text))
        before = set(chunk.frames)


@PROPERTY
@given(takes(), st.integers(1, 14), st.integers(0, 4), st.sampled_from(["absolute", "slots"]), st.integers(0, 3))
def test_a_window_never_holds_or_shows_more_than_its_capacity(spans, frames, sink, positions, text):
    take = Take(windows(spans, frames, sink, positions), spans, 2, text)
    limit = take.policy.capacity(take.shape) + text
    for chunk, span in zip(take.chunks, spans, strict=True):
        assert chunk.rows <= limit
        assert len(chunk.past) + 2 * span <= take.policy.visible(take.shape) + text
        assert chunk.rows == sum(len(tokens) for *_, tokens in chunk.held) + 2 * span
    assert take.history.stores["cond"].size == limit  # allocated once
    if sum(spans) >= frames and spans[-1] == max(spans):
        assert chunk.rows == limit  # and used to the last row


@PROPERTY
@given(takes(), st.integers(1, 14), st.integers(0, 4), st.sampled_from(["absolute", "slots"]), st.integers(0, 3))
def test_a_window_covers_exactly_while_nothing_is_lost(spans, frames, sink, positions, text):
    take = Take(windows(spans, frames, sink, positions), spans, 2, text)
    for i, chunk in enumerate(take.chunks):
        assert chunk.covers == (chunk.frames == list(range(sum(spans[:i]))))


@PROPERTY
@given(takes(), st.integers(1, 14), st.integers(0, 4), st.integers(0, 3))
def test_owned_tokens_of_a_block_only_become_fewer(spans, frames, sink, text):
    take = Take(windows(spans, frames, sink, "absolute"), spans, 2, text)
    owned: dict[int, set[int]] = {}
    for chunk in take.chunks:
        for block, _, tokens in chunk.held:
            assert tokens and set(tokens) <= owned.get(block, set(tokens))
        owned = {block: set(tokens) for block, _, tokens in chunk.held}


@pytest.mark.parametrize("positions", ["absolute", "slots"])
def test_an_image_marked_as_an_anchor_is_never_evicted_even_without_a_sink(positions):
    take = Take(SlidingWindow(6, 0, positions), [1, 3, 3, 3, 3], image=True)
    assert all(0 in chunk.frames for chunk in take.chunks[1:])


def test_a_window_as_long_as_the_take_shows_what_full_history_shows():
    spans = [1, 3, 3, 3, 2]
    full = Take(FullHistory(), spans, text=3)
    for positions in ("absolute", "slots"):
        take = Take(SlidingWindow(sum(spans), 2, positions), spans, text=3)
        assert [c.past for c in take.chunks] == [c.past for c in full.chunks]


def test_the_same_table_gives_the_same_plan():
    take = Take(SlidingWindow(6, 1, "slots"), [3, 3, 3])
    take.history.admit(9, 3, (torch.zeros(6, 1), torch.zeros(6, 1)))
    table = take.history.table()
    plans = [take.policy.plan(table, take.history.signals()) for _ in range(2)]
    said = [
        [(e.block, e.shift, as_tensor(e.tokens).tolist()) for e in p.entries]
        + [(d.block, None if d.tokens is None else as_tensor(d.tokens).tolist()) for d in p.drops]
        for p in plans
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("options", [{"frames": 0}, {"frames": -3}, {"sink": -1}])
def test_a_window_without_frames_is_refused(options):
    with pytest.raises(LongtakeError, match="frames ≥ 1 and sink ≥ 0"):
        SlidingWindow(**options)


def test_unknown_positions_are_refused_with_the_known_ones():
    with pytest.raises(LongtakeError, match="positions 'relative': use 'absolute' or 'slots'"):
        SlidingWindow(positions="relative")


@pytest.mark.parametrize(("frames", "sink", "fits"), [(6, 3, True), (5, 3, False), (3, 0, True), (2, 0, False)])
def test_a_window_must_have_room_for_the_sink_and_a_chunk(frames, sink, fits):
    shape = HistoryShape(1, 1, 2, 4, tokens_per_frame=2, chunk_frames=3)
    if fits:
        SlidingWindow(frames, sink).check(shape)
    else:
        with pytest.raises(LongtakeError, match=f"use frames={sink + 3} or more"):
            SlidingWindow(frames, sink).check(shape)


shapes = st.builds(
    HistoryShape, layers=st.integers(1, 40), kv_heads=st.integers(1, 12), head_dim=st.sampled_from([12, 64, 128]),
    itemsize=st.sampled_from([2, 4]), tokens_per_frame=st.integers(1, 1560), chunk_frames=st.integers(1, 6),
    batch=st.integers(1, 3), streams=st.integers(1, 2),
)  # fmt: skip


@PROPERTY
@given(shapes, st.floats(0, 40), st.integers(0, 9), st.sampled_from(["absolute", "slots"]))
def test_a_fitted_window_is_the_longest_within_the_bytes_and_works(shape, frames, sink, positions):
    budget = int(frames * shape.frame_bytes)
    policy = SlidingWindow(21, sink, positions)
    if budget < shape.chunk_frames * shape.frame_bytes:
        with pytest.raises(LongtakeError, match=f"at least the {shape.live_frames} in flight, "):
            policy.fit(budget, shape)
        return
    fitted = policy.fit(budget, shape)
    used = fitted.capacity(shape) * shape.token_bytes
    assert used <= budget < used + shape.frame_bytes
    assert fitted.sink <= sink and fitted.positions == positions
    fitted.check(shape)


# --- full history -----------------------------------------------------------------------------------------------------


@PROPERTY
@given(takes(), st.integers(1, 3), st.integers(0, 3))
def test_full_history_shows_everything_where_it_was_written_and_always_covers(spans, per_frame, text):
    take = Take(FullHistory(), spans, per_frame, text)
    for i, chunk in enumerate(take.chunks):
        past = [(f, t, float(f)) for f in range(sum(spans[:i])) for t in range(per_frame)]
        assert chunk.past == [(-1, t, 0.0) for t in range(text)] + past
        assert chunk.covers


def test_full_history_cannot_be_fitted_to_bytes():
    with pytest.raises(LongtakeError, match="full cannot be fitted"):
        FullHistory().fit(10**9, HistoryShape(1, 1, 2, 4, 2, 3))


# --- what it takes to cover -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Says(KVPolicy):
    """A policy that always gives the same answer."""

    answer: Plan

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        return self.answer

    def capacity(self, shape: HistoryShape) -> None:
        return None


def two_blocks(frames_seen: int = 6) -> BlockTable:
    forms = [{"full": Form(6)}, {"full": Form(6), "compressed": Form(2)}]
    blocks = tuple(Block(i, "committed", 3 * i, 3, form) for i, form in enumerate(forms))
    return BlockTable(blocks, (Block(2, "live", frames_seen, 3, {"full": Form(6)}),), frames_seen)


EVERYTHING = (Entry(0), Entry(1))


PLANS = {
    "everything": (Plan(EVERYTHING), True),
    "everything, token by token": (Plan((Entry(0, tokens=range(6)), Entry(1))), True),
    "a block missing": (Plan((Entry(0),)), False),
    "another order": (Plan((Entry(1), Entry(0))), False),
    "a block twice": (Plan((Entry(0), Entry(0))), False),
    "tokens missing": (Plan((Entry(0, tokens=range(5)), Entry(1))), False),
    "a block moved": (Plan((Entry(0, shift=1), Entry(1))), False),
    "a block weighted": (Plan((Entry(0), Entry(1, log_weight=0.1))), False),
    "a smaller form": (Plan((Entry(0), Entry(1, "compressed"))), False),
    "an open choice": (Plan((Entry(0), Choose((1,), 1))), False),
    "a drop": (Plan(EVERYTHING, (Drop(1, "compressed"),)), False),
    "the chunk in flight moved": (Plan(EVERYTHING, live_shift=-1), False),
}


@pytest.mark.parametrize(("plan", "covers"), PLANS.values(), ids=PLANS)
def test_covering_is_everything_whole_and_in_place(plan, covers):
    assert Says(plan).covers(two_blocks()) is covers


def test_nothing_covers_once_something_is_lost():
    assert not Says(Plan(EVERYTHING)).covers(two_blocks(frames_seen=9))


# --- by name ----------------------------------------------------------------------------------------------------------


def test_a_specification_names_a_policy_and_its_options():
    assert parse("window:frames=9,sink=1,positions=slots") == SlidingWindow(9, 1, "slots")
    assert parse("window: frames = 9 ,, sink=1") == SlidingWindow(9, 1)
    assert parse("window") == parse("window:") == SlidingWindow()
    assert parse("full") == FullHistory()


@pytest.mark.parametrize("policy", [SlidingWindow(9, 1, "slots"), FullHistory()])
def test_a_described_policy_can_be_built_again_from_json(policy):
    name, options = json.loads(json.dumps(describe(policy)))
    assert available()[name] is type(policy)
    assert build(name, options) == policy


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("windw:frames=9", r"no policy 'windw'; known: .*full.*window"),
        ("", "no policy ''; known: "),
        ("window:frmes=9", r"window has no option 'frmes'; it takes: frames \(int\), sink \(int\), positions \(str\)"),
        ("full:frames=9", "full has no option 'frames'; it takes: none"),
        ("window:frames=many", "window: frames='many' is not int: give a whole number"),
        ("window:sink=2,sink=3", "option 'sink' is given twice"),
        ("window:frames=9.5", "window: frames='9.5' is not int"),
        ("window:frames", "policy option 'frames': write key=value"),
        ("window:frames=0", "frames ≥ 1"),
        ("nowhere.py:MyPolicy", r"no file nowhere\.py: write my_file\.py:MyPolicy"),
    ],
)
def test_a_wrong_specification_is_refused_with_what_would_do(spec, message):
    with pytest.raises(LongtakeError, match=message):
        parse(spec)


OURS = [cls for cls in available().values() if cls.__module__.startswith("longtake.")]
FIELDS = [(cls, f.name, f.type) for cls in OURS for f in fields(cls) if f.init]
STRANGE = [None, "2", 1.5, 2, True, [], (), {}, b"2", 1j, float("nan"), float("inf"), -float("inf"), object(), int]
PLAIN = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}


@pytest.mark.parametrize(("cls", "name", "of"), FIELDS, ids=lambda v: getattr(v, "__name__", v))
def test_a_value_of_a_wrong_type_is_one_line_that_names_the_field(cls, name, of):
    allowed = [PLAIN[part.strip()] for part in of.split("|")]
    for value in STRANGE:
        whole_for_a_number = type(value) is int and float in allowed
        endless = isinstance(value, float) and not math.isfinite(value)
        if (type(value) in allowed or whole_for_a_number) and not endless:
            continue  # its range is the policy's own affair
        with pytest.raises(LongtakeError, match=rf"\b{name}\b") as told:
            cls(**{name: value})
        assert "\n" not in str(told.value) and "give " in str(told.value), value


@pytest.mark.parametrize(("cls", "name", "of"), [row for row in FIELDS if "int" in row[2] and row[1] != "seed"])
def test_a_count_that_nothing_has_memory_for_is_refused(cls, name, of):
    with pytest.raises(LongtakeError, match=rf"{name}=10+: give 1\d+ at most"):
        cls(**{name: 10**18})


def test_numbers_of_numpy_become_numbers_that_a_snapshot_can_write():
    policy = SlidingWindow(np.int64(9), np.int32(1))
    assert policy == SlidingWindow(9, 1) and json.dumps(describe(policy))
    assert json.dumps(describe(parse("packcache").__class__(rho=np.float32(0.5))))
    with pytest.raises(LongtakeError, match="sink"):
        SlidingWindow(9, np.bool_(True))


def test_a_policy_of_ones_own_is_checked_by_its_annotations():
    @dataclass(frozen=True)
    class Own(FullHistory):
        frames: int = 3
        weights: tuple[float, ...] = ()

    assert Own(4, (0.5,)) and Own(4, [1])  # what is no plain type is left to the policy
    with pytest.raises(LongtakeError, match="Own: frames='3' is not int: give a whole number"):
        Own("3")


def test_a_history_the_machine_has_no_room_for_is_told_in_one_line():
    shape = HistoryShape(40, 1, 40, 128, 1560, 3)
    with pytest.raises(LongtakeError, match=r"history of .* tokens is more memory than this machine gives"):
        History(shape, SLOW, capacity=10**10)


FILE = """
    from dataclasses import dataclass
    from typing import ClassVar
    from longtake.plan import Entry, Plan
    from longtake.policies import KVPolicy

    @dataclass(frozen=True)
    class MyPolicy(KVPolicy):
        last: int = 2
        weight: float | None = 0.5
        warm: bool = False
        note: str = ""

        kind: ClassVar[int] = 3

        def plan(self, table, signals):
            return Plan(tuple(Entry(b.id) for b in table.blocks[-self.last:]))

        def capacity(self, shape):
            return None
"""


@pytest.fixture
def policy_file(tmp_path):
    def write(text: str = FILE):
        path = tmp_path / "my_file.py"
        path.write_text(dedent(text))
        return path

    return write


def test_a_policy_may_live_in_a_file_of_its_own(policy_file):
    policy = parse(f"{policy_file()}:MyPolicy:last=1,weight=none,warm=true,note=a:b")
    assert isinstance(policy, KVPolicy)
    assert (policy.last, policy.weight, policy.warm, policy.note) == (1, None, True, "a:b")
    assert parse(f"{policy_file()}:MyPolicy").last == 2
    assert parse(f"{policy_file()}:MyPolicy:weight=2").weight == 2.0


@pytest.mark.parametrize(
    ("text", "rest", "message"),
    [
        (FILE, ":Mine", r"my_file\.py has no KVPolicy 'Mine'; it has: MyPolicy"),
        (FILE, "", r"has no KVPolicy ''; it has: MyPolicy"),
        ("x = 1", ":MyPolicy", "has no KVPolicy 'MyPolicy'; it has: none"),
        ("import nothing_of_that_name", ":MyPolicy", "cannot be imported: ModuleNotFoundError: .*nothing_of_that_name"),
        ("def broken(:", ":MyPolicy", "cannot be imported: SyntaxError"),
        (FILE, ":MyPolicy:last=x", "MyPolicy: last='x' is not int"),
        (FILE, ":MyPolicy:warm=yes", "MyPolicy: warm='yes' is not bool: give true or false"),
        (FILE, ":MyPolicy:weight=x", r"MyPolicy: weight='x' is not float \| None: give a number or none"),
        (FILE, ":MyPolicy:kind=1", r"has no option 'kind'; it takes: last \(int\)"),
    ],
)
def test_a_wrong_policy_file_is_refused_with_what_is_in_it(policy_file, text, rest, message):
    with pytest.raises(LongtakeError, match=message):
        parse(f"{policy_file(text)}{rest}")


def test_a_policy_file_may_postpone_its_annotations(policy_file):
    path = policy_file("from __future__ import annotations\n" + dedent(FILE))
    assert parse(f"{path}:MyPolicy:last=1").last == 1

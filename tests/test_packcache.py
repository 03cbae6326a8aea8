"""PackCache and its equal-budget baselines: the split of the budget, nesting, slots, and the published bookkeeping."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtake import FullHistory, LastFrames, LongtakeError, PackCache, Session, SinkWindow, SlidingWindow, Uniform
from longtake.history import History
from longtake.hosts.lumos import LumosGeometry
from longtake.hosts.lumos.sequence import frame_positions
from longtake.plan import (
    FULL,
    Block,
    BlockTable,
    Form,
    HistoryShape,
    Plan,
    Signals,
    as_tensor,
    difference,
)
from longtake.policies import available, build, describe, parse
from longtake.policies.allocation import allocate, decay_weights
from longtake.policies.selection import ORDERS, bayer, ranks
from longtake.policies.slots import SlotPolicy
from longtake.rope import RotaryTable, mm_rope_table

from .tiny import text, tiny_wan

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
HALF = 0.5


# --- a take of metadata alone -----------------------------------------------------------------------------------------


class Frames:
    """Blocks under a policy, without any K/V: what the history does to its table, in ten lines."""

    def __init__(self, rows: int = 4, columns: int = 6, text: int = 3, structural: bool = True) -> None:
        self.grid, self.text, self.framed = (rows, columns), text, structural
        self.content = rows * columns
        self.per_frame = self.content + 4 * structural
        self.blocks: list[Block] = [Block(0, "anchor", 0, 0, {FULL: Form(text)})] if text else []
        self.frame, self.next = 0, 1

    def block(self, span: int, role: str) -> Block:
        tokens = torch.arange(span * self.per_frame)
        inside = tokens % self.per_frame
        content = tokens[(inside >= 3) & (inside < self.per_frame - 1)] if self.framed else None
        structural = difference(tokens, content) if content is not None else range(0)
        return Block(
            self.next, role, self.frame, span, {FULL: Form(len(tokens))}, self.grid, packable=content,
            structural=structural,
        )  # fmt: skip

    def table(self, span: int = 1) -> BlockTable:
        return BlockTable(tuple(self.blocks), (self.block(span, "live"),), self.frame)

    def plan(self, policy: SlotPolicy, span: int = 1, signals: Signals | None = None) -> Plan:
        """What the policy says of the chunk about to be made, its drops carried out."""
        plan = policy.plan(self.table(span), signals or Signals())
        for drop in plan.drops:
            at = next(i for i, b in enumerate(self.blocks) if b.id == drop.block)
            old = self.blocks[at]
            kept = difference(old.forms[FULL].owned, old.forms[FULL].owned if drop.tokens is None else drop.tokens)
            if len(kept):
                self.blocks[at] = replace(old, forms={FULL: replace(old.forms[FULL], kept=kept)})
            else:
                del self.blocks[at]
        return plan

    def commit(self, span: int = 1, role: str = "committed") -> None:
        self.blocks.append(self.block(span, role))
        self.frame += span
        self.next += 1

    def owned(self) -> dict[int, list[int]]:
        """Latent frame → numbers, within the frame, of the tokens still owned; frames without any are left out."""
        found = {}
        for block in self.blocks:
            for number in range(block.frame, block.end):
                tokens = as_tensor(block.of_frames(number, number + 1)) - self.per_frame * (number - block.frame)
                if len(tokens):
                    found[number] = tokens.tolist()
        return found

    def counts(self) -> list[int]:
        """Content tokens of the frames held, newest first."""
        inside = range(3, self.per_frame - 1) if self.framed else range(self.per_frame)
        return [len([t for t in tokens if t in inside]) for _, tokens in sorted(self.owned().items(), reverse=True)]


# --- shares and their split into whole tokens -------------------------------------------------------------------------


def test_shares_halve_with_age_and_the_oldest_takes_the_tail():
    shares = {n: [float(b) for b in decay_weights(n, HALF)] for n in range(1, 6)}
    assert shares == {
        1: [1], 2: [0.5, 0.5], 3: [0.5, 0.25, 0.25], 4: [0.5, 0.25, 0.125, 0.125],
        5: [0.5, 0.25, 0.125, 0.0625, 0.0625],
    }  # fmt: skip


@PROPERTY
@given(st.integers(1, 30), st.floats(0.01, 0.99))
def test_shares_sum_to_one_and_never_rise_with_age(frames, rho):
    shares = decay_weights(frames, rho)
    assert sum(shares) == 1 and all(a >= b > 0 for a, b in pairwise(shares))


@pytest.mark.parametrize(
    ("content", "split"),
    [(4080, [2040, 1020, 510, 510]), (1824, [912, 456, 228, 228]), (5820, [2910, 1455, 728, 727]),
     (104, [52, 26, 13, 13])],
)  # fmt: skip
def test_one_frame_over_four_is_split_as_published_sizes_say(content, split):
    assert allocate(content, [content] * 4, decay_weights(4, HALF)) == split


def test_what_a_full_frame_cannot_take_goes_to_the_older_ones():
    assert allocate(300, [100] * 6, decay_weights(6, HALF)) == [100, 100, 50, 25, 13, 12]


@PROPERTY
@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 300), st.floats(0.05, 0.95), st.booleans())
def test_a_split_spends_everything_within_what_is_owned(owned, budget, rho, uniform):
    weights = [Fraction(1, len(owned))] * len(owned) if uniform else decay_weights(len(owned), rho)
    given_ = allocate(budget, owned, weights)
    assert sum(given_) == min(budget, sum(owned))
    assert all(0 <= n <= cap for n, cap in zip(given_, owned, strict=True))


# --- orders -----------------------------------------------------------------------------------------------------------


def test_half_of_a_bayer_order_is_a_checkerboard_and_a_quarter_every_other_row_and_column():
    rank = ranks("bayer", 64, (8, 8)).view(8, 8)
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    assert torch.equal(rank < 32, (rows + columns) % 2 == 0)
    assert torch.equal(rank < 16, (rows % 2 == 0) & (columns % 2 == 0))
    assert sorted(bayer(8, 8).tolist()) == list(range(64))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [(1, 1), (8, 13), (5, 7), (48, 85)])
def test_every_order_names_every_token_once(order, grid):
    n = grid[0] * grid[1]
    assert torch.equal(ranks(order, n, grid).sort().values, torch.arange(n))


def test_ardf_keeps_what_the_write_pass_left_visible_first():
    n, masked = 4080, {round(j * 4080 / 2856) for j in range(2856)}
    rank = ranks("ardf", n, (48, 85))
    assert {int(i) for i in rank.argsort()[:1224]}.isdisjoint(masked)


@pytest.mark.parametrize("n", [5820, 4080, 97])
def test_a_stride_order_is_spread_evenly_at_any_count(n):
    order = ranks("stride", n, (1, n)).argsort()
    for kept in (n // 2, n // 4, n // 8):
        gaps = order[:kept].sort().values.diff()
        assert int(gaps.max()) <= 2 * -(-n // kept)


def test_a_random_order_depends_on_its_seed_alone():
    assert torch.equal(ranks("random", 50, (5, 10), seed=3), ranks("random", 50, (5, 10), seed=3))
    assert not torch.equal(ranks("random", 50, (5, 10), seed=3), ranks("random", 50, (5, 10), seed=4))


# --- fill, pack, slide ------------------------------------------------------------------------------------------------


def test_fill_pack_and_slide_follow_from_one_formula():
    take, policy, seen = Frames(48, 85, text=278), PackCache(), []
    take.commit(role="anchor")  # the given image
    for _ in range(7):
        plan = take.plan(policy)
        prefix = sum(b.forms[FULL].count for b in take.blocks)
        seen.append((take.counts()[:-1], prefix, {e.shift for e in plan.entries}, plan.live_shift))
        take.commit()
    steady = [2040, 1020, 510, 510]
    assert seen == [
        ([], 4362, {0}, 0), ([4080], 8446, {0}, 0), ([2040, 2040], 8450, {0}, 0), ([2040, 1020, 1020], 8454, {0}, 0),
        (steady, 8458, {0}, 0), (steady, 8458, {0, -1}, -1), (steady, 8458, {0, -2}, -2),
    ]  # fmt: skip


policies = st.one_of(
    st.builds(
        PackCache, history_frames=st.sampled_from([0.3, 1.0, 1.7, 3.0]), max_frames=st.integers(1, 6),
        rho=st.sampled_from([0.3, 0.5, 0.62, 0.9]), selection=st.sampled_from(ORDERS),
        min_keep_newest=st.sampled_from([0.0, 0.4, 1.0]), anchor_first_generated=st.booleans(),
    ),
    st.builds(Uniform, history_frames=st.sampled_from([0.5, 1.0, 2.0]), max_frames=st.integers(1, 5)),
    st.builds(LastFrames, frames=st.integers(1, 4)),
    st.builds(SinkWindow, frames=st.integers(1, 3), sink=st.integers(0, 3)),
)  # fmt: skip
spans_of_takes = st.tuples(st.booleans(), st.lists(st.integers(1, 3), min_size=1, max_size=9))


@PROPERTY
@given(policies, spans_of_takes, st.booleans(), st.tuples(st.integers(1, 6), st.integers(1, 9)))
def test_the_invariants_of_a_packed_history(policy, take_of, framed, grid):
    """The budget is spent to the last token and never exceeded, sets are nested, frames consecutive, slots gapless."""
    image, spans = take_of
    take = Frames(*grid, structural=framed)
    budget = min(policy.budget(take.content), policy.window * take.content)
    before: dict[int, set[int]] = {}
    if image:
        take.plan(policy)
        take.commit(role="anchor")
    for span in spans:
        plan = take.plan(policy, span)
        owned = {frame: set(tokens) for frame, tokens in take.owned().items()}
        fixed = [f for f in range(take.frame) if f < policy.leading or (image and f == 0)]
        history = [f for f in sorted(owned) if f not in fixed]
        counts = take.counts()[: len(history)]

        assert all(len(owned[f]) == take.per_frame for f in fixed)  # anchors are whole, for ever
        generated = take.frame - len(fixed)
        assert sum(counts) == min(budget, min(generated, policy.window) * take.content)
        assert len(history) <= policy.window
        assert history == list(range(take.frame - len(history), take.frame))  # first in, first out
        if not isinstance(policy, PackCache) or policy.min_keep_newest == 0:
            assert counts == sorted(counts, reverse=True)
        for frame, tokens in owned.items():
            assert tokens <= before.get(frame, tokens)  # nested
            inside = {0, 1, 2, take.per_frame - 1} if framed else set()
            assert inside <= tokens  # structural ids stay with their frame
        before = owned

        at: dict[int, float] = {}  # every retained frame's slot
        for entry in plan.entries:
            block = next(b for b in take.blocks if b.id == entry.block)
            assert block.span or entry.shift == 0  # a text does not move
            shown = as_tensor(block.forms[FULL].owned if entry.tokens is None else entry.tokens)
            for token in shown.tolist() if block.span else ():
                at[block.frame + token // take.per_frame] = block.frame + token // take.per_frame + entry.shift
        assert [at[f] for f in sorted(at)] == list(range(len(fixed) + len(history)))
        assert take.frame + plan.live_shift == len(fixed) + len(history)

        again = policy.plan(take.table(span), Signals())  # packing what is packed changes nothing
        assert not again.drops and again.live_shift == plan.live_shift
        assert [e.shift for e in again.entries] == [e.shift for e in plan.entries]
        take.commit(span)


@PROPERTY
@given(policies, spans_of_takes)
def test_the_capacity_is_what_the_history_holds_when_it_is_full(policy, take_of):
    _, spans = take_of
    take, chunk = Frames(), max(take_of[1])
    shape = HistoryShape(1, 1, 2, 4, take.per_frame, chunk, structural_tokens=4)
    most = 0
    for span in spans + [chunk] * (policy.window + policy.leading):
        take.plan(policy, span)
        most = max(most, sum(b.forms[FULL].count for b in take.blocks) - take.text + span * take.per_frame)
        take.commit(span)
        held = sum(b.forms[FULL].count for b in take.blocks) - take.text
        assert held <= policy.capacity(shape)
    assert most == policy.capacity(shape)  # the promise is kept, and not a token too large


def test_a_cond_keep_below_one_thins_the_conditioning_frame_once_and_for_ever():
    take = Frames()
    take.commit(role="anchor")
    held = []
    for _ in range(4):
        take.plan(PackCache(cond_keep=0.5))
        held.append(take.owned()[0])
        take.commit()
    assert len(held[0]) == 12 + 4 and all(tokens == held[0] for tokens in held)


def test_dropping_structural_tokens_leaves_those_of_anchors():
    take = Frames()
    take.commit(role="anchor")
    for _ in range(3):
        take.plan(PackCache(drop_structural=True))
        take.commit()
    take.plan(PackCache(drop_structural=True))
    sizes = {f: len(tokens) for f, tokens in take.owned().items()}
    assert sizes == {0: 28, 1: 6, 2: 6, 3: 12}


def test_without_rebasing_everything_stays_where_it_was_written():
    take = Frames()
    for _ in range(8):
        plan = take.plan(PackCache(rebase="none"))
        assert plan.live_shift == 0 and all(e.shift == 0 for e in plan.entries)
        take.commit()


def test_a_window_of_one_frame_and_a_budget_of_one_frame_is_the_sliding_window_baseline():
    takes = Frames(), Frames()
    for _ in range(5):
        plans = [
            take.plan(policy) for take, policy in zip(takes, (PackCache(max_frames=1), LastFrames(1)), strict=True)
        ]
        assert takes[0].owned() == takes[1].owned() and plans[0].live_shift == plans[1].live_shift
        for take in takes:
            take.commit()


# --- attention as the order -------------------------------------------------------------------------------------------


def measured(take: Frames, masses: dict[int, list[float]]) -> Signals:
    """Scores of two layers of the tokens held, block by block."""
    held = torch.cat([torch.tensor(masses[b.id])[as_tensor(b.forms[FULL].owned)] for b in take.blocks])
    return Signals(scores={"cond": {0: held[None], 1: 3 * held[None]}, "uncond": {0: -held[None], 1: -held[None]}})


def test_attention_keeps_the_tokens_that_were_looked_at_and_ranks_anew_among_those_left():
    take, policy = Frames(2, 4, text=0, structural=False), PackCache(selection="attention", history_frames=0.5)
    take.commit()
    first = [0.0, 5, 1, 4, 2, 3, 0, 0]
    take.plan(policy, signals=measured(take, {1: first}))
    assert take.owned() == {0: [1, 3, 4, 5]}
    take.commit()
    second = {1: [9.0, 0, 9, 1, 2, 0, 9, 9], 2: [0.0, 0, 0, 0, 0, 0, 3, 4]}
    take.plan(policy, signals=measured(take, second))
    assert take.owned() == {0: [3, 4], 1: [6, 7]}  # what is gone stays gone, however large its number now


def test_attention_thins_like_bayer_until_something_was_measured():
    takes = Frames(), Frames()
    for policy, take in zip((PackCache(selection="attention"), PackCache()), takes, strict=True):
        for _ in range(3):
            take.plan(policy)
            take.commit()
    assert takes[0].owned() == takes[1].owned()


def test_a_score_is_the_attention_mass_of_each_key():
    q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 9, 2, 8)
    dense = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)).div(8**0.5).softmax(-1).sum((1, 2))
    torch.testing.assert_close(PackCache(selection="attention").score(q, k), dense)


def test_nothing_is_collected_unless_attention_chooses():
    assert PackCache().moment is None and PackCache(selection="attention").moment == "last_forward"


# --- on a causal Wan --------------------------------------------------------------------------------------------------


def latents(policy, chunks: int = 5, **options: object) -> Tensor:
    host = tiny_wan()
    take = Session(host, policy, prompt_embeds=text(), decode=False, seed=3, **options)
    return torch.stack([next(take).latents for _ in range(chunks)])


@pytest.mark.parametrize(
    "policy",
    [PackCache(history_frames=20, max_frames=20), PackCache(history_frames=20, max_frames=20, selection="attention"),
     Uniform(history_frames=20, max_frames=20), LastFrames(20), SinkWindow(20, 1)],
    ids=lambda p: p.name,
)  # fmt: skip
def test_a_budget_larger_than_the_take_changes_nothing_bitwise(policy):
    assert torch.equal(latents(policy), latents(FullHistory()))


def test_whole_frames_at_slots_are_the_relative_window():
    """Wan has no tokens that stand still, so left-packed slots and right-packed ones differ by a constant."""
    torch.testing.assert_close(latents(LastFrames(6)), latents(SlidingWindow(9, 0, "slots")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selection", ["bayer", "ardf", "stride", "random", "attention"])
def test_history_bytes_are_constant_once_the_window_is_full_and_equal_the_formula(selection):
    policy = PackCache(history_frames=1.5, max_frames=5, selection=selection)
    host = tiny_wan(guidance=2.0)
    take = Session(host, policy, prompt_embeds=text(), negative_prompt_embeds=text(seed=2), decode=False)
    row = 2 * 3 * 2 * 12 * 4 * 2  # K and V, layers, heads, head_dim, bytes, streams
    rows = lambda: sum(store.nbytes for store in take.history.stores.values())
    allocated, held = rows(), []
    for _ in range(7):
        next(take)
        held.append(take.stats.last.history_bytes)
    assert held[2:] == [row * (9 + 3 * 6)] * 5  # 1.5 frames of history and the chunk that was just committed
    assert rows() == allocated


def test_streams_share_the_kept_sets():
    host = tiny_wan(guidance=2.0)
    policy = PackCache(max_frames=4, selection="attention")
    take = Session(host, policy, prompt_embeds=text(), negative_prompt_embeds=text(seed=2), decode=False)
    for _ in range(4):
        next(take)
    cond, uncond = take.history.stores["cond"], take.history.stores["uncond"]
    assert cond.held.keys() == uncond.held.keys()
    for key in cond.held:
        assert torch.equal(cond.held[key].tokens, uncond.held[key].tokens)


def test_a_restored_snapshot_goes_on_bit_for_bit(tmp_path):
    host = tiny_wan()
    take = Session(host, PackCache(selection="attention"), prompt_embeds=text(), decode=False, seed=5)
    for _ in range(4):
        next(take)
    take.snapshot(tmp_path / "take.safetensors")
    after = [next(take).latents for _ in range(3)]
    again = Session.restore(tmp_path / "take.safetensors", host)
    assert again.policy == take.policy
    assert all(torch.equal(a, next(again).latents) for a in after)


def test_a_session_settles_rho_by_what_was_measured_on_the_model():
    host = tiny_wan(decay=0.37)
    assert Session(host, PackCache(rho="auto"), prompt_embeds=text(), decode=False).policy == PackCache(rho=0.37)
    with pytest.raises(LongtakeError, match="analyze decay"):
        Session(tiny_wan(), PackCache(rho="auto"), prompt_embeds=text(), decode=False)


# --- keys -------------------------------------------------------------------------------------------------------------

TURN = RotaryTable((0, 0), (1e-2, 1.0), "half", axes=1)


def moved_key_error(policy) -> float:
    """Largest difference between a key in view and one rotated at the virtual position, over eight frames."""
    shape = HistoryShape(1, 1, 4, 4, 6, 1)
    history = History(shape, TURN, capacity=policy.capacity(shape))
    written: dict[int, Tensor] = {}
    error = 0.0
    for frame in range(8):
        base = torch.full((6, 1), float(frame)).double()
        block = history.admit(frame, 1, (base, torch.ones_like(base)), grid=(2, 3))
        plan = policy.plan(history.table(), history.signals())
        history.apply(plan)
        (view,) = history.layers("cond", block, write=True)
        k = written[frame] = torch.randn(1, 6, 1, 4, generator=torch.Generator().manual_seed(frame))
        view.attend(k, k, k)
        held = [b for b in history.table().blocks if b.id != block]
        keys = [written[b.frame][:, as_tensor(b.forms[FULL].owned)] for b in held] + [k]
        slots = torch.cat([torch.full((x.shape[1], 1), float(slot)) for slot, x in enumerate(keys)])
        expected = TURN.rotate(torch.cat(keys, 1), TURN.phases(slots))
        assert torch.equal(view.v, torch.cat(keys, 1))  # gathered rows are bitwise those written
        error = max(error, float((view.k - expected).abs().max()))
        history.commit(block)
    return error


def test_moved_keys_are_those_of_the_video_made_of_the_retained_frames():
    assert moved_key_error(PackCache()) < 1e-5


def test_keys_left_unrotated_are_noticed():
    class Stale(PackCache):  # moves the chunk in flight, and leaves the keys of the past where they were
        def plan(self, table, signals):
            plan = super().plan(table, signals)
            return replace(plan, entries=tuple(replace(e, shift=0) for e in plan.entries))

    assert moved_key_error(Stale()) > 0.1


def lumos_key_errors(policy) -> tuple[float, float]:
    """The same with Lumos-1's rotation and tokens, over eight frames after a given one that is an anchor: largest
    difference of content keys and of keys of structural ids."""
    geometry, table, prefix = LumosGeometry(64, 64, 1, 1, 12, patch=(1, 1, 1)), mm_rope_table(64), 17
    n, rest = geometry.tokens_per_frame, geometry.structural
    shape = HistoryShape(1, 1, 64, 4, n, 1, structural_tokens=4, anchor_tokens=n)
    history = History(shape, table, capacity=policy.capacity(shape))
    written: dict[int, Tensor] = {}
    errors = [0.0, 0.0]
    for frame in range(9):
        block = history.admit(
            frame, 1, frame_positions(geometry, prefix, frame), role="live" if frame else "anchor", grid=geometry.grid,
            packable=geometry.packable, structural=rest,
        )  # fmt: skip
        history.apply(policy.plan(history.table(), history.signals()))
        (view,) = history.layers("cond", block, write=True)
        k = written[frame] = torch.randn(1, n, 1, 64, generator=torch.Generator().manual_seed(frame))
        view.attend(k, k, k)
        held = [(b.frame, as_tensor(b.forms[FULL].owned)) for b in history.table().blocks if b.id != block]
        held.append((frame, torch.arange(n)))
        keys = torch.cat([written[f][:, owned] for f, owned in held], 1)
        # every token where it would stand in a video of the retained frames alone, structural ids too
        at = torch.cat([frame_positions(geometry, prefix, slot)[0][owned] for slot, (_, owned) in enumerate(held)])
        off = (view.k - table.rotate(keys, table.phases(at))).abs().amax((0, 2, 3))
        structural = torch.cat([torch.isin(owned, rest) for _, owned in held])
        assert torch.equal(view.v, keys) and bool(structural.any()) and not bool(structural.all())
        errors = [max(errors[0], float(off[~structural].max())), max(errors[1], float(off[structural].max()))]
        history.commit(block)
    return errors[0], errors[1]


def test_moved_keys_of_lumos_stand_in_the_virtual_video_structural_ids_included():
    content, structural = lumos_key_errors(PackCache(max_frames=3))
    assert content < 2e-5 and structural < 2e-5


def test_keys_of_lumos_left_unrotated_are_noticed_in_content_and_in_structure():
    class Stale(PackCache):  # nothing of the past moves, the chunk in flight does
        def plan(self, table, signals):
            plan = super().plan(table, signals)
            return replace(plan, entries=tuple(replace(e, shift=0) for e in plan.entries))

    content, structural = lumos_key_errors(Stale(max_frames=3))
    assert content > 0.1 and structural > 0.1


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["packcache", "uniform", "last-frames", "sink-window"])
def test_the_method_and_its_baselines_are_known_by_name(name):
    policy = parse(name)
    assert build(*describe(policy)) == policy and available()[name] is type(policy)


def test_options_are_read_from_text():
    assert parse("packcache:history_frames=2,rho=auto,selection=attention,budget_tokens=none") == PackCache(
        2, rho="auto", selection="attention"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("packcache:selection=best", "use one of bayer, ardf, stride, random, attention"),
        ("packcache:rebase=left", "use 'slots' or 'none'"),
        ("packcache:rho=fast", "between 0 and 1, or 'auto'"),
        ("packcache:rho=1.5", "between 0 and 1, or 'auto'"),
        ("packcache:max_frames=0", "max_frames ≥ 1"),
        ("packcache:cond_keep=2", "cond_keep 2: give a part between 0 and 1"),
        ("uniform:selection=attention", "use one of bayer"),
        ("last-frames:frames=0", "keep at least 1"),
        ("sink-window:sink=-1", "give 0 or more"),
    ],
)
def test_wrong_options_say_what_would_do(spec, message):
    with pytest.raises(LongtakeError, match=message):
        parse(spec)


shapes = st.builds(
    HistoryShape, layers=st.integers(1, 40), kv_heads=st.integers(1, 12), head_dim=st.sampled_from([12, 64, 128]),
    itemsize=st.sampled_from([2, 4]), tokens_per_frame=st.integers(10, 1560), chunk_frames=st.integers(1, 6),
    batch=st.integers(1, 3), streams=st.integers(1, 2), structural_tokens=st.sampled_from([0, 4]),
    training_frames=st.none() | st.integers(1, 60),
)  # fmt: skip


@pytest.mark.parametrize("policy", [PackCache(), Uniform(), PackCache(history_frames=3, max_frames=12)])
def test_a_fitted_policy_thins_as_its_options_do_but_not_beyond_a_training_clip(policy):
    shape = HistoryShape(1, 1, 4, 4, tokens_per_frame=64, chunk_frames=3)
    frames = lambda budget, training: (
        policy.fit(budget * shape.frame_bytes, replace(shape, training_frames=training)).max_frames
    )
    assert [frames(n, None) for n in (4, 6, 9, 12)] == [policy.max_frames, 12, 24, 36], "four to a frame's worth"
    assert frames(9, 21) == 18, "three more are in flight"
    assert frames(21, 21) == 18 and frames(30, 21) == 27, "whole frames"


@PROPERTY
@given(shapes, st.floats(0, 40), st.sampled_from([PackCache(), Uniform(), LastFrames(), SinkWindow(sink=2)]))
def test_a_fitted_policy_uses_the_bytes_it_was_given_and_no_more(shape, frames, policy):
    budget = int(frames * shape.frame_bytes)
    try:
        fitted = policy.fit(budget, shape)
    except LongtakeError:
        least = policy.leading + 1 + shape.chunk_frames
        window = 1 if isinstance(policy, LastFrames) else policy.window
        assert budget < (least * shape.tokens_per_frame + window * shape.structural_tokens) * shape.token_bytes
        return
    used = fitted.capacity(shape) * shape.token_bytes
    slack = shape.frame_bytes if isinstance(policy, LastFrames) else (1 + shape.structural_tokens) * shape.token_bytes
    assert used <= budget < used + slack
    fitted.check(shape)
    assert type(fitted) is type(policy)

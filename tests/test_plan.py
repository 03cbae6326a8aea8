"""What policies see and answer: token sets, the table of blocks, packing, and bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.history.store import Store
from longtake.plan import (
    FULL,
    Block,
    BlockTable,
    Entry,
    Form,
    HistoryShape,
    TokenSet,
    as_tensor,
    difference,
    intersect,
    pack_right,
)

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)

ranges = st.builds(lambda start, n: range(start, start + n), st.integers(0, 20), st.integers(0, 20))
stepped = st.builds(
    lambda start, n, step: range(start, start + n * step, step),
    st.integers(0, 9), st.integers(0, 9), st.integers(2, 4),
)  # fmt: skip
tensors = st.sets(st.integers(0, 40)).map(lambda s: torch.tensor(sorted(s), dtype=torch.int64))
token_sets = ranges | stepped | tensors


def numbers(tokens: TokenSet) -> list[int]:
    return list(tokens) if isinstance(tokens, range) else tokens.tolist()


# --- token sets -------------------------------------------------------------------------------------------------------


@PROPERTY
@given(token_sets, token_sets)
def test_intersection_and_difference_are_those_of_sets_and_ascend(a, b):
    assert numbers(intersect(a, b)) == sorted(set(numbers(a)) & set(numbers(b)))
    assert numbers(difference(a, b)) == sorted(set(numbers(a)) - set(numbers(b)))


@PROPERTY
@given(token_sets)
def test_a_token_set_as_a_tensor_is_int64(tokens):
    tensor = as_tensor(tokens)
    assert tensor.dtype == torch.int64 and tensor.tolist() == numbers(tokens)


def test_the_intersection_of_two_ranges_stays_a_range():
    assert intersect(range(3, 9), range(5, 20)) == range(5, 9)
    assert len(intersect(range(3, 5), range(7, 9))) == 0


@PROPERTY
@given(
    st.integers(0, 30), st.integers(1, 4), st.integers(1, 4), st.integers(-3, 40), st.integers(0, 8),
    st.none() | st.lists(st.booleans(), min_size=16, max_size=16),
)  # fmt: skip
def test_tokens_of_frames_are_those_of_a_frame_by_frame_count(frame, span, per_frame, first, count, kept):
    tokens = span * per_frame
    left = None if kept is None else torch.tensor([t for t in range(tokens) if kept[t]], dtype=torch.int64)
    block = Block(0, "committed", frame, span, {FULL: Form(tokens, left)})
    owned = range(tokens) if left is None else left.tolist()
    expected = [t for t in owned if first <= frame + t // per_frame < first + count]
    assert numbers(block.of_frames(first, first + count)) == expected


def test_a_text_has_tokens_but_no_frames():
    text = Block(0, "anchor", 0, 0, {FULL: Form(7)})
    assert text.complete and len(text.of_frames(0, 10)) == 0


# --- the table --------------------------------------------------------------------------------------------------------


def block(i: int, frame: int, span: int = 3, kept: TokenSet | None = None, role: str = "committed") -> Block:
    return Block(i, role, frame, span, {FULL: Form(2 * span, kept)})


def test_a_form_counts_what_it_still_owns():
    form = Form(6, torch.tensor([1, 4]))
    assert (form.tokens, form.count, Form(6).count) == (6, 2, 6)
    assert Form(6).owned == range(6)


def test_now_is_the_first_frame_in_flight_and_span_all_of_them():
    live = (block(2, 6, 3, role="live"), block(3, 9, 1, role="live"))
    table = BlockTable((block(0, 0), block(1, 3)), live, frames_seen=6)
    assert (table.now, table.span) == (6, 4)
    assert (BlockTable(frames_seen=6).now, BlockTable().now, BlockTable().span) == (6, 0, 0)


@pytest.mark.parametrize(
    ("blocks", "complete"),
    [
        ((block(0, 0), block(1, 3)), True),
        ((block(9, 0, 0, role="anchor"), block(0, 0), block(1, 3)), True),  # a text adds no frames
        ((block(1, 3),), False),  # a block is gone
        ((block(0, 0, kept=torch.tensor([0, 1])), block(1, 3)), False),  # tokens are gone
        ((Block(0, "committed", 0, 3, {"compressed": Form(1)}), block(1, 3)), False),  # only a smaller form is left
    ],
)
def test_a_table_is_complete_while_every_token_ever_seen_is_there(blocks, complete):
    assert BlockTable(blocks, (), frames_seen=6).complete is complete


# --- packing ----------------------------------------------------------------------------------------------------------


def starts(frames: list[int], spans: list[int], anchor: int) -> list[float]:
    segments = [(Entry(i), f, n) for i, (f, n) in enumerate(zip(frames, spans, strict=True))]
    return [f + e.shift for f, e in zip(frames, pack_right(segments, anchor), strict=True)]


def test_packed_starts_of_the_published_examples():
    assert starts([0, 3, 12, 27], [3, 3, 3, 3], 30) == [18, 21, 24, 27]
    assert starts([0, 1, 3, 4, 5, 7], [1] * 6, 8) == [2, 3, 4, 5, 6, 7]  # sinks move too


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=8), st.integers(0, 5))
def test_packed_segments_lie_without_gaps_right_before_the_anchor(gaps_and_spans, gap):
    frames, spans, end = [], [], 0
    for before, span in gaps_and_spans:
        frames.append(end + before)
        spans.append(span)
        end = frames[-1] + span
    packed = starts(frames, spans, end + gap)
    assert [p + n for p, n in zip(packed, spans, strict=True)] == [*packed[1:], end + gap][: len(packed)]
    assert all(p >= f for p, f in zip(packed, frames, strict=True))  # nothing moves back in time
    assert starts([int(p) for p in packed], spans, end + gap) == packed  # packing twice is packing once


def test_packing_moves_an_entry_and_changes_nothing_else_of_it():
    entry = Entry(7, "compressed", range(2), shift=99, log_weight=0.5)
    (packed,) = pack_right([(entry, 4, 3)], 20)
    assert (packed.block, packed.form, packed.tokens, packed.log_weight) == (7, "compressed", range(2), 0.5)
    assert packed.shift == 13


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "streams", "dtype"), [(1, 1, torch.float32), (3, 2, torch.bfloat16)])
def test_token_bytes_are_what_the_stores_allocate(batch, streams, dtype):
    shape = HistoryShape(5, 2, 8, dtype.itemsize, tokens_per_frame=6, chunk_frames=3, batch=batch, streams=streams)
    stores = [Store(5, batch, 7, 2, 8, 3, dtype, torch.device("cpu")) for _ in range(streams)]
    assert sum(s.k.nbytes + s.v.nbytes for s in stores) == 7 * shape.token_bytes
    assert (shape.frame_bytes, shape.chunk_tokens) == (6 * shape.token_bytes, 18)

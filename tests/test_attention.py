"""Attention whole, in parts, and how much of it falls where."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.attention import attend, attend_with_lse, logits, merge, segment_mass

from .reference.attention import attention

CLOSE = {"rtol": 0, "atol": 2e-6}
HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
BACKENDS = pytest.mark.parametrize("backend", [None, "native"])


def qkv(n: int, m: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0, spread: float = 1.0):
    """q [2, n, heads, dim] with logits of about `spread`, k and v [2, m, kv_heads, dim]."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, n, heads, dim, generator=g) * spread
    k, v = (torch.randn(2, m, kv_heads, dim, generator=g) for _ in range(2))
    return q, k, v


@HEADS
@BACKENDS
def test_attend_equals_a_dense_softmax(heads, kv_heads, backend):
    q, k, v = qkv(5, 7, heads, kv_heads)
    torch.testing.assert_close(attend(q, k, v, backend=backend).double(), attention(q, k, v)[0], **CLOSE)


@BACKENDS
def test_causal_sees_no_later_token(backend):
    q, k, v = qkv(6, 6)
    out = attend(q, k, v, causal=True, backend=backend)
    torch.testing.assert_close(out.double(), attention(q, k, v, causal=True)[0], **CLOSE)


@HEADS
@BACKENDS
def test_bias_is_added_to_the_logits_of_each_key(heads, kv_heads, backend):
    q, k, v = qkv(5, 7, heads, kv_heads)
    bias = torch.linspace(-2, 2, 7)
    out = attend(q, k, v, bias=bias, backend=backend)
    torch.testing.assert_close(out.double(), attention(q, k, v, bias)[0], **CLOSE)


def test_a_log_weight_counts_a_key_that_many_times():
    q, k, v = qkv(5, 7)
    thrice = [0, 1, 2, 3, 3, 3, 4, 5, 6]
    bias = torch.zeros(7)
    bias[3] = torch.log(torch.tensor(3.0))
    torch.testing.assert_close(attend(q, k, v, bias=bias), attend(q, k[:, thrice], v[:, thrice]), **CLOSE)


def test_query_heads_share_key_heads_in_groups():
    q, k, v = qkv(5, 7, heads=6, kv_heads=2)
    whole = attend(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2))
    torch.testing.assert_close(attend(q, k, v), whole, **CLOSE)
    torch.testing.assert_close(logits(q, k), logits(q, k.repeat_interleave(3, 2)), rtol=0, atol=0)


# --- in parts ---------------------------------------------------------------------------------------------------------


@HEADS
@pytest.mark.parametrize("query_block", [1, 3, 256])
def test_log_sum_exp_and_output_equal_the_dense_ones(heads, kv_heads, query_block):
    q, k, v = qkv(8, 7, heads, kv_heads)
    out, lse = attend_with_lse(q, k, v, query_block)
    torch.testing.assert_close(out.double(), attention(q, k, v)[0], **CLOSE)
    torch.testing.assert_close(lse, logits(q, k).logsumexp(-1).transpose(1, 2), **CLOSE)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.sampled_from([0.1, 1.0, 100.0]),
    st.integers(0, 100),
)
def test_merged_parts_equal_attention_over_their_concatenation(lengths, heads, spread, seed):
    q, k, v = qkv(5, sum(lengths), *heads, seed=seed, spread=spread)
    parts = [attend_with_lse(q, a, b) for a, b in zip(k.split(lengths, 1), v.split(lengths, 1), strict=True)]
    out, lse = merge(parts)
    torch.testing.assert_close(out.double(), attention(q, k, v)[0], rtol=0, atol=2e-6 * max(1.0, spread * 5))
    torch.testing.assert_close(lse, attend_with_lse(q, k, v)[1], rtol=1e-6, atol=1e-5)


def test_averaging_parts_by_their_length_would_not_be_attention():
    q, k, v = qkv(5, 8)
    parts = [attend_with_lse(q, a, b) for a, b in zip(k.split(4, 1), v.split(4, 1), strict=True)]
    average = (parts[0][0] + parts[1][0]) / 2
    assert float((average - attention(q, k, v)[0]).abs().max()) > 0.05


# --- where it falls ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.sampled_from([1, 2, 256]),
    st.sampled_from([1.0, 100.0]),
)
def test_segment_mass_equals_the_dense_softmax_summed(lengths, heads, query_block, spread):
    q, k, v = qkv(5, sum(lengths), *heads, spread=spread)
    mass = segment_mass(q, k, lengths, query_block)
    weights = attention(q, k, v)[1].mean(2)  # [B, Hq, Nk]
    dense = torch.stack([part.sum(-1) for part in weights.split(lengths, -1)], -1)
    torch.testing.assert_close(mass.double(), dense, rtol=0, atol=2e-5 if spread > 1 else 1e-6)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 3], [3, 5], []])
def test_segments_must_cover_the_keys(lengths):
    q, k, _ = qkv(5, 7)
    with pytest.raises(ValueError, match=f"segments cover {sum(lengths)} keys, there are 7"):
        segment_mass(q, k, lengths)

"""The most bytes that are alive within a forward, beside weights and everything a session keeps.

A peak is the largest of a few moments; a moment adds up the tensors that PyTorch's eager mode has alive at once, which
follows from the order of a block's lines and from which names still hold a tensor. Counted are the tensors that
operations hand out; scratch inside a kernel (a convolution's workspace, the attention kernel's own) is not, nor is what
the allocator rounds up. Of what policies score by, only FlowCache's and Deep Forcing's way is counted, whose tensors
are of the past's size. RMS norms are taken apart into single operations, as PyTorch does on a CPU; where they are one
kernel, the moments that hold them are smaller.

Units: n tokens of the pass, d hidden size, m inner size of the MLP, s bytes of a working number. `wide(x)` is an fp32
copy of a tensor of x bytes: nothing where the working type is fp32 already.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import HistoryShape
from ..policies import DeepForcing, FlowCacheKV, KVPolicy
from ..policies.flowcache_kv import TRANSIENT

FP32 = 4
PHASE = 8  # a rotary phase: cosine and sine in fp32
LOGITS_AT_ONCE = 2**25  # of the masked sampler: so many it holds at once


@dataclass(frozen=True)
class ForwardPeak:
    """Bytes of one forward: the most at any moment, and what is alive while a layer's view is rebuilt."""

    most: int
    attending: int


def wan_forward(n: int, d: int, m: int, s: int, *, rope: int, first: int) -> ForwardPeak:
    """A Wan2.1 or SkyReels-V2 transformer. `rope` bytes of rotary tables that the stock class makes in vain, `first`
    bytes of the patch embedding where the caller goes on holding it."""
    x, inner = n * d * s, n * m * s
    full, wide = n * d * FP32, 0 if s == FP32 else n * d * FP32
    base = x + rope + first + 2 * 6 * d * FP32  # a block's input, which its caller holds too; modulation
    moments = (
        # queries, keys, values, normalised queries, and the keys' norm under way: fp32 copy, product, weighted product
        base + 5 * x + wide + 2 * full,
        # hidden, both normalised ones, the cross-attention's output; two tensors of the MLP's inner size
        base + 3 * x + 2 * inner,
        # the same, the MLP's output; residual in fp32: hidden, gated output, their sum
        base + 4 * x + wide + 2 * full,
    )
    return ForwardPeak(max(moments), base + 5 * x)


def magi_forward(n: int, d: int, m: int, s: int, *, query: int, kv: int) -> ForwardPeak:
    """A MAGI-1 transformer; `query` and `kv` are the widths of queries and of keys."""
    x, q, k = n * d * s, n * query * s, n * kv * s
    full, wide = n * d * FP32, 0 if s == FP32 else n * d * FP32
    wide_q, full_q = (0 if s == FP32 else n * query * FP32), n * query * FP32
    moments = (
        2 * x + 2 * n * m * s,  # hidden before and after attention; two tensors of the MLP's inner size
        3 * x + 2 * full + (full if wide else 0),  # joining a branch: its norm, the residual, their sum
        2 * x + q + 2 * k + q + wide_q + (full_q if wide_q else 0),  # the queries' norm
        2 * x + 2 * q + 2 * k + wide_q * 3 // 4 + full_q * 3 // 2,  # turning three quarters of the queries' channels
        2 * x + 4 * q,  # both attentions' outputs, and the two interleaved
    )
    return ForwardPeak(max(moments), 2 * x + 2 * q + 2 * k)


def lumos_forward(n: int, d: int, m: int, s: int, *, query: int, kv: int, beside: int) -> ForwardPeak:
    """A Lumos-1 transformer; `beside` bytes of hidden states are held by whoever draws codes from them."""
    x, q, k = n * d * s, n * query * s, n * kv * s
    full_q = n * query * FP32
    attending = 2 * x + 2 * q + 3 * k
    moments = (
        attending + 2 * full_q + (0 if s == FP32 else full_q),  # turning the queries: both halves, products, sums
        3 * x + 3 * n * m * s,  # three tensors of the MLP's inner size
    )
    return ForwardPeak(max(moments) + beside, attending + q + beside)


def code_logits(rows: int, codes: int, d: int, s: int) -> int:
    """Drawing `rows` codes of a masked frame, a block at a time: logits, their logarithm, and in fp64 the
    probabilities and their running sum."""
    block = max(1, min(rows, LOGITS_AT_ONCE // codes))
    return block * (codes * (FP32 + 3 * 8) + d * s)


def fill(rows: int, width: int, s: int, pairing: str) -> int:
    """Turning the keys of `rows` tokens of one layer to where a plan puts them; `width` is that of a token's keys."""
    whole = rows * width * FP32
    if pairing == "interleaved":
        return 0 if s == FP32 else 2 * whole  # complex numbers; in fp32 they are written in place
    return 2 * whole if s == FP32 else 3 * whole


def phases(rows: int, pairs: int) -> int:
    """Making the phases of `rows` tokens: angles, cosines, sines and both together, in fp64."""
    return rows * pairs * 5 * 8


def fused_phases(policy: KVPolicy, sizes: HistoryShape, pairs: int) -> int:
    """Making the phases of one layer's fused tokens, every head of which stands elsewhere."""
    return phases(policy.fused(sizes) * sizes.kv_heads, pairs)


def scoring(policy: KVPolicy, sizes: HistoryShape, query: int, pairs: int) -> int:
    """What a policy makes of a layer's queries, of width `query`, and the keys of the past, within a forward."""
    if not isinstance(policy, FlowCacheKV | DeepForcing):
        return 0
    heads, s = sizes.kv_heads, sizes.itemsize
    if isinstance(policy, DeepForcing):
        apart = policy.sink + policy.recent + 1
    else:  # asked in advance, it goes on until the last chunk of the take is alone
        apart = 1 if policy.queries == "last" else sizes.live_chunks - 1
    past = max(0, (policy.capacity(sizes) or 0) - apart * sizes.chunk_tokens)  # what is chosen from
    keys, whole = past * heads * sizes.head_dim * s, past * heads * sizes.head_dim * FP32
    wide = 0 if s == FP32 else whole
    chosen = phases(past * heads, pairs) + past * heads * 2 * 3 * 8 + keys  # places per head, before anything is scored
    if isinstance(policy, DeepForcing):
        return chosen
    rows = max(1, min(sizes.chunk_tokens, TRANSIENT // max(1, 2 * FP32 * heads * past)))
    logits = rows * (2 * FP32 * heads * past + 2 * FP32 * query)
    scored = logits + whole + wide + keys
    return scored if policy.queries == "last" else max(scored, chosen)

"""FlowCache's compression of the past: published scores and survivors, bounded memory, and the published mistakes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from longtake import FlowCacheKV, FlowCacheReuse, FullHistory, LongtakeError, PlanError, Session, TeaCacheReuse
from longtake.plan import FULL, Block, BlockTable, Entry, Form, Fuse, HistoryShape, Signals
from longtake.policies.flowcache_kv import importance, pooled, redundancy

from .reference.flowcache_kv import dense_importance, dense_redundancy
from .skyreels import tiny_skyreels
from .tiny import text, tiny_wan

GOLDENS = Path(__file__).parent / "goldens"
SCORES = GOLDENS / "flowcache_kv_score.safetensors"
FRAME, CHUNK = 30, 90  # tokens of the recorded inputs


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(SCORES)


def cases() -> list[dict]:
    with safe_open(SCORES, "pt") as file:
        return [case for case in json.loads(file.metadata()["cases"]) if case["weighting"] in (None, "no_weight")]


def policy_of(case: dict) -> FlowCacheKV:
    asking = {"chunk": "chunk", "frame": "frame", "token": 50}[case.get("query_granularity") or "chunk"]
    return FlowCacheKV(
        mix=case["mix_lambda"], group=case["strategy"], asking=asking, sort=False, frame_tokens=FRAME,
        chunk_tokens=CHUNK,
    )  # fmt: skip


def kept(policy: FlowCacheKV, score: Tensor, n: int) -> Tensor:
    """[Hk, n] indices that the policy's plan keeps by a score [1, Hk, Nk]."""
    fuse = policy._fuse((0,), score.shape[-1], n, policy.chunk_tokens, {"cond": score[None]})
    return fuse.keep["cond"][0, 0]


@pytest.mark.parametrize("case", [c for c in cases() if c["key"].startswith("gqa/")], ids=lambda case: case["key"])
def test_scores_and_survivors_are_the_published_ones(golden, case):
    policy = policy_of(case)
    score = policy.score(golden["gqa/q"][None], golden["gqa/k"][None])
    groups = {"token": 1, "frame": FRAME, "chunk": CHUNK}[case["strategy"]]
    ours, want = score[0, :, ::groups], golden[case["score_key"]]
    if case["strategy"] == "token":
        ours = ours - ours.amin(-1, keepdim=True)  # published so; it does not change the choice
    torch.testing.assert_close(ours, want, rtol=0, atol=2e-7)
    got, want = kept(policy, score, case["budget_tokens"]), golden[f"{case['key']}/indices"].long()
    assert torch.equal(got.sort(-1).values, want.sort(-1).values)
    if (case["order_margin"] or 1) > 1e-7:
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["chunk", "frame", "token"])
def test_importance_and_redundancy_are_the_published_ones(golden, name):
    q, k = golden["gqa/q"], golden["gqa/k"]
    rows = {"chunk": CHUNK, "frame": FRAME, "token": 50}[name]
    raw = importance(q[None, -rows:], k[None])
    torch.testing.assert_close(raw[0], golden[f"gqa/importance_raw_q{name}"], rtol=0, atol=2e-7)
    torch.testing.assert_close(pooled(raw, 7)[0], golden[f"gqa/importance_pooled_q{name}"], rtol=0, atol=2e-7)
    torch.testing.assert_close(redundancy(k[None])[0], golden["gqa/redundancy"], rtol=0, atol=2e-7)


@pytest.mark.parametrize("case", [c for c in cases() if c["key"].startswith("mha/")], ids=lambda case: case["key"])
def test_as_many_query_heads_as_kv_heads_work_too(golden, case):
    """The published code of one host fails here: it swaps the wrong axes when no query heads share keys."""
    size = {"token": 1}.get(case["strategy"], 20)
    policy = FlowCacheKV(
        mix=case["mix_lambda"], group="frame" if size > 1 else "token", sort=False, frame_tokens=size, chunk_tokens=40
    )
    score = policy.score(golden["mha/q"][None], golden["mha/k"][None])
    torch.testing.assert_close(score[0, :, ::size], golden[case["score_key"]], rtol=0, atol=2e-7)
    got = kept(policy, score, case["budget_tokens"]).sort(-1).values
    assert torch.equal(got, golden[f"{case['key']}/indices"].long().sort(-1).values)


def formula_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs by formula: 24 tokens, 2 KV heads, 4 query heads, 8 channels."""
    n = lambda count: torch.arange(count, dtype=torch.float64)
    l, h, g, d = n(24)[:, None, None], n(2)[:, None], n(4)[:, None], n(8)
    k = torch.sin(0.37 * l * (1 + 0.1 * d) + 0.9 * h + 0.5 * d) + 0.2 * torch.cos(1.7 * l + d)
    v = torch.cos(0.11 * l + 0.2 * h + 0.05 * d)
    q = 1.5 * torch.sin(0.23 * l + 0.6 * g + 0.31 * d)
    return q.float(), k.float(), v.float()


REDUNDANCY = [
    0.042381, 0.043302, 0.043672, 0.044759, 0.045150, 0.043833, 0.042035, 0.041195, 0.039852, 0.038208, 0.037755,
    0.038326, 0.038299, 0.038259, 0.038794, 0.039284, 0.039485, 0.041041, 0.042972, 0.044229, 0.045025, 0.045563,
    0.044529, 0.042054,
]  # fmt: skip
IMPORTANCE = [
    0.057889, 0.056540, 0.073641, 0.079404, 0.060319, 0.048385, 0.041386, 0.044471, 0.058260, 0.053252, 0.040095,
    0.033749, 0.028750, 0.029658, 0.032122, 0.029339, 0.027783, 0.027947, 0.028058, 0.028423, 0.027971, 0.030783,
    0.030988, 0.030788,
]  # fmt: skip
POOLED = [0.079404] * 7 + [0.060319] + [0.058260] * 4 + [0.053252, 0.040095, 0.033749] + [0.032122] * 3
POOLED += [0.030783] + [0.030988] * 5
SURVIVORS = {
    ("token", "chunk"): (
        [[0, 6, 1, 2, 5, 3, 10, 13, 12, 11, 4, 7], [5, 6, 0, 2, 4, 1, 3, 10, 13, 11, 12, 7]], -7.326671, 98.742760,
    ),
    ("token", "frame"): (
        [[6, 0, 1, 2, 5, 3, 4, 7, 8, 13, 12, 10], [6, 5, 7, 8, 0, 9, 10, 2, 4, 1, 3, 13]], -5.566185, 106.384430,
    ),
    ("frame", "chunk"): ([list(range(12))] * 2, -3.379236, 112.391380),
    ("chunk", "chunk"): ([list(range(12))] * 2, -3.379236, 112.391380),
}  # fmt: skip


def test_vectors_by_formula_come_out():
    q, k, _ = formula_inputs()
    raw = importance(q[None], k[None])
    assert redundancy(k[None])[0, 0].tolist() == pytest.approx(REDUNDANCY, abs=6e-7)
    assert raw[0, 0].tolist() == pytest.approx(IMPORTANCE, abs=6e-7)
    assert pooled(raw, 7)[0, 0].tolist() == pytest.approx(POOLED, abs=6e-7)


@pytest.mark.parametrize("setting", SURVIVORS, ids="/".join)
def test_survivors_by_formula_come_out(setting):
    """Two frames of 2 × 3 tokens in a chunk; 12 queries; half of 24 tokens stays."""
    (group, asking), (indices, keys, values) = setting, SURVIVORS[setting]
    q, k, v = formula_inputs()
    policy = FlowCacheKV(group=group, asking=asking, sort=False, frame_tokens=6, chunk_tokens=12)
    got = kept(policy, policy.score(q[None, :12], k[None]), 12)
    assert [sorted(row) for row in got.tolist()] == [sorted(row) for row in indices]
    assert got.tolist() == indices
    index = got.T[..., None].expand(-1, -1, 8)
    assert k.gather(0, index).sum().item() == pytest.approx(keys, abs=1e-4)
    assert v.gather(0, index).sum().item() == pytest.approx(values, abs=1e-4)


# --- exactness of the fast forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("transient", [1, 5000, 1 << 30])
def test_streamed_importance_is_dense_softmax(heads, kv_heads, transient):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 37, heads, 8, generator=g), torch.randn(2, 53, kv_heads, 8, generator=g)
    got = importance(q, k, transient)
    torch.testing.assert_close(got, dense_importance(q, k), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, kv_heads))


def test_redundancy_by_the_sum_vector_is_the_mean_of_the_cosine_matrix():
    k = torch.randn(2, 53, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(redundancy(k), dense_redundancy(k), rtol=1e-5, atol=1e-8)


def test_scores_of_half_precision_keys_are_taken_in_fp32():
    """In bf16 end to end a score of thousands of tokens has a few dozen values, and survivors are drawn by chance."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 2, 16, generator=g).bfloat16() for n in (40, 400))
    policy = FlowCacheKV(frame_tokens=10, chunk_tokens=40)
    score = policy.score(q, k)
    assert score.dtype == torch.float32
    assert torch.equal(score, policy.score(q.float(), k.float()))
    distinct = lambda x: len(x[0, 0].unique())
    assert distinct(score) > 150 > distinct(score.bfloat16())


# --- the plan ---------------------------------------------------------------------------------------------------------


def table(past: list[int], live: int, frames: int = 3, per_frame: int = 4) -> BlockTable:
    """Committed blocks of so many tokens, and chunks in flight."""
    chunk = frames * per_frame
    blocks = [Block(i, "committed", frames * i, frames, {FULL: Form(n)}) for i, n in enumerate(past)]
    flight = [Block(10 + i, "live", frames * (len(past) + i), frames, {FULL: Form(chunk)}) for i in range(live)]
    return BlockTable(tuple(blocks), tuple(flight), frames * len(past))


def settled(chunks: int = 5, live: int = 3, **options) -> FlowCacheKV:
    return FlowCacheKV(chunks, **options).settle(HistoryShape(2, 2, 8, 4, 4, 3, live_chunks=live))


def scored(n: int, streams: tuple[str, ...] = ("cond",), heads: int = 2) -> Signals:
    g = torch.Generator().manual_seed(n)
    return Signals(0, {s: {layer: torch.rand(1, heads, n, generator=g) for layer in range(2)} for s in streams})


def test_nothing_is_compressed_or_scored_while_there_is_room():
    for past in (0, 1, 2):
        plan = settled().plan(table([12] * past, 3), Signals())
        assert all(isinstance(entry, Entry) for entry in plan.entries) and len(plan.entries) == past
    assert settled().plan(table([12], 2), Signals()).observe == ()


def test_room_is_made_when_a_chunk_enters_and_not_before():
    policy = settled()
    waiting = policy.plan(table([12] * 3, 2), scored(36))
    assert all(isinstance(entry, Entry) for entry in waiting.entries)
    entering = policy.plan(table([12] * 3, 3), scored(36))
    (fuse,) = entering.entries
    assert (
        isinstance(fuse, Fuse)
        and fuse.n == 24
        and fuse.blocks == (0, 1, 2)
        and fuse.keep["cond"].shape == (2, 1, 2, 24)
    )


def test_what_is_scored_is_what_will_have_finished_when_room_is_needed():
    assert settled().plan(table([12, 12], 3), Signals()).observe == (0, 1, 10)
    assert settled().plan(table([12, 12, 12], 2), scored(36)).observe == (0, 1, 2)


def test_a_given_past_that_no_step_has_looked_at_is_compressed_by_the_next_one():
    """A video that is continued fills the budget before anything was scored; the published code fails on it."""
    plan = settled().plan(table([12] * 4, 1), Signals(0, {"cond": {}}))
    (fuse,) = plan.entries
    assert fuse.keep is None and fuse.n == 24


def test_scores_of_other_tokens_are_not_used():
    plan = settled().plan(table([12] * 3, 3), scored(24))
    assert plan.entries[0].keep is None


def test_anchors_are_never_compressed():
    blocks = table([12] * 3, 3)
    anchor = Block(99, "anchor", 0, 0, {FULL: Form(7)})
    plan = settled().plan(replace(blocks, blocks=(anchor, *blocks.blocks)), scored(36))
    assert plan.entries[0] == Entry(99) or plan.entries[0].block == 99
    assert plan.entries[1].blocks == (0, 1, 2) and 99 not in plan.observe


@pytest.mark.parametrize("group", ["frame", "chunk"])
def test_groups_stay_or_go_as_wholes(group):
    size = {"frame": 4, "chunk": 12}[group]
    policy = settled(group=group)
    score = policy.score(torch.randn(1, 12, 4, 8), torch.randn(1, 36, 2, 8))
    keep = policy.plan(table([12] * 3, 3), Signals(0, {"cond": {0: score, 1: score}})).entries[0].keep["cond"]
    runs = keep.unflatten(-1, (-1, size))
    assert (runs == runs[..., :1] + torch.arange(size)).all() and (runs[..., 0] % size == 0).all()


def test_a_past_that_is_no_whole_groups_is_refused_with_advice():
    with pytest.raises(PlanError, match="group=frame"):
        settled(group="chunk").plan(table([4, 12, 12, 12], 3), scored(40))
    plan = settled(group="frame").plan(table([4, 12, 12, 12], 3), scored(40))
    assert plan.entries[0].n == 24


@pytest.mark.parametrize(("queries", "least"), [("last", 5), ("next", 6)])
def test_a_budget_below_what_is_in_flight_and_one_more_is_refused_with_advice(queries, least):
    """The published code overflows its buffer with a budget of the window alone."""
    shape = HistoryShape(2, 2, 8, 4, 4, 3, live_chunks=4)
    with pytest.raises(LongtakeError, match=f"use chunks={least} or more"):
        FlowCacheKV(least - 1, queries=queries).check(shape)
    FlowCacheKV(least, queries=queries).check(shape)
    fitted = FlowCacheKV(queries=queries).fit(7 * 3 * shape.frame_bytes + 1, shape)
    assert fitted.chunks == 7 and fitted.capacity(shape) * shape.token_bytes <= 7 * 3 * shape.frame_bytes
    with pytest.raises(LongtakeError, match=f"at least {least} are needed"):
        FlowCacheKV(queries=queries).fit((least - 1) * 3 * shape.frame_bytes, shape)


WRONG = [
    {"chunks": 1},
    {"mix": 1.5},
    {"group": "row"},
    {"queries": "all"},
    {"asking": "row"},
    {"asking": 0},
    {"pool": 2},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_setting_is_refused_in_one_line(wrong):
    with pytest.raises(LongtakeError) as error:
        FlowCacheKV(**wrong)
    assert "\n" not in str(error.value)


# --- in takes ---------------------------------------------------------------------------------------------------------


def take(policy, host=None, **options) -> Session:
    defaults = {"prompt_embeds": text(), "decode": False, "seed": 3}
    return Session(host or tiny_wan(), policy, **defaults | options)


def latents(session: Session, chunks: int = 6) -> Tensor:
    return torch.stack([next(session).latents for _ in range(chunks)])


SETTINGS = [{}, {"queries": "next", "chunks": 4}, {"group": "frame"}, {"asking": 5}, {"group": "chunk", "chunks": 4}]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_rows_are_bounded_by_the_budget_and_memory_really_shrinks(setting):
    policy = FlowCacheKV(**{"chunks": 3} | setting)
    session, full = take(policy), take(FullHistory(), chunks=8)
    sizes = []
    for _ in range(8):
        stats = next(session).stats
        assert stats.attended_tokens <= policy.chunks * 18
        sizes.append(session.history.memory())
    assert sizes[4] == sizes[-1]  # survivors have positions of their own, which come with the first compression
    rows = lambda take: take.history.stores["cond"].k.nbytes
    token = 3 * 1 * 2 * 12 * 4  # layers, takes, heads, channels, fp32
    assert rows(session) == policy.chunks * 18 * token and rows(full) == (8 * 18 + 6) * token  # room for a first image
    assert session.history.table().blocks[0].role == "fused"


def test_below_the_budget_it_is_full_history_bitwise():
    assert torch.equal(latents(take(FlowCacheKV(6))), latents(take(FullHistory())))
    assert not torch.equal(latents(take(FlowCacheKV(3))), latents(take(FullHistory())))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_residencies_agree_and_a_snapshot_goes_on_to_the_bit(setting, tmp_path):
    policy = FlowCacheKV(**{"chunks": 3} | setting)
    session, scratch = take(policy), take(policy, residency="scratch")
    latents(session, 5)
    session.snapshot(tmp_path / "take.safetensors")
    want = latents(session, 3)
    assert torch.equal(latents(Session.restore(tmp_path / "take.safetensors", session.host), 3), want)
    torch.testing.assert_close(latents(scratch, 8)[5:], want, rtol=0, atol=1e-5)


def test_takes_in_lockstep_compress_each_for_itself():
    host, policy = tiny_wan(), FlowCacheKV(3)
    both = take(policy, host, prompt_embeds=torch.cat([text(seed=1), text(seed=2)]), seed=[3, 4])
    together = torch.stack([next(both).latents for _ in range(6)], 1)
    for i, seed in enumerate((3, 4)):
        alone = latents(take(policy, host, prompt_embeds=text(seed=i + 1), seed=seed))
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-4)


def test_guidance_streams_keep_tokens_of_their_own():
    session = take(FlowCacheKV(3), guidance_scale=3.0, negative_prompt_embeds=text(seed=9))
    latents(session)
    fused = session.history.table().blocks[0].id
    base = [session.history.stores[s].held[fused, FULL].head_base for s in ("cond", "uncond")]
    assert base[0].shape == base[1].shape and not torch.equal(*base)


def test_survivors_lie_in_the_order_of_their_positions():
    session = take(FlowCacheKV(3))
    latents(session)
    held = session.history.stores["cond"].held[session.history.table().blocks[0].id, FULL]
    order = held.head_base @ torch.tensor([100.0, 10.0, 1.0])  # frame, row, column
    assert (order.diff(dim=2) > 0).all()
    assert held.head_base[..., 0].max() > 3 * 3  # …and they are of several chunks


def test_what_no_policy_shows_is_never_read():
    """Unused rows hold NaN; nothing of them may come out."""
    session = take(FlowCacheKV(3), guidance_scale=2.0, negative_prompt_embeds=text(seed=9))
    for store in session.history.stores.values():
        store.k.fill_(float("nan"))
        store.v.fill_(float("nan"))
    assert torch.isfinite(latents(session, 8)).all()


def test_a_given_first_image_is_part_of_what_is_compressed():
    session = take(FlowCacheKV(3), tiny_wan(vae=True), image=torch.zeros(3, 32, 48))
    stats = [next(session).stats for _ in range(6)]
    assert max(s.attended_tokens for s in stats) <= 3 * 18


@pytest.mark.parametrize("carry", ["velocity", "residual"])
def test_reuse_and_compression_work_together(carry):
    """Steps that are reused leave no queries: the commit pass gives them, so that compression never waits."""
    host = tiny_wan(timesteps=(1000, 800, 600, 400, 200))
    reuse = FlowCacheReuse(1e9, "timestep", carry, warmup=1, last="none", rescale="identity")
    session = take(FlowCacheKV(3), host, reuse=reuse)
    assert torch.isfinite(latents(session, 8)).all()
    assert session.stats.reused == 8 * 4 and session.history.table().blocks[0].role == "fused"


def test_the_score_needs_no_gpu_and_no_transfer():
    """Everything stays on the keys' device: a score made of meta tensors never asks for a value."""
    q, k = torch.empty(1, 12, 4, 8, device="meta"), torch.empty(1, 36, 2, 8, device="meta")
    assert settled().score(q, k).shape == (1, 2, 36)


def test_pooling_looks_at_neighbours_and_the_borders_see_fewer():
    x = torch.tensor([[[0.0, 3, 0, 0, 0, 0, 0, 0, 1]]])
    assert pooled(x, 7).tolist() == [[[3, 3, 3, 3, 3, 1, 1, 1, 1]]]
    assert torch.equal(pooled(x, 1), x) and torch.equal(F.max_pool1d(x, 7, 1, 3), pooled(x, 7))
    assert math.isclose(redundancy(torch.randn(1, 9, 2, 4)).sum().item(), 2, rel_tol=1e-5)


@pytest.mark.parametrize("policy", [FlowCacheKV(5), FlowCacheKV(6, queries="next"), FlowCacheKV(5, asking=3)], ids=str)
@pytest.mark.parametrize("commit", ["clean", "adopt"])
def test_staggered_takes_with_reuse_never_run_out_of_room(policy, commit):
    """Three chunks in flight, two takes, two guidance streams, most steps reused, on and on in one history."""
    host = tiny_skyreels(overlap=None, commit=commit, condition_noise=0.0)
    session = Session(
        host, policy, prompt_embeds=torch.randn(2, 7, 10), negative_prompt_embeds=torch.zeros(1, 7, 10), decode=False,
        reuse=FlowCacheReuse(1e9, "latent", warmup=2, last="none", rescale="identity"),
    )  # fmt: skip
    sizes = []
    for _ in range(12):
        chunk = next(session)
        assert torch.isfinite(chunk.latents).all()
        assert chunk.stats.attended_tokens <= policy.chunks * 5 * 4
        sizes.append(session.history.memory())
    assert sizes[6] == sizes[-1] and session.stats.reused > session.stats.forwards
    assert session.history.table().blocks[0].role == "fused"


@pytest.mark.parametrize("given", [3, 9, 20])
def test_a_video_that_is_continued_is_compressed_like_any_past(given):
    """The published code fails on a given past with compression."""
    host = tiny_skyreels(overlap=None, condition_noise=0.0)
    session = Session(host, FlowCacheKV(5), prompt_embeds=torch.randn(1, 7, 10), guidance_scale=1.0, decode=False)
    session.rollout.give(torch.randn(1, 4, given, 4, 4))
    for _ in range(8):
        chunk = next(session)
        assert torch.isfinite(chunk.latents).all() and chunk.stats.attended_tokens <= 5 * 5 * 4


@pytest.mark.parametrize("commit", ["clean", "adopt"])
@pytest.mark.parametrize("reuse", [
    None, FlowCacheReuse(0.5, "timestep", warmup=2, last="none", rescale="identity"),
    FlowCacheReuse(0.2, "latent", warmup=2, last="none", rescale="identity"),
    TeaCacheReuse(0.5, "timestep", warmup=2, last="none", rescale="identity"),
], ids=["none", "timestep", "latent", "joint"])  # fmt: skip
def test_only_forwards_whose_scores_can_matter_are_scored_and_the_video_stays_the_same(commit, reuse, monkeypatch):
    """As against scoring every forward that is computed, to the bit."""
    host = tiny_skyreels(overlap=None, commit=commit, condition_noise=0.0)

    def made(everything: bool) -> tuple[Tensor, int]:
        session = Session(
            host, FlowCacheKV(5), prompt_embeds=torch.ones(1, 7, 10), guidance_scale=1.0, decode=False, reuse=reuse,
            seed=4,
        )  # fmt: skip
        if everything:
            all_computed = lambda reuse, computed, rows, adopts: {turn.chunk for turn in computed}
            monkeypatch.setattr("longtake.samplers.staggered.last_forwards", all_computed)
        own, calls = session.history.views["cond"].score, []
        session.history.views["cond"].score = lambda q, k: calls.append(k.shape) or own(q, k)
        return latents(session, 7), len(calls)

    (ours, few), (every, all_) = made(False), made(True)
    assert torch.equal(ours, every) and 0 < few < all_

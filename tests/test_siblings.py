"""The sibling policies of PackForcing: their own arithmetic against the originals', and what they do on a host."""

import pytest
import torch

from longtake import (
    DeepForcing,
    DummyForcing,
    FullHistory,
    InfinityRope,
    LongLive,
    LongtakeError,
    RollingForcing,
    Session,
    SlidingWindow,
)
from longtake.history import History
from longtake.history.groups import attend_in_groups, head_groups
from longtake.history.parts import Fused, Fusing
from longtake.history.store import Store
from longtake.plan import Block, BlockTable, Entry, Form, Fuse, HistoryShape, Plan, Signals
from longtake.policies.dummy_forcing import DUMMY, FIRST, MIDDLE, group, sampled_masses
from longtake.rope import wan_table
from longtake.session import history_shape

from .reference.attention import attention
from .test_equivalences import CLOSE, MIXES, assert_restored_take_goes_on, latents_of, later
from .test_goldens_wan import rollout
from .tiny import golden, text, tiny_wan


def take_of(policy, host=None, **options) -> Session:
    return Session(host or tiny_wan(), policy, **{"prompt_embeds": text(), "decode": False} | options)


# --- window relatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("self_forcing_rollout_window9_sink3", LongLive(9, sink=3)),
        ("longlive_relative_rope", LongLive(9, sink=3, positions="slots")),
        ("infinity_rope_window6", InfinityRope()),
    ],
)
def test_rollouts_of_the_window_methods_match_the_originals(name, policy):
    errors, *_ = rollout(name, policy)
    assert max(errors) < 1e-4


def test_defaults_are_the_published_ones():
    assert (LongLive().frames, LongLive().sink, LongLive().positions) == (12, 3, "absolute")
    assert (InfinityRope().frames, InfinityRope().sink, InfinityRope().positions) == (6, 1, "slots")
    assert (RollingForcing().frames, RollingForcing().sink) == (21, 3)
    assert [p.prompt_switch for p in (LongLive, InfinityRope, RollingForcing)] == ["recache", "flush", "keep"]


def test_the_anchor_stands_right_before_the_newest_frames_which_stay_where_they_are():
    """Three anchor frames and the newest ones, of a take that is far on: measured key layout 3 | history | chunk."""
    blocks = tuple(Block(i, "committed", 3 * i, 3, {"full": Form(6)}) for i in (0, 15, 16, 17, 18, 19))
    table = BlockTable(blocks, (Block(20, "live", 60, 3, {"full": Form(6)}),), 60)
    plan = RollingForcing().plan(table, Signals())
    assert [(e.block, e.shift) for e in plan.entries] == [(0, 42), *((i, 0) for i in (15, 16, 17, 18, 19))]


# --- Deep Forcing -----------------------------------------------------------------------------------------------------

EVENTS = [0, 1]


def event(number: int):
    tensors, meta = golden("deep_forcing_port")
    info = meta["config"]["events_info"][number]
    given = {k.split(f"event{number}_")[1]: v for k, v in tensors.items() if f"event{number}_" in k}
    given |= {
        f"out_{k.split(f'event{number}_')[1]}": v for k, v in tensors.items() if k.startswith(f"outputs/event{number}_")
    }
    given |= {
        f"in_{k.split(f'event{number}_')[1]}": v for k, v in tensors.items() if k.startswith(f"inputs/event{number}_")
    }
    return given, info, meta["config"], tensors


@pytest.mark.parametrize("number", EVENTS)
def test_participation_scores_and_the_tokens_kept_are_the_ports(number):
    given, info, config, _ = event(number)
    scores = DeepForcing().score(given["recent_q"], given["keys"])
    assert all(torch.equal(scores[:, 0], scores[:, head]) for head in range(config["num_heads"]))
    finite = given["scores"].isfinite()
    torch.testing.assert_close(scores[:, 0][finite], given["scores"][finite], atol=1e-5, rtol=0)
    first, last = info["sink_tokens"], info["tokens_before"] - info["recent_tokens"]
    kept = scores[0, 0, first:last].topk(info["top_tokens"]).indices.sort().values + first
    assert torch.equal(kept, given["top_index"])


@pytest.mark.parametrize("number", EVENTS)
def test_participative_compression_keeps_and_moves_what_the_port_does(number):
    """The port's cache as a store: fused by the policy's score, the survivors' keys and places are its own."""
    given, info, config, _ = event(number)
    table, per_frame = wan_table(config["head_dim"]), config["tokens_per_frame"]
    frames, keys = given["frame_index"][0].double(), given["keys"]
    position = torch.stack((frames, frames * 0, frames * 0), -1)
    step = torch.tensor([1.0, 0, 0]).double().expand_as(position)
    first, last = info["sink_tokens"], info["tokens_before"] - info["recent_tokens"]
    store = Store(1, 1, len(frames), config["num_heads"], config["head_dim"], 3, torch.float32, torch.device("cpu"))
    middle = slice(first, last)
    rows = store.take((0, "full"), position[middle], step[middle])
    store.k[0][:, rows.rows] = table.rotate(keys[:, middle], table.phases(-position[middle]))
    store.v[0][:, rows.rows] = given["values"][:, middle]
    shift = info["sink_shift"]
    n = info["top_tokens"]
    fusing = Fusing(store, table, [rows], n, shift, True, DeepForcing().score, per_frame)
    k, v = torch.zeros(1, n, 2, 24), torch.zeros(1, n, 2, 24)
    # the port scores where keys lie before it moves the sink
    fusing.shift = 0
    fusing.resolve(0, q=given["recent_q"])
    fusing.finish()
    Fused(store, table, fusing.fused, shift).fill(0, k, v, None)
    kept = given["kept_index"]
    mine = (kept >= first) & (kept < last)
    torch.testing.assert_close(k, given["rotated_keys"][:, mine], atol=3e-6, rtol=0)
    assert torch.equal(v, given["kept_values"][:, mine])
    places = fusing.fused.head_base[0, 0, :, 0, 0] + shift
    assert places.tolist() == given["new_frame_index"][0, mine].tolist()


@pytest.mark.parametrize("number", EVENTS)
def test_one_rotation_of_the_kept_keys_is_the_ports(number):
    given, _, config, _ = event(number)
    delta = given["delta_frames"][0].double()
    table = wan_table(config["head_dim"])
    turned = table.rotate(given["kept_keys"], table.phases(torch.stack((delta, delta * 0, delta * 0), -1)))
    torch.testing.assert_close(turned, given["rotated_keys"], atol=1e-6, rtol=0)


def test_a_full_window_is_compressed_to_the_top_frames_worth_of_tokens():
    """Sink 1 chunk, recent 1, window 14: chunks see 3, 6, 9, 12 frames, then what is left after compressing."""
    take = take_of(DeepForcing(frames=14, sink=1, recent=1, top=2), tiny_wan(timesteps=(1000,)))
    frames = [next(take).stats.attended_tokens / 6 for _ in range(10)]
    assert frames == [3, 6, 9, 12, 11, 14, 11, 14, 11, 14]
    fused = [b for b in take.history.table().blocks if b.role == "fused"]
    assert len(fused) == 1 and fused[0].forms["full"].tokens == 12
    base = take.history.stores["cond"].held[(fused[0].id, "full")].head_base  # [L, B, n, H, axes]
    assert base[..., 0].unique().tolist() == [3.0, 4.0] and (base.diff(dim=2)[..., 0] >= 0).all()


def test_layers_keep_tokens_of_their_own_and_heads_the_same():
    take = take_of(DeepForcing(frames=14, sink=1), tiny_wan(timesteps=(1000,), grid=(4, 4)))
    latents_of(take, 6)
    fused = next(b for b in take.history.table().blocks if b.role == "fused")
    base = take.history.stores["cond"].held[(fused.id, "full")].head_base[:, 0]  # [L, n, H, axes]
    assert torch.equal(base[:, :, 0], base[:, :, 1])
    assert not torch.equal(base[0], base[1])


def test_deep_sink_top_and_recent_are_packed_against_the_chunk():
    policy = DeepForcing(frames=14, sink=1, recent=1, top=2)
    take = take_of(policy, tiny_wan(timesteps=(1000,)))
    latents_of(take, 7)
    take.rollout.admit(3)
    table = take.history.table()
    plan = policy.plan(table, take.history.signals())
    kinds = [type(e).__name__ for e in plan.entries]
    start = {b.id: b.frame for b in table.blocks}
    at = [start[e.block if isinstance(e, Entry) else e.blocks[0]] + e.shift for e in plan.entries]
    now = table.now
    assert kinds in (["Entry", "Entry", "Entry", "Entry"], ["Entry", "Fuse", "Entry"])
    assert at in ([now - 11, now - 8, now - 6, now - 3], [now - 8, now - 5, now - 3])


def test_deep_forcing_covers_until_the_window_is_full():
    full, take = (take_of(p, tiny_wan(timesteps=(1000,))) for p in (FullHistory(), DeepForcing(frames=14, sink=1)))
    equal = [torch.equal(next(full).latents, next(take).latents) for _ in range(5)]
    assert equal == [True] * 4 + [False]


def test_a_compression_without_room_is_refused_with_what_would_do():
    with pytest.raises(LongtakeError, match="use frames=17 or more"):
        take_of(DeepForcing(frames=16))


# --- Dummy Forcing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [0, 1, 2])
def test_heads_are_grouped_as_the_original_groups_them(case):
    tensors, meta = golden("dummy_forcing_grouping")
    assert (FIRST, MIDDLE, DUMMY) == (0, 1, 2)
    groups = group(tensors[f"inputs/case{case}_mass"], meta["config"]["cases"][case]["num_dummy"])
    assert torch.equal(groups, tensors[f"outputs/case{case}_group"])


@pytest.mark.parametrize("case", [0, 1])
def test_attention_masses_are_the_originals(case):
    tensors, meta = golden("dummy_forcing_grouping")
    info = next(c for c in meta["config"]["cases"] if c.get("mass_case") == case)
    q, k, rows = (tensors[f"inputs/mass{case}_{name}"] for name in ("q", "k", "rows"))
    ours = sampled_masses(q, k, rows, 0, info["first_segment_tokens"], info["last_segment_tokens"])
    torch.testing.assert_close(ours.permute(2, 0, 1), tensors[f"outputs/mass{case}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("takes", [1, 2])
def test_attention_in_groups_is_attention_with_a_mask(heads, takes):
    random = torch.Generator().manual_seed(0)
    q = torch.randn(takes, 5, heads[0], 8, generator=random)
    k, v = (torch.randn(takes, 11, heads[1], 8, generator=random) for _ in range(2))
    bias = torch.randn(11, generator=random)
    shape = HistoryShape(2, heads[1], 8, 4, 1, 5, takes)
    masks = [torch.rand(2, takes, heads[1], generator=random) < 0.5 for _ in range(2)]
    limited = list(zip((range(0, 3), range(3, 6)), masks, strict=True))
    for layer, groups in enumerate(head_groups(limited, 11, shape, torch.device("cpu"))):
        assert sum(len(pairs) for pairs, _ in groups) == takes * heads[1]
        out = attend_in_groups(q, k, v, groups, bias=bias)
        for take in range(takes):
            for head in range(heads[0]):
                shared = head * heads[1] // heads[0]
                sees = torch.ones(11, dtype=torch.bool)
                for run, mask in limited:
                    sees[run.start : run.stop] = mask[layer, take, shared]
                expected, _ = attention(
                    q[take : take + 1, :, head : head + 1], k[take : take + 1, sees][:, :, shared : shared + 1],
                    v[take : take + 1, sees][:, :, shared : shared + 1], bias[sees],
                )  # fmt: skip
                torch.testing.assert_close(out[take, :, head].double(), expected[0, :, 0], atol=1e-6, rtol=0)


def grouped_plan(policy: DummyForcing, groups: torch.Tensor, chunks: int = 5) -> Plan:
    mass = torch.zeros(*groups.shape, 3)  # [L, H, 3]: masses that lead to these groups
    mass[..., 0] = (groups == FIRST) * 5.0
    mass[..., 1] = (groups == MIDDLE) * 5.0
    scores = {"cond": {layer: mass[layer][None] for layer in range(len(mass))}}
    blocks = tuple(Block(i, "committed", 3 * i, 3, {"full": Form(6)}) for i in range(chunks))
    table = BlockTable(blocks, (Block(chunks, "live", 3 * chunks, 3, {"full": Form(6)}),), 3 * chunks)
    return policy.plan(table, Signals(scores=scores))


def test_heads_see_the_first_frame_the_last_ones_or_the_very_last():
    groups = torch.tensor([[FIRST, MIDDLE, DUMMY, DUMMY], [MIDDLE, DUMMY, FIRST, DUMMY]])
    plan = grouped_plan(DummyForcing(), groups)
    seen = [(e.block, list(e.tokens), e.heads["cond"][:, 0].tolist()) for e in plan.entries]
    first, middle, last = ((groups == g).tolist() for g in (FIRST, MIDDLE, DUMMY))
    either = [[m or d for m, d in zip(*rows, strict=True)] for rows in zip(middle, last, strict=True)]
    assert seen == [(0, [0, 1], first), (4, [0, 1, 2, 3], middle), (4, [4, 5], either)]
    assert all(e.shift == 0 for e in plan.entries) and plan.observe == ()
    dropped = {(d.block, None if d.tokens is None else tuple(d.tokens.tolist())) for d in plan.drops}
    assert dropped == {(0, (2, 3, 4, 5)), (1, None), (2, None), (3, None)}


def test_heads_are_told_apart_once_and_stay_so():
    take = take_of(DummyForcing(), tiny_wan(layers=4, timesteps=(1000,)))
    scores = []
    for _ in range(6):
        next(take)
        scores.append({layer: m.clone() for layer, m in take.history.views["cond"].scores.items()})
    assert not scores[0] and len(scores[1]) == 4  # by the second chunk's commit pass
    for later_scores in scores[2:]:
        assert all(torch.equal(later_scores[layer], scores[1][layer]) for layer in range(4))
    assert all(torch.allclose(m.sum(-1), torch.ones(1, 2), atol=1e-5) for m in scores[1].values())


def test_every_head_attends_to_its_own_keys_and_no_others():
    take = take_of(DummyForcing(), tiny_wan(layers=3, timesteps=(1000,)))
    latents_of(take, 4)
    block = take.rollout.admit(3)
    scores = take.history.views["cond"].scores
    groups = group(torch.stack([scores[layer][0] for layer in range(3)]), 3)
    assert sorted(set(groups.flatten().tolist()) | {DUMMY}) != [DUMMY]
    random = torch.Generator().manual_seed(1)
    for layer, view in enumerate(take.history.layers("cond", block)):
        q, k, v = (torch.randn(1, 18, 2, 12, generator=random) for _ in range(3))
        out = view.attend(q, k, v)
        rotated = view.rotary.rotate(q, view.phases)
        for head in range(2):
            past = {FIRST: [range(6)], MIDDLE: [range(6, 24)], DUMMY: [range(18, 24)]}[int(groups[layer, head])]
            keys = [*past[0], *range(24, 42)]
            at = (slice(None), keys, slice(head, head + 1))
            expected, _ = attention(rotated[:, :, head : head + 1], view.k[at], view.v[at])
            torch.testing.assert_close(out[:, :, head : head + 1].double(), expected, atol=1e-6, rtol=0)
    take.history.abandon(block)


def test_the_seed_decides_which_queries_are_asked():
    def masses(seed: int) -> torch.Tensor:
        take = take_of(DummyForcing(seed=seed), tiny_wan(grid=(4, 4)))
        latents_of(take, 2)
        return torch.stack(list(take.history.views["cond"].scores.values()))

    assert torch.equal(masses(0), masses(0)) and not torch.equal(masses(0), masses(1))


# --- all of them ------------------------------------------------------------------------------------------------------

SIBLINGS = [DeepForcing(frames=11, sink=1), DummyForcing(), LongLive(9, sink=3), InfinityRope(), RollingForcing(12)]


@pytest.mark.parametrize("policy", SIBLINGS, ids=lambda p: p.name)
def test_a_constant_added_to_all_positions_changes_nothing(policy):
    options = {"timesteps": (1000,)}
    here = latents_of(take_of(policy, tiny_wan(**options)), 7)
    there = latents_of(take_of(policy, later(tiny_wan(**options), 5000)), 7)
    torch.testing.assert_close(there, here, **CLOSE)


@pytest.mark.parametrize("policy", SIBLINGS, ids=lambda p: p.name)
@pytest.mark.parametrize("mix", MIXES[1:4], ids=str)
def test_a_restored_take_goes_on_as_if_never_stopped(policy, mix, tmp_path):
    assert_restored_take_goes_on(policy, mix, decode=False, path=tmp_path / "take.safetensors")


@pytest.mark.parametrize("policy", SIBLINGS, ids=lambda p: p.name)
@pytest.mark.parametrize("frames", [11, 16, 30])
def test_a_fitted_policy_fits_and_works(policy, frames):
    host = tiny_wan(timesteps=(1000,))
    shape = history_shape(host, host.geometry())
    fitted = policy.fit(frames * shape.frame_bytes, shape)
    assert fitted.capacity(shape) <= frames * shape.tokens_per_frame
    fitted.check(shape)
    latents_of(take_of(fitted, host), 6)


@pytest.mark.parametrize("wrong", [{"top": 0}, {"frames": 0}, {"sink": -1}])
def test_deep_forcing_refuses_what_cannot_work(wrong):
    with pytest.raises(LongtakeError, match="top ≥ 1"):
        DeepForcing(**wrong)


@pytest.mark.parametrize("wrong", [{"dummy": 1.5}, {"local": 0}, {"after": 0}])
def test_dummy_forcing_refuses_what_cannot_work(wrong):
    with pytest.raises(LongtakeError, match="dummy in"):
        DummyForcing(**wrong)


def test_a_fusing_that_moves_its_survivors_is_told_from_one_that_does_not():
    history = History(HistoryShape(1, 1, 12, 4, 2, 1), wan_table(12), capacity=12, score=DeepForcing().score)
    base, step = torch.zeros(2, 3).double(), torch.tensor([[1.0, 0, 0]] * 2).double()
    for i in range(3):
        block = history.admit(i, 1, (base + i * step, step))
        history.apply(Plan())
        for view in history.layers("cond", block, write=True):
            view.attend(*(torch.randn(1, 2, 1, 12) for _ in range(3)))
        history.commit(block)
    block = history.admit(3, 1, (base + 3 * step, step))
    history.apply(Plan((Fuse((0, 1, 2), 2, per_frame=2),)))
    for view in history.layers("cond", block, write=True):
        view.attend(*(torch.randn(1, 2, 1, 12) for _ in range(3)))
    history.commit(block)
    fused = history.table().blocks[0]
    assert history.stores["cond"].held[(fused.id, "full")].head_base[..., 0].unique().tolist() == [0.0]


def test_a_window_packs_what_a_flush_has_left_without_gaps():
    policy = SlidingWindow(9, sink=1, positions="slots")
    take = take_of(policy, tiny_wan(timesteps=(1000,)))
    latents_of(take, 4)
    take.history.forget(policy.flush(take.history.table()))
    take.rollout.admit(3)
    plan = policy.plan(take.history.table(), Signals())
    frames = [b.frame + int(t) // 6 + e.shift for e in plan.entries for b in take.history.table().blocks
              if b.id == e.block for t in list(e.tokens)[::6]]  # fmt: skip
    assert frames == [9, 10, 11]  # right before the chunk at 12

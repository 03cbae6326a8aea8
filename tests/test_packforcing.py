"""PackForcing on the causal Wan host: what it shows, where, by which score, and what it holds."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from longtake import FullHistory, LongtakeError, PackForcing, PlanError, Session
from longtake.compressors import Compressor, MeanPool
from longtake.history import History
from longtake.plan import Block, BlockTable, Choose, Drop, Entry, Form, HistoryShape, Plan, Signals, pack_right
from longtake.policies import KVPolicy, describe, parse
from longtake.policies.packforcing import rows
from longtake.rope import wan_table
from longtake.session import history_shape

from .reference.packforcing import block_scores
from .test_equivalences import CLOSE, MIXES, assert_restored_take_goes_on, image, latents_of, later
from .tiny import golden, text, tiny_wan

SMALL = {"sink": 1, "recent": 1, "top_k": 2, "archive": 4}  # chooses from the 6th chunk on, forgets from the 7th
VARIANTS = {
    "sum": {},
    "level": {"score_at": "level"},
    "original": {"score_at": "original"},
    "half": {"score_by": "half"},
    "sampled": {"score_by": "sampled"},
    "mass": {"score_by": "mass"},
    "recent": {"select": "recent"},
    "sink moves": {"positions": "sink"},
    "absolute": {"positions": "absolute"},
    "shared": {"layers": "shared"},
    "offloaded": {"layers": "shared", "offload": True},
    "full": {"middle": "full"},
    "full, offloaded": {"middle": "full", "layers": "shared", "offload": True},
}


def variant(name: str) -> PackForcing:
    return PackForcing(**SMALL | VARIANTS[name])


def take_of(policy: KVPolicy, host=None, **options) -> Session:
    return Session(host or tiny_wan(), policy, **{"prompt_embeds": text(), "decode": False} | options)


@dataclass(frozen=True)
class Identity(Compressor):
    """Compresses to the chunk itself."""

    def compress(self, latents, pixels, state, model, geometry):
        return model.embed(latents), state

    def grid(self, geometry, span=None):
        return (geometry.chunk_frames if span is None else span, *geometry.grid)

    def positions(self, base, step, geometry, span):
        return base, step


# --- equivalences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_with_an_identity_compressor_and_all_blocks_it_is_full_history(residency, guidance):
    """Also what fails when the registry of blocks changes inside the first layer of a pass: deeper layers then lose the
    block that is on its way from recent to middle, from the first chunk with a middle on."""
    host = tiny_wan(layers=4, guidance=guidance)
    options = {"prompt_embeds": text(), "negative_prompt_embeds": text(seed=9), "decode": False}
    policy = PackForcing(sink=1, recent=1, top_k=9, archive=9)
    take = Session(host, policy, compressor=Identity(), residency=residency, **options)
    full = Session(host, FullHistory(), **options)
    for i in range(7):
        ours, theirs = next(take), next(full)
        torch.testing.assert_close(ours.latents, theirs.latents, **CLOSE)
        assert ours.stats.attended_tokens == theirs.stats.attended_tokens, f"chunk {i}"
    forms = [set(b.forms) for b in take.history.table().blocks]
    assert forms == [
        {"full"},
        *[{"compressed"}] * 4,
        *[{"full", "compressed"}] * 2,
    ]  # the older leaves with the next plan


def test_a_layer_that_lost_a_block_in_the_commit_pass_would_be_noticed():
    """The published bug, made on purpose: layers behind the first do not see the block that leaves the recent part."""
    host = tiny_wan(layers=4)
    take = take_of(PackForcing(sink=1, recent=1, top_k=9, archive=9), host, compressor=Identity())
    full = take_of(FullHistory(), host)
    layers = take.history.layers

    def buggy(stream, block, **options):
        views = layers(stream, block, **options)
        middle = [b for b in take.history.table().blocks if b.frame >= 3 and set(b.forms) == {"compressed"}]
        if options.get("write") and middle:
            for view in views[1:]:
                lost = slice(view.k.shape[1] - 3 * 18, view.k.shape[1] - 2 * 18)  # newest of the middle
                view.k, view.v = (torch.cat((x[:, : lost.start], x[:, lost.stop :]), 1) for x in (view.k, view.v))
                view.k_live, view.v_live = view.k[:, -18:], view.v[:, -18:]
        return views

    take.history.layers = buggy
    errors = [float((next(take).latents - next(full).latents).abs().max()) for _ in range(6)]
    assert max(errors[:4]) < 1e-5 < 1e-4 < max(errors[4:])


@pytest.mark.parametrize("name", VARIANTS)
def test_all_layers_see_the_same_history_and_all_forwards_of_a_chunk_the_same_view(name):
    take = take_of(variant(name), tiny_wan(timesteps=(1000, 700, 400)), guidance_scale=2.0,
                   negative_prompt_embeds=text(seed=9))  # fmt: skip
    forward, seen = take.host.forward, []

    def watched(x, t, stream_text, views):
        velocity = forward(x, t, stream_text, views)
        own = x.shape[2] * take.geometry.tokens_per_frame
        seen.append([(v.k[:, : v.k.shape[1] - own].clone(), v.v[:, : v.v.shape[1] - own].clone()) for v in views])
        return velocity

    take.host.forward = watched
    for _ in range(8):
        seen.clear()
        next(take)
        assert len(seen) == 4 * 2  # three steps and the commit pass, two streams
        for passes in (seen[::2], seen[1::2]):
            assert len({k.shape for k, _ in passes[0]}) == 1
            for other in passes[1:]:
                for (k, v), (k2, v2) in zip(passes[0], other, strict=True):
                    assert torch.equal(k, k2) and torch.equal(v, v2)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"absolute"}))
@pytest.mark.parametrize("constant", [1, 5000])
def test_a_constant_added_to_all_positions_changes_nothing(name, constant):
    host = tiny_wan(timesteps=(1000,))
    here = latents_of(take_of(variant(name), host), 8)
    there = latents_of(take_of(variant(name), later(tiny_wan(timesteps=(1000,)), constant)), 8)
    torch.testing.assert_close(there, here, **CLOSE)
    assert not torch.equal(there, here)


def test_moved_in_fp64_a_block_is_what_it_would_be_had_it_been_written_there():
    table = wan_table(24)
    base = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 900
    k = torch.randn(1, 7, 2, 24, generator=torch.Generator().manual_seed(1))
    moved = base + torch.tensor([37.0, 0, 0])
    again = table.rotate(table.rotate(k, table.phases(base)), table.phases(moved - base))
    torch.testing.assert_close(again, table.rotate(k, table.phases(moved)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("first", [False, True], ids=["text", "image"])
def test_resident_and_scratch_views_agree(name, first):
    host = tiny_wan(vae=True, timesteps=(1000, 500))
    options = {"prompt_embeds": text(2), "image": image() if first else None, "guidance_scale": 3.0,
               "negative_prompt_embeds": text(seed=6)}  # fmt: skip
    takes = [take_of(variant(name), host, residency=r, **options) for r in ("resident", "scratch")]
    for _ in range(8):
        torch.testing.assert_close(*(next(take).latents for take in takes), **CLOSE)


@pytest.mark.parametrize("name", VARIANTS)
def test_takes_in_lockstep_choose_for_themselves(name):
    together = latents_of(take_of(variant(name), prompt_embeds=text(2), seed=40), 8)
    for b in range(2):
        alone = latents_of(take_of(variant(name), prompt_embeds=text(2)[b : b + 1], seed=40 + b), 8)
        torch.testing.assert_close(together[b], alone, **CLOSE)


@pytest.mark.parametrize(("name", "mix"), zip(VARIANTS, [*MIXES, *MIXES], strict=False), ids=str)
def test_a_restored_take_goes_on_as_if_never_stopped(name, mix, tmp_path):
    policy = replace(variant(name), sink=0, archive=3, top_k=1)  # chooses and forgets within the first chunks
    assert_restored_take_goes_on(policy, mix, decode=False, path=tmp_path / "take.safetensors")


def test_four_frames_a_chunk_are_packed_like_three():
    host = tiny_wan(chunk_frames=4, timesteps=(1000,))
    policy = PackForcing(sink=1, recent=1, top_k=9, archive=9, middle="full")
    torch.testing.assert_close(
        latents_of(take_of(policy, host), 6), latents_of(take_of(FullHistory(), host), 6), **CLOSE
    )
    small = take_of(PackForcing(**SMALL), host)
    counts = [next(small).stats.attended_tokens for _ in range(8)]
    chunk, block = 24, small.compressor.tokens(small.geometry)
    assert block == 2 and counts == [chunk, 2 * chunk, 3 * chunk] + [3 * chunk + n * block for n in (1, 2, 2, 2, 2)]


# --- what it shows ----------------------------------------------------------------------------------------------------


def table_of(chunks: int, span: int = 3, first: int | None = None, recent: int = 1, sink: int = 1) -> BlockTable:
    """A take of `chunks` committed chunks under a policy with the whole middle kept, the next in flight."""
    blocks, frame = [], 0
    for i in range(chunks):
        length = first if first is not None and i == 0 else span
        forms = {"full": Form(6 * length)}
        if i >= sink:
            forms["compressed"] = Form(2)
            if i < chunks - recent - 1:
                del forms["full"]
        blocks.append(Block(i, "committed", frame, length, forms))
        frame += length
    return BlockTable(tuple(blocks), (Block(chunks, "live", frame, span, {"full": Form(6 * span)}),), frame)


def planned(policy: PackForcing, table: BlockTable) -> Plan:
    return policy.plan(table, Signals())


def test_sink_and_middle_are_packed_against_the_recent_chunk():
    plan = planned(PackForcing(sink=1, recent=1, top_k=2, archive=4), table_of(8))
    sink, choice, recent = plan.entries
    assert isinstance(choice, Choose) and choice.candidates == (3, 4, 5, 6) and choice.form == "compressed"
    assert choice.starts == (15.0, 18.0)  # right before frame 21, where the recent chunk begins
    assert isinstance(sink, Entry) and (sink.block, sink.shift) == (0, 12) and (recent.block, recent.shift) == (7, 0)
    forgotten = {(d.block, d.form) for d in plan.drops}
    assert forgotten == {(1, "compressed"), (2, "compressed"), (6, "full")}
    assert plan.forms == ("compressed",)


def test_while_scored_blocks_stand_where_evenly_spread_picks_would_put_them_or_level_or_where_they_were():
    choices = {
        at: planned(PackForcing(sink=1, top_k=2, archive=5, score_at=at), table_of(8)).entries[1]
        for at in ("rebased", "level", "original")
    }
    assert choices["rebased"].candidates == (2, 3, 4, 5, 6)
    assert choices["rebased"].scored_at == (15.0, 15.0, 15.0, 18.0, 18.0)
    assert choices["level"].scored_at == (18.0,) * 5
    assert choices["original"].scored_at is None


@pytest.mark.parametrize("positions", ["packed", "sink", "absolute"])
def test_positions_can_move_all_the_sink_alone_or_nothing(positions):
    policy = PackForcing(sink=1, top_k=2, archive=4, select="recent", positions=positions)
    entries = planned(policy, table_of(8)).entries
    assert [e.block for e in entries] == [0, 5, 6, 7]
    start = {0: 0, 5: 15, 6: 18, 7: 21}
    at = [start[e.block] + e.shift for e in entries]
    assert at == {"packed": [12, 15, 18, 21], "sink": [6, 15, 18, 21], "absolute": [0, 15, 18, 21]}[positions]


def test_the_figure_of_the_paper():
    """Positions 0…9 are S0 S1 M2…M7 R R; without M2 and M6: S0→2 S1→3 M3→4 M4→5 M5→6 M7→7, R stays at 8 and 9."""
    kept = [(Entry(i), i, 1) for i in (0, 1, 3, 4, 5, 7)]
    moved = [i + e.shift for i, e in zip((0, 1, 3, 4, 5, 7), pack_right(kept, 8), strict=True)]
    assert moved == [2, 3, 4, 5, 6, 7]


def test_a_first_image_counts_as_a_sink_chunk_and_never_enters_the_middle():
    for sink in (0, 1):
        plan = planned(PackForcing(sink=sink, top_k=2, archive=4), table_of(8, first=1, sink=sink))
        assert plan.entries[0].block == 0 and plan.entries[0].form == "full"
        assert 0 not in plan.entries[1].candidates


def test_covering_ends_with_the_first_compressed_block_and_with_a_whole_middle_when_it_is_full():
    cover = [PackForcing(sink=1).covers(replaced) for replaced in map(whole_table, range(5))]
    assert cover == [True, True, True, False, False]
    full = PackForcing(sink=1, middle="full", top_k=2, archive=4)
    assert [full.covers(whole_table(n)) for n in range(6)] == [True] * 5 + [False]


def whole_table(chunks: int) -> BlockTable:
    blocks = tuple(Block(i, "committed", 3 * i, 3, {"full": Form(18)}) for i in range(chunks))
    return BlockTable(blocks, (Block(chunks, "live", 3 * chunks, 3, {"full": Form(18)}),), 3 * chunks)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"recent"}))
def test_what_was_not_shown_can_be_shown_again_later(name):
    """Selection is soft: the archive keeps what a chunk did not choose."""
    take = take_of(replace(variant(name), archive=9, top_k=1), tiny_wan(timesteps=(1000,)))
    picks = picked_blocks(take, 14)
    assert any(picks[i][layer] != picks[i + 1][layer] for i in range(len(picks) - 1) for layer in range(3))


def picked_blocks(take: Session, chunks: int) -> list[list[tuple[int, ...]]]:
    """Per chunk with an open choice and layer, the ids of the blocks that were picked for the first take."""
    result = []

    def look(session, step, timestep, given):
        if step == len(session.schedule.timesteps) - 1:
            for choice in session.history.chosen():
                result.append([tuple(c[i] for i in at[0].tolist()) for _, (c, at) in sorted(choice.items())])

    take.callback_on_step_end = look
    for _ in range(chunks):
        next(take)
    return result


def test_layers_choose_each_or_together():
    each = picked_blocks(take_of(PackForcing(sink=1, top_k=3, archive=12), tiny_wan(layers=4)), 14)
    shared = picked_blocks(take_of(PackForcing(sink=1, top_k=3, archive=12, layers="shared"), tiny_wan(layers=4)), 14)
    assert any(len(set(chunk)) > 1 for chunk in each)
    assert all(len(set(chunk)) == 1 for chunk in shared)
    assert all(list(pick) == sorted(pick) for chunk in each + shared for pick in chunk)


# --- the score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 37, -2.5])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_the_factorised_score_is_the_double_sum(shift, heads):
    """In fp64, of keys where they were written and of keys moved together."""
    queries, keys = heads
    random = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 40, queries, 12, generator=random), torch.randn(2, 5, 7, keys, 12, generator=random)
    turn = wan_table(12).phases(torch.tensor([[float(shift), 0, 0]]))
    policy = PackForcing()
    sums = wan_table(12).rotate(k.sum(2), turn)
    moved = wan_table(12).rotate(k.flatten(1, 2), turn).unflatten(1, (5, 7))
    torch.testing.assert_close(policy.score(q, sums), block_scores(q, moved).float(), atol=2e-4, rtol=1e-5)
    assert policy.score(q, sums).argsort().tolist() == block_scores(q, moved).argsort().tolist()


def test_half_the_heads_and_a_subsample_of_the_queries_are_the_published_score():
    tensors, _ = golden("packforcing_unofficial_rope_shift")
    q, keys = tensors["inputs/score_q"], tensors["inputs/score_keys"]
    assert rows(q.shape[1]) == tensors["outputs/score_query_rows"].tolist()
    ours = PackForcing(score_by="sampled").score(q, keys.sum(2))  # a sum, the published one is a mean
    mean = ours / (len(rows(q.shape[1])) * keys.shape[2] * max(1, keys.shape[3] // 2))
    torch.testing.assert_close(mean, tensors["outputs/block_scores"], atol=1e-6, rtol=0)
    assert not torch.allclose(PackForcing().score(q, keys.sum(2)) / 290, tensors["outputs/block_scores"], atol=1e-3)


def test_the_mass_of_a_block_is_its_share_of_the_softmax_over_the_middle():
    random = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 9, 2, 12, generator=random), torch.randn(2, 20, 2, 12, generator=random)
    mass = PackForcing(score_by="mass").score(q, k)
    dense = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 12**-0.5).softmax(-1).mean(2).sum(1)
    torch.testing.assert_close(mass, dense)
    torch.testing.assert_close(mass.sum(1), torch.full((2,), 2.0))


class Spied(PackForcing):
    """Remembers what it was asked to score, and what it answered."""

    name = ""

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        answer = super().score(q, k)
        asked.append((q, k, answer))
        return answer


asked: list[tuple[Tensor, Tensor, Tensor]] = []


@pytest.mark.parametrize("evidence", ["sum", "mass"])
def test_the_history_scores_blocks_where_they_stand_while_scored(evidence):
    """Key sums kept since the commit, turned to the place of scoring, equal the sums of keys rotated there anew."""
    asked.clear()
    take = take_of(Spied(**SMALL, score_by=evidence), tiny_wan(timesteps=(1000,)))
    for _ in range(6):
        next(take)
    asked.clear()
    block = take.rollout.admit(3)
    plan = take.policy.plan(take.history.table(), take.history.signals())
    choice = next(e for e in plan.entries if isinstance(e, Choose))
    q = torch.randn(1, 18, 2, 12, generator=torch.Generator().manual_seed(0))
    views = take.history.layers("cond", block)
    for view in views:
        view.attend(q, q, q)
    store, rotary = take.history.stores["cond"], take.history.rotary
    assert len(asked) == 3
    for layer, (_, keys, answer) in enumerate(asked):
        expected = []
        for number, candidate in enumerate(choice.candidates):
            at = store.held[(candidate, "compressed")].rows
            frame = next(b.frame for b in take.history.table().blocks if b.id == candidate)
            place = store.base[at] + (choice.scored_at[number] - frame) * store.step[at]
            expected.append(rotary.rotate(store.k[layer][:, at], rotary.phases(place)))
        expected = torch.cat(expected, 1) if evidence == "mass" else torch.stack([k.sum(1) for k in expected], 1)
        torch.testing.assert_close(keys, expected, atol=2e-6, rtol=0)
        worth = answer if evidence == "sum" else answer.unflatten(1, (4, -1)).sum(2)
        assert take.history.chosen()[0][layer][1][0].tolist() == sorted(worth[0].topk(2).indices.tolist())
    take.history.abandon(block)


def test_a_shared_choice_sums_the_layers_scores_of_the_last_chunks_queries():
    take = take_of(PackForcing(**SMALL, layers="shared"), tiny_wan(timesteps=(1000,)))
    queries: dict[int, Tensor] = {}
    layers = take.history.layers

    def watched(stream, block, **options):
        views = layers(stream, block, **options)
        if options.get("write") and options.get("form", "full") == "full":
            for layer, view in enumerate(views):
                attend = view.attend
                view.attend = lambda q, *a, _l=layer, _a=attend, **kw: (
                    queries.__setitem__(_l, q.clone()),
                    _a(q, *a, **kw),
                )[1]
        return views

    take.history.layers = watched
    for _ in range(6):
        next(take)
    last = dict(queries)
    block = take.rollout.admit(3)
    (choice,) = take.history.chosen()
    plan = take.policy.plan(take.history.table(), take.history.signals())
    entry = next(e for e in plan.entries if isinstance(e, Choose))
    positions, _ = take.host.positions(take.geometry, take.frame, 3)  # as though they stood where the new chunk stands
    store, rotary, total = take.history.stores["cond"], take.history.rotary, 0
    for layer in range(3):
        q = rotary.rotate(last[layer], rotary.phases(positions))
        keys = []
        for number, candidate in enumerate(entry.candidates):
            at = store.held[(candidate, "compressed")].rows
            frame = next(b.frame for b in take.history.table().blocks if b.id == candidate)
            place = store.base[at] + (entry.scored_at[number] - frame) * store.step[at]
            keys.append(rotary.rotate(store.k[layer][:, at], rotary.phases(place)))
        total = total + block_scores(q, torch.stack(keys, 1))
    expected = sorted(total[0].topk(2).indices.tolist())
    assert {tuple(at[0].tolist()) for _, at in choice.values()} == {tuple(expected)}
    take.history.abandon(block)


# --- goldens ----------------------------------------------------------------------------------------------------------


def test_shifted_keys_equal_the_published_ones():
    tensors, meta = golden("packforcing_unofficial_rope_shift")
    table = wan_table(meta["config"]["head_dim"])
    cached, raw = tensors["inputs/cached_keys"], tensors["inputs/raw_keys"]
    rows_, columns = meta["config"]["grid_hw"]
    axes = [torch.arange(n).double() for n in (meta["config"]["span"], rows_, columns)]
    base = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    for target, shifted in zip(tensors["inputs/target_starts"].tolist(), tensors["outputs/shifted_keys"], strict=True):
        delta = torch.tensor([[float(target - int(tensors["inputs/origin_start"])), 0, 0]])
        turned = table.rotate(cached, table.phases(delta).expand(cached.shape[1], -1, -1))
        torch.testing.assert_close(turned[0], shifted, atol=2e-6, rtol=0)
        anew = table.rotate(raw, table.phases(base + torch.tensor([float(target), 0, 0])))
        torch.testing.assert_close(anew[0], shifted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("layout", range(4))
def test_packed_starts_and_keys_equal_the_published_ones(layout):
    tensors, meta = golden("packforcing_unofficial_rope_shift")
    given = {name: tensors[f"inputs/layout{layout}_{name}"] for name in ("start", "span", "tokens", "anchor", "keys")}
    starts, spans = given["start"].tolist(), given["span"].tolist()
    kept = [(Entry(i), start, span) for i, (start, span) in enumerate(zip(starts, spans, strict=True))]
    shifts = [entry.shift for entry in pack_right(kept, int(given["anchor"]))]
    assert shifts == tensors[f"outputs/layout{layout}_delta"].tolist()
    assert [a + b for a, b in zip(starts, shifts, strict=True)] == tensors[
        f"outputs/layout{layout}_packed_start"
    ].tolist()
    table = wan_table(meta["config"]["head_dim"])
    delta = torch.tensor(shifts, dtype=torch.float64).repeat_interleave(given["tokens"])
    position = torch.stack((delta, delta * 0, delta * 0), -1)
    torch.testing.assert_close(
        table.rotate(given["keys"], table.phases(position)), tensors[f"outputs/layout{layout}_keys"], atol=2e-6, rtol=0
    )


# --- what it holds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("first", [False, True], ids=["text", "image"])
def test_a_take_never_holds_or_shows_more_than_promised(name, first):
    policy = variant(name)
    host = tiny_wan(vae=True, timesteps=(1000,))
    take = take_of(policy, host, image=image() if first else None)
    shape = take.history.shape
    away, _ = policy.offloaded(shape)
    for _ in range(10):
        chunk = next(take)
        for store in take.history.stores.values():
            assert int(store.used.sum()) <= store.size == policy.capacity(shape)
        for archive in take.history.archives.values():
            assert int(archive.used.sum()) <= archive.size == away
        assert chunk.stats.attended_tokens <= policy.visible(shape)
    assert take.history.memory().get("archive", 0) == away * (shape.token_bytes + 6 * 8)
    middle = policy.parts(take.history.table())[1]
    assert len(middle) <= policy.archive + 1


def test_the_archive_has_a_hard_cap_in_bytes():
    host = tiny_wan()
    shape = history_shape(host, host.geometry())
    block = shape.compressed_tokens * shape.token_bytes
    assert PackForcing(archive_bytes=5 * block + block // 2).settle(shape).archive == 5
    assert PackForcing(archive_bytes=0).settle(shape).archive == 0
    with pytest.raises(LongtakeError, match=f"archive_bytes=10 hold no block of the middle: give {block} bytes"):
        PackForcing(archive_bytes=10).settle(shape)
    with pytest.raises(LongtakeError, match="archive_bytes=-1: give 0 bytes or more"):
        PackForcing(archive_bytes=-1)
    take = take_of(PackForcing(sink=1, archive_bytes=3 * block), tiny_wan(timesteps=(1000,)))
    latents_of(take, 10)
    assert take.policy.archive == 3
    assert sum(set(b.forms) == {"compressed"} for b in take.history.table().blocks) == 3


def test_offloaded_blocks_come_back_bit_for_bit():
    """Host memory and back: the same latents as with the archive on the device, to the bit; and the same rows."""
    for middle in ("compressed", "full"):
        policy = PackForcing(**SMALL, layers="shared", middle=middle)
        takes = [take_of(p, tiny_wan(timesteps=(1000,))) for p in (policy, replace(policy, offload=True))]
        for _ in range(9):
            assert torch.equal(*(next(take).latents for take in takes))
        here, away = takes[0].history.stores["cond"], takes[1].history.archives["cond"]
        assert away.held and away.k.device.type == "cpu"
        for key, held in away.held.items():
            at = here.held[key].rows
            assert torch.equal(here.k[:, :, at], away.k[:, :, held.rows])
            assert torch.equal(here.v[:, :, at], away.v[:, :, held.rows])
            assert key not in takes[1].history.stores["cond"].held
        assert takes[1].memory()["store"] < takes[0].memory()["store"]


def test_a_choice_among_blocks_in_host_memory_must_be_shared():
    shape = HistoryShape(1, 1, 12, 4, 2, 1)
    history = History(shape, wan_table(12), capacity=8, offloaded=(8, 8), key_sums=True, score=PackForcing().score)
    for i in range(3):
        base = torch.zeros(2, 3).double()
        block = history.admit(i, 1, (base, base))
        history.apply(Plan(away=((0, "full"), (1, "full")) if i == 2 else ()))
        for view in history.layers("cond", block, write=True):
            view.attend(*(torch.zeros(1, 2, 1, 12) for _ in range(3)))
        history.commit(block)
    history.admit(3, 1, (torch.zeros(2, 3).double(),) * 2)
    with pytest.raises(PlanError, match="shared=True"):
        history.apply(Plan((Choose((0, 1), 1),)))


def test_blocks_cannot_move_to_host_memory_that_was_not_asked_for():
    history = History(HistoryShape(1, 1, 12, 4, 2, 1), wan_table(12), capacity=8)
    base = torch.zeros(2, 3).double()
    block = history.admit(0, 1, (base, base))
    with pytest.raises(PlanError, match="offloaded"):
        history.apply(Plan(away=((block, "full"),)))


@pytest.mark.parametrize("frames", [10, 12, 16, 24, 40, 100])
@pytest.mark.parametrize("options", [{}, {"middle": "full"}, {"layers": "shared", "offload": True}], ids=str)
def test_a_fitted_policy_fits_and_works(frames, options):
    host = tiny_wan(timesteps=(1000,))
    shape = history_shape(host, host.geometry())
    budget = frames * shape.frame_bytes
    policy = PackForcing(**options).fit(budget, shape)
    assert policy.capacity(shape) * shape.token_bytes <= budget
    policy.check(shape)
    latents_of(take_of(policy, host), 6)
    larger = PackForcing(**options).fit(2 * budget, shape)
    assert (larger.sink, larger.recent + larger.archive) >= (policy.sink, policy.recent + policy.archive)


@pytest.mark.parametrize(("frames", "training", "shown"), [(15, None, 16), (15, 21, 3), (24, 60, 14), (24, 9, 1)])
def test_a_fitted_policy_shows_no_more_blocks_than_stand_within_a_training_clip(frames, training, shown):
    shape = HistoryShape(1, 1, 4, 4, tokens_per_frame=64, chunk_frames=3, training_frames=training, compressed_tokens=4)
    policy = PackForcing().fit(frames * shape.frame_bytes, shape)
    assert policy.top_k == shown and policy.archive > 16
    if training == 60:
        assert (policy.sink + policy.top_k + policy.recent + 1) * 3 == training


def test_a_budget_below_a_chunk_and_its_predecessor_is_refused_with_what_would_do():
    host = tiny_wan()
    shape = history_shape(host, host.geometry())
    with pytest.raises(LongtakeError, match=r"\d+ bytes: packforcing needs \d+ bytes"):
        PackForcing().fit(6 * shape.frame_bytes, shape)


def test_a_take_of_known_length_holds_no_more_than_it_can_use():
    shape = HistoryShape(2, 2, 12, 4, 6, 3, frames=12, compressed_tokens=2)
    assert PackForcing(sink=1).capacity(shape) == 3 * 18 + 2 * 2 + 1 * 2
    assert PackForcing(sink=1).capacity(replace(shape, frames=6)) == 2 * 18 + 2 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink": -1}, "sink=-1: give 0 chunks or more"),
        ({"middle": "small"}, "middle='small': use compressed or full"),
        ({"score_by": "max"}, "use sum or half or sampled or mass"),
        ({"offload": True}, "layers=shared"),
        ({"layers": "shared", "score_by": "mass"}, "layers=each"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_in_one_line(options, message):
    with pytest.raises(LongtakeError, match=message) as error:
        PackForcing(**options)
    assert "\n" not in str(error.value)


def test_without_a_compressor_it_says_what_to_do():
    with pytest.raises(LongtakeError, match="middle=full"):
        PackForcing().check(HistoryShape(1, 1, 2, 4, 6, 3))


def test_it_is_named_and_built_on_the_command_line():
    policy = parse("packforcing:sink=1,top_k=8,archive_bytes=1000,layers=shared,offload=true")
    assert policy == PackForcing(sink=1, top_k=8, archive_bytes=1000, layers="shared", offload=True)
    assert json.loads(json.dumps(describe(policy)))[0] == "packforcing"


def test_compressors_stand_where_they_say():
    host = tiny_wan(grid=(8, 8), chunk_frames=4, timesteps=(1000,))
    takes = [
        take_of(PackForcing(**SMALL), host, compressor=MeanPool(where=w)) for w in ("midpoint", "raster", "phasor")
    ]
    first, *others = [latents_of(take, 4) for take in takes]
    assert all(torch.equal(first[:, :12], x[:, :12]) and not torch.equal(first, x) for x in others)
    base = takes[0].history.stores["cond"].base[takes[0].history.stores["cond"].held[(1, "compressed")].rows]
    assert base.tolist() == [[4 + t, y, x] for t in (1, 3) for y in (2, 6) for x in (2, 6)]


def test_what_is_forgotten_of_the_middle_is_the_oldest():
    table = table_of(9)
    plan = planned(PackForcing(sink=1, top_k=2, archive=3), table)
    assert {d.block for d in plan.drops if isinstance(d, Drop) and d.form == "compressed"} == {1, 2, 3, 4}

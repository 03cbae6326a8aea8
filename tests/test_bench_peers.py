"""`longtake bench peers`: peers compute what they are said to compute, and both sides are matched."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from longtake import FullHistory, LongtakeError, Session, SlidingWindow
from longtake.cli import app
from longtake.evaluate import bench_peers, bench_suite
from longtake.evaluate.bench_flowcache_kv import explicit_score
from longtake.evaluate.bench_peer_caches import CachedTake, Growing, Shifted
from longtake.evaluate.bench_peer_pipelines import AnyFlow, available
from longtake.evaluate.bench_peers import run
from longtake.evaluate.bench_report import Missing
from longtake.evaluate.bench_shapes import SHAPES
from longtake.policies import FlowCacheKV

pytestmark = pytest.mark.usefixtures("quick", "idle")

MICRO, CPU = SHAPES["cpu-micro"], torch.device("cpu")


@pytest.fixture(scope="module")
def host():
    made = MICRO.host(CPU, torch.float32, 0)
    with torch.no_grad():
        torch.manual_seed(0)
        for p in made.transformer.parameters():  # far from the tiny initial weights, which hardly look at the past
            p.add_(0.15 * torch.randn_like(p))
    return made


EMBEDS = torch.randn(1, MICRO.text_tokens, MICRO.text_dim, generator=torch.Generator().manual_seed(3))


def chunks(host, policy, count=8, residency="resident"):
    take = Session(host, policy, prompt_embeds=EMBEDS, seed=4, decode=False, residency=residency, chunks=count)
    return torch.stack([chunk.latents for chunk in take])


def cached(host, cache, count=8):
    take = CachedTake(host, EMBEDS, 4, cache)
    return torch.stack([next(take) for _ in range(count)]), take


def shifted(host):
    frame = MICRO.chunk_tokens // MICRO.chunk_frames
    return Shifted(host.rotary, (1, 9 * frame, host.kv_heads, host.head_dim), 3 * frame, torch.empty(0))


def test_the_growing_cache_makes_the_video_of_full_history(host):
    theirs, take = cached(host, lambda: Growing(host.rotary))
    torch.testing.assert_close(theirs, chunks(host, FullHistory(), residency="alias"), atol=1e-5, rtol=1e-5)
    assert take.attended == 8 * MICRO.chunk_tokens
    assert take.nbytes == 8 * MICRO.chunk_tokens * 2 * 2 * 24 * 4  # K and V, layers, channels, bytes


def test_the_shifted_window_makes_the_video_of_the_window(host):
    theirs, take = cached(host, lambda: shifted(host))
    ours = chunks(host, SlidingWindow(9, sink=3))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[-1], chunks(host, FullHistory())[-1], atol=1e-3)  # the past does matter
    assert take.attended == 9 * 4 and take.nbytes == 9 * 4 * 2 * 2 * 24 * 4


def test_anyflow_through_sdpa_is_the_same_pipeline():
    pytest.importorskip("diffusers.models.transformers.transformer_anyflow_far")
    videos = [AnyFlow(MICRO, CPU, torch.float32, 1, 5, sdpa).video() for sdpa in (False, True)]
    torch.testing.assert_close(*videos, atol=1e-4, rtol=1e-4)
    assert videos[0].shape == (1, 4, 15, 4, 4)


def test_anyflow_is_timed_by_chunk_and_its_tokens_and_bytes_are_those_it_allocates():
    pytest.importorskip("diffusers.models.transformers.transformer_anyflow_far")
    peer = AnyFlow(MICRO, CPU, torch.float32, 1, 6)
    seen, allocated = [], []

    def look(module, args, options):
        cache, flag = options["kv_cache"], options["kv_cache_flag"]
        allocated[:] = [sum(t.nbytes for t in cache.values())]
        if not flag["is_cache_step"]:
            past = flag["num_cached_compressed_tokens"] + flag["num_cached_full_tokens"]
            seen.append(past + options["hidden_states"].shape[1])

    peer.model.blocks[0].attn1.register_forward_pre_hook(look, with_kwargs=True)
    found = peer.take()
    assert len(found.seconds) == 5 and min(found.seconds) > 0
    assert found.attended == seen[:: len(MICRO.timesteps)][:5]
    assert peer.nbytes == MICRO.layers * allocated[0]
    assert found.flops[-1] > found.flops[2]  # what it writes anew grows


def test_the_explicit_score_is_the_streamed_one():
    policy = FlowCacheKV(frame_tokens=4, chunk_tokens=12)
    q, k = torch.randn(1, 12, 2, 8), torch.randn(1, 36, 2, 8)
    torch.testing.assert_close(policy.score(q, k), explicit_score(q, k, policy.mix, policy.pool), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def by_tokens():
    return run("cpu-micro", chunks=5, repeats=2)


def test_every_peer_has_its_pair_or_a_reason(by_tokens):
    told = {p.peer for p in by_tokens.pairs} | {m.what for m in by_tokens.missing}
    assert told >= bench_peers.PEERS.keys()
    assert Missing("gpu-wan-1.3b", "needs a cuda device, this run was on cpu") in by_tokens.missing
    for pair in by_tokens.pairs:
        ratio = by_tokens.figure(f"{pair.peer}: peer / ours, whole")
        both = zip(pair.theirs.whole, pair.ours.whole, strict=True)
        assert ratio.n == 2 and ratio.values == tuple(a / b for a, b in both)
        assert len(pair.theirs.seconds) == len(pair.ours.seconds) == 2
    assert {"growing", "shifted", "skyreels", "scoring"} <= {p.peer for p in by_tokens.pairs}, by_tokens.missing


def test_at_equal_tokens_both_sides_see_as_much_at_the_end(by_tokens):
    for pair in by_tokens.pairs:
        frame = 4
        theirs, ours = pair.theirs.attended[-1], pair.ours.attended[-1]
        assert theirs - frame < ours <= theirs, pair.peer  # whole frames of a window, against any number of tokens
    pair = next(p for p in by_tokens.pairs if p.peer == "shifted")
    assert pair.theirs.attended == pair.ours.attended == [12, 24, 36, 36, 36]
    growing = next(p for p in by_tokens.pairs if p.peer == "growing")
    assert growing.theirs.attended == growing.ours.attended == [12, 24, 36, 48, 60]
    assert growing.theirs.flops == growing.ours.flops


def test_the_asynchronous_pipeline_computes_more_because_it_keeps_no_keys(by_tokens):
    pair = next(p for p in by_tokens.pairs if p.peer == "skyreels")
    assert pair.theirs.flops[0] > pair.ours.flops[0] > 0


def test_at_equal_bytes_ours_holds_no_more_than_the_peer(tmp_path):
    command = ["bench", "peers", "--shape", "cpu-micro", "--chunks", "8", "--repeats", "2", "--match", "bytes",
               "--peer", "growing", "--peer", "skyreels", "--out", str(tmp_path), "--json"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = bench_suite.read(tmp_path / "peers-bytes-cpu.json")
    assert report.as_dict() == json.loads(result.stdout)
    (pair,) = report.pairs
    assert 0.7 * pair.theirs.held_bytes < pair.ours.held_bytes <= pair.theirs.held_bytes
    assert [m.what for m in report.missing] == ["gpu-wan-1.3b", "skyreels"]
    assert "keeps no K/V" in report.missing[1].reason
    assert "| growing: our host, torch.cat |" in report.markdown() and "| skyreels |" in report.markdown()
    assert (tmp_path / "peers-bytes-cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_a_peer_that_this_diffusers_lacks_is_a_missing_row(monkeypatch):
    with pytest.raises(LongtakeError, match=r"diffusers \S+ has no NoSuchPipeline"):
        available("NoSuchPipeline")
    monkeypatch.setitem(bench_peers.PEERS, "anyflow", lambda bench: available("NoSuchPipeline"))
    broken = lambda: {}["scheduler"]
    monkeypatch.setitem(bench_peers.PEERS, "skyreels", lambda bench: ("theirs", "ours", (broken, broken)))
    report = run("cpu-micro", peers=["anyflow", "skyreels"], chunks=4, repeats=2)
    assert not report.pairs and [m.what for m in report.missing] == ["gpu-wan-1.3b", "anyflow", "skyreels"]
    assert "has no NoSuchPipeline" in report.missing[1].reason
    assert report.missing[2].reason == "it does not run here, KeyError: 'scheduler'"
    assert "NoSuchPipeline" in report.text() and report.pictures() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ("golf",)}, "peer 'golf': use one of growing, shifted"),
        ({"match": "seconds"}, "match 'seconds': use tokens or bytes"),
        ({"chunks": 2}, "at least 4 chunks"),
        ({"shape": "nosuch"}, "no shape 'nosuch'"),
    ],
)
def test_wrong_requests_say_what_would_do(options, message):
    with pytest.raises(LongtakeError, match=message):
        run(**{"shape": "cpu-micro", **options})

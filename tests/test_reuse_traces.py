"""`longtake analyze reuse` and `longtake bench flowcache-kv`: what they find, and that they tell the truth about it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from longtake import FlowCacheReuse, LongtakeError
from longtake.cli import app
from longtake.evaluate.bench_flowcache_kv import compressed, explicit_score, run
from longtake.evaluate.peak import PeakBytes
from longtake.evaluate.reuse_traces import ReuseReport, measure
from longtake.policies.flowcache_kv import importance, pooled, redundancy
from longtake.reuse import Decision
from longtake.reuse.theory import magi_levels, relative_l1

from .skyreels import tiny_skyreels
from .tiny import text, tiny_wan


def report(changes: list[float], levels: list[float], **fields) -> ReuseReport:
    moved = tuple(
        Decision(0, k, 0.0, None if k == 0 else changes[k - 1], 0.0, False, "") for k in range(len(levels) - 1)
    )
    defaults = {"model": "m", "reuse": "r", "metric": "latent", "levels": tuple(levels), "renoised": False}
    defaults |= {"moved": (moved,), "decided": (moved,), "settings": {}, "provenance": {}}
    return ReuseReport(**defaults | fields)


@pytest.mark.parametrize("s", [0.4, 1.0, 2.5])
def test_the_fit_finds_the_deviation_of_gaussian_data(s):
    levels = magi_levels(64)
    found = report(relative_l1(levels, s), levels).fit()
    assert found[0] == pytest.approx(s, rel=0.02) and found[1] > 0.999
    assert report(relative_l1(levels, s), levels, metric="timestep").fit() is None
    assert report(relative_l1(levels, s), levels, renoised=True).fit() is None


def test_traces_of_a_take(tmp_path):
    host = tiny_wan(timesteps=(1000, 800, 600, 400, 200), prompts=("x",))
    reuse = FlowCacheReuse(1.0, "timestep", warmup=1, last="chunk", rescale="identity")
    found = measure(host, reuse=reuse, chunks=2, prompt_embeds=text())
    assert found.renoised and found.metric == "timestep" and found.changes().shape == (2, 4)
    assert not any(d.reused for chunk in found.moved for d in chunk)
    assert 0 < found.reused < 1
    written = found.write(tmp_path)
    assert {p.name for p in written} == {
        "reuse.json", "reuse-moves.png", "reuse-decisions.png", "reuse-criterion.png"
    }  # fmt: skip
    told = json.loads((tmp_path / "reuse.json").read_text())
    assert told["relative_l1"] == found.changes().tolist() and told["fit"] is None
    assert told["steepest_power"]["1"] == pytest.approx(0.8284, abs=1e-4)
    assert [d["reused"] for d in told["decisions"][0]] == [d.reused for d in found.decided[0]]
    assert "fresh noise" in found.text()
    with pytest.raises(LongtakeError, match="measures nothing"):
        measure(host, reuse="none", prompt_embeds=text())


def test_traces_of_several_chunks_in_flight(tmp_path):
    host = tiny_skyreels()
    reuse = FlowCacheReuse(0.4, "latent", warmup=1, last="chunk", rescale="identity")
    embeds = {name: torch.randn(1, 7, 10) for name in ("prompt_embeds", "negative_prompt_embeds")}
    found = measure(host, reuse=reuse, chunks=3, **embeds)
    assert not found.renoised and found.metric == "latent" and found.changes().shape == (3, 5)
    assert len(found.levels) == 7 and found.levels[0] > found.levels[-1] == 0
    assert 0 < found.reused < 1 and all(len(chunk) == 6 for chunk in found.decided)
    told = json.loads(next(p for p in found.write(tmp_path) if p.suffix == ".json").read_text())
    assert told["fit"] is not None, "where x follows the velocity, the closed form can be fitted"


def test_the_command_traces_the_embedded_model(tmp_path):
    args = ["analyze", "reuse", "--chunks", "2", "--reuse", "flowcache:fast", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["analysis"] == "reuse" and len(told["relative_l1"]) == 2


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_both_ways_of_scoring_say_the_same():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 20, 6, 8, generator=g), torch.randn(2, 50, 2, 8, generator=g)
    ours = 0.07 * pooled(importance(q, k), 7) - 0.93 * redundancy(k)
    torch.testing.assert_close(ours, explicit_score(q, k, 0.07, 7), rtol=0, atol=1e-7)


def test_peak_bytes_counts_what_is_alive_at_once():
    x = torch.ones(1000)
    with PeakBytes() as watch:
        y = x + 1  # 4000 bytes
        del y
        z = x.double()  # 8000, while nothing else is alive
        w = z[:10] + 0  # a view, and 80
        x.add_(1)  # in place: nothing
    assert watch.peak == 8080
    assert w.shape == (10,)


def test_streaming_needs_a_fraction_of_the_memory_of_whole_matrices():
    """At 4096 keys: logits of one head and the cosine matrix are 67 MB each; streamed, what `transient` allows."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1024, 6, 16, generator=g), torch.randn(1, 4096, 2, 16, generator=g)
    with PeakBytes() as streamed:
        0.07 * pooled(importance(q, k, transient=4 << 20), 7) - 0.93 * redundancy(k)
    with PeakBytes() as explicit:
        explicit_score(q, k, 0.07, 7)
    assert streamed.peak < 8 << 20 and explicit.peak > 64 << 20


def test_what_is_timed_keeps_the_best_tokens_of_every_head_in_order():
    g = torch.Generator().manual_seed(0)
    score, k, v = torch.randn(1, 2, 9, generator=g), *(torch.randn(1, 9, 2, 3, generator=g) for _ in range(2))
    kept, keys, values = compressed(score, k, v, 4)
    for head in range(2):
        best = sorted(sorted(range(9), key=lambda i, h=head: -score[0, h, i])[:4])
        assert kept[0, head].tolist() == best
        assert torch.equal(keys[0, :, head], k[0, best, head]) and torch.equal(values[0, :, head], v[0, best, head])


def test_the_benchmark_reports_and_checks(tmp_path):
    found = run("micro", pairs=2, device="cpu", dtype="float32", force=True, progress=lambda *_: None)
    path = found.write(tmp_path, "kv")[0]
    told = json.loads(path.read_text())
    assert told["common_survivors"] == 1.0 and set(told["transient_bytes"]) == {"streamed", "explicit"}
    counts = {f["name"]: f["n"] for f in told["figures"]}
    assert counts == {"streamed, per layer": 3, "explicit, per layer": 2, "explicit / streamed": 2}
    streamed, explicit, factors = (f["values"] for f in told["figures"])
    assert factors == pytest.approx([2 * explicit[i] / (streamed[i] + streamed[i + 1]) for i in (0, 1)], rel=1e-4)
    assert "GB above" in found.text()
    assert all("2 runs of the explicit way" in said for said in (found.text(), found.markdown()))
    assert found.targets[-1].found == f"{min(factors):.3g}"
    for wrong in ({"shape": "big"}, {"pairs": 0}, {"dtype": "int8"}):
        with pytest.raises(LongtakeError):
            run(**{"shape": "micro", "force": True} | wrong)


def test_the_benchmark_is_on_the_command_line(tmp_path):
    args = ["bench", "flowcache-kv", "--shape", "micro", "--pairs", "1", "--device", "cpu", "--force", "--json"]
    result = CliRunner().invoke(app, [*args, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["benchmark"] == "flowcache-kv"

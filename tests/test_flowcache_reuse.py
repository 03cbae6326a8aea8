"""Reuse policies: the published decisions, what they leave bitwise alone, and the published mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from longtake import (
    FlowCacheReuse,
    FullHistory,
    LongtakeError,
    NoReuse,
    ReplayReuse,
    Session,
    SlidingWindow,
    TeaCacheReuse,
)
from longtake.cli import app
from longtake.hosts.reusable import timestep_feature
from longtake.named import spec as specification
from longtake.reuse import PRESETS, Change, ReuseRun, ReuseState, Turn, parse, read_log, write_log
from longtake.reuse.presets import POLYNOMIALS, rescaled
from longtake.reuse.registry import build, describe

from .skyreels import tiny_skyreels
from .tiny import text, tiny_wan

GOLDENS = Path(__file__).parent / "goldens"
COMPUTED, REUSED, PARTIAL = 1, 2, 3


@pytest.fixture(scope="module")
def golden():
    path = GOLDENS / "flowcache_chunk_policy.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    return load_file(path), about


def flowcache(**options) -> FlowCacheReuse:
    settings = {"threshold": 0.1, "metric": "latent", "warmup": 0, "last": "take", "rescale": "identity"}
    return FlowCacheReuse(**settings | options)


def turn(chunk: int, index: int, steps: int, last: bool = False) -> Turn:
    return Turn(chunk, index, steps, 1000 * (1 - index / steps), 1 - index / steps, 1 - (index + 1) / steps, last)


def drive(policy, features, window, steps) -> tuple[torch.Tensor, torch.Tensor]:
    """Decisions and accumulators [step, chunk] of a policy fed with recorded features [step, chunk, …]."""
    states: dict[int, ReuseState] = {}
    shared, before = ReuseState(), {}
    decision = torch.zeros(features.shape[:2], dtype=torch.uint8)
    accumulator = torch.zeros(features.shape[:2], dtype=torch.float64)
    for row, (first, end) in enumerate(window.tolist()):
        active = range(first, end)
        turns = [turn(c, states.setdefault(c, ReuseState()).done, steps, row == len(features) - 1) for c in active]
        pairs = {c: (features[row, c][None], before[c][None]) for c in active if c in before}
        changes = dict(zip(pairs, Change.between(list(pairs.values())), strict=True))
        decided = policy.decide(turns, [states[c] for c in active], [changes.get(c) for c in active], shared)
        before = {c: features[row, c] for c in active}
        for c, d in zip(active, decided, strict=True):
            decision[row, c] = REUSED if d.reused else COMPUTED
            accumulator[row, c] = d.accumulator
            states[c].done += 1
        shared_reason = {d.reason for d in decided}
        if "entered" in shared_reason:
            decision[row, active[0] : active[-1] + 1][decision[row, active[0] : active[-1] + 1] == COMPUTED] = PARTIAL
    return decision, accumulator


def runs(kind: str) -> list[dict]:
    with safe_open(GOLDENS / "flowcache_chunk_policy.safetensors", "pt") as file:
        return json.loads(file.metadata()[kind])


@pytest.mark.parametrize("run", runs("chunkwise_runs"), ids=lambda run: run["key"])
def test_chunkwise_decisions_are_the_published_ones(golden, run):
    tensors, about = golden
    sizes = {s["name"]: s for s in json.loads(about["config"])["sets"]}[run["set"]]
    features, window = tensors[f"{run['set']}/features"], tensors[f"{run['set']}/active_window"]
    policy = flowcache(threshold=run["threshold"], warmup=run["warmup"])
    decision, accumulator = drive(policy, features, window, sizes["steps"])
    assert torch.equal(decision, tensors[f"{run['key']}/decision"])
    want = tensors[f"{run['key']}/accumulator"]
    reused = decision == REUSED
    torch.testing.assert_close(accumulator[reused], want[reused], rtol=2e-5, atol=1e-9)
    assert int(reused.sum()) == run["reused"]


@pytest.mark.parametrize("run", runs("teacache_runs"), ids=lambda run: run["key"])
def test_the_joint_baseline_decides_as_published(golden, run):
    """Where chunks only enter, or only leave; a window that slides is compared slot by slot in the published code."""
    tensors, _ = golden
    features, window = tensors[f"{run['set']}/features"], tensors[f"{run['set']}/active_window"]
    policy = TeaCacheReuse(run["threshold"], "latent", warmup=run["warmup"], last="take", rescale="identity")
    decision, accumulator = drive(policy, features, window, run["steps"])
    want = tensors[f"{run['key']}/decision"]
    for row, (first, end) in enumerate(window.tolist()):
        got = decision[row, first:end].tolist()
        expected = {COMPUTED: {COMPUTED}, REUSED: {REUSED}, PARTIAL: {REUSED, PARTIAL}}[int(want[row])]
        assert set(got) == expected, row
        if want[row] == PARTIAL:
            assert got[-1] == PARTIAL  # the chunk that entered
        if want[row] != COMPUTED:
            assert accumulator[row, first].item() == pytest.approx(
                tensors[f"{run['key']}/accumulator"][row].item(), rel=2e-5
            )


def test_equality_computes():
    """Strictly below the threshold reuses; the metric in fp32 makes 0.25 exactly 0.25."""
    change = Change.between([(torch.full((1, 8), 1.25), torch.ones(1, 8))])[0]
    assert change.relative == 0.25
    state = ReuseState()
    assert not flowcache(threshold=0.25).one(turn(0, 3, 9), state, change).reused
    assert flowcache(threshold=0.2500001).one(turn(0, 3, 9), state, change).reused


def test_what_is_compared_with_is_the_previous_step_not_the_last_computed_one():
    """The accumulator is the length of a path: back and forth does not cancel out."""
    x = torch.ones(1, 1, 1, 1, 1)
    run = ReuseRun(flowcache(threshold=0.25), lambda metric, x, t: x.flatten(1))
    reused = []
    for k, value in enumerate((1.0, 1.1, 1.0, 1.1)):
        now = turn(0, k, 9)
        reused.append(not run.decide([now], [x * value])[0])
        run.keep(now, x, x)
    assert reused == [False, True, True, False]
    assert run.states[0].decisions[2].accumulator == pytest.approx(0.1 + 0.1 / 1.1)


# --- the schedule known before the take -------------------------------------------------------------------------------


class Embedder:
    """The golden's time embedding, as diffusers lays it out."""

    def __init__(self, weights: dict) -> None:
        linear = lambda name: self._linear(weights[f"{name}.weight"], weights[f"{name}.bias"])
        self.time_embedder = torch.nn.Module()
        self.time_embedder.linear_1, self.time_embedder.linear_2 = (
            linear("time_embedding.0"),
            linear("time_embedding.2"),
        )
        self.time_proj = linear("time_projection.1")
        self.fps = torch.nn.Sequential(linear("fps_projection.0"), torch.nn.SiLU(), linear("fps_projection.2"))
        self.rates = torch.tensor(weights["fps_embedding.weight"])

    @staticmethod
    def _linear(weight, bias) -> torch.nn.Linear:
        layer = torch.nn.Linear(len(weight[0]), len(weight))
        layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
        return layer


def e0_cases() -> list[tuple[dict, dict]]:
    cases = json.loads((GOLDENS / "skyreels_timestep_matrix.json").read_text())["e0_metric"]
    return [(case, run) for case in cases for run in case["runs"]]


@pytest.mark.parametrize(
    ("case", "run"), e0_cases(), ids=lambda x: str(x.get("polynomial") or x["config"]["num_steps"])
)
def test_the_schedule_by_timestep_is_the_published_one_and_known_before_the_take(case, run):
    """Polynomials that fall below zero included, as published: then everything after is reused."""
    embedder = Embedder(case["weights"])
    rate = embedder.fps(embedder.rates[case["config"]["fps_index"]])
    times = case["timesteps"]
    coefficients = tuple(run["coefficients"])
    name = next((n for n, p in POLYNOMIALS.items() if p == pytest.approx(coefficients, rel=1e-6)), None)
    if name is None:
        pytest.fail(f"{run['polynomial']} is not in POLYNOMIALS")
    policy = FlowCacheReuse(
        run["threshold"], "timestep", warmup=run["ret_steps"], last="chunk", rescale=name, clamp=False
    )
    with torch.no_grad():
        reuse = ReuseRun(policy, lambda metric, x, t: timestep_feature(embedder, t) + rate)
        turns = [Turn(0, k, len(times), t, t / 1000, t / 1000) for k, t in enumerate(times)]
        decided = reuse.schedule(turns)
    assert [d.index for d in decided if d.reused] == run["skipped_steps"]
    traced = case["metric_trace"]
    got = [d.change for d in decided][traced["first_step"] :][: len(traced["l1rel"])]
    assert got == pytest.approx(traced["l1rel"], rel=2e-4)


def test_a_polynomial_is_clamped_unless_the_published_behaviour_is_asked_for():
    assert rescaled(0.0, "wan2.1-1.3b", clamp=False) == pytest.approx(-0.0500, abs=1e-4)
    assert rescaled(0.0, "wan2.1-1.3b") == 0.0
    for change, value in (
        (0.005, 0.0064),
        (0.01, 0.0429),
        (0.02, 0.0782),
        (0.05, 0.1419),
        (0.07, 0.2334),
        (0.1, 0.0489),
    ):
        assert rescaled(change, "wan2.1-1.3b") == pytest.approx(value, abs=1e-4)


def test_a_step_that_moves_far_is_never_reused_for_it():
    """The published polynomial counts a change of 0.3 as −300: the accumulator falls and all that follows is reused."""
    far = Change((0.3,), (1.0,), 1)
    one = lambda clamp: FlowCacheReuse(0.1, "timestep", warmup=0, last="none", rescale="wan2.1-1.3b", clamp=clamp)
    published, state = one(False), ReuseState()
    assert published.one(turn(0, 3, 9), state, far).reused and state.accumulator < -100
    still = Change((0.03,), (1.0,), 1)
    assert all(published.one(turn(0, 4, 9), state, still).reused for _ in range(100))
    ours, state = one(True), ReuseState()
    ours.one(turn(0, 3, 9), state, far)
    assert state.accumulator == 0
    assert sum(ours.one(turn(0, 4, 9), state, still).reused for _ in range(100)) == 50


def test_decisions_do_not_depend_on_the_dtype_of_the_model():
    half, full = tiny_wan(dtype=torch.bfloat16), tiny_wan()
    full.transformer.load_state_dict(half.transformer.state_dict())
    for t in (999.0, 500.5, 3.25):
        assert torch.equal(half.feature("timestep", None, t), full.feature("timestep", None, t))
        x = torch.randn(1, 4, 3, 4, 6)
        assert half.feature("latent", x, t).dtype == torch.float32
        assert torch.equal(half.feature("latent", x, t), full.feature("latent", x, t))


def test_features_are_what_the_model_computes():
    host, x = tiny_wan(), torch.randn(1, 4, 3, 4, 6)
    torch.testing.assert_close(host.feature("latent", x, 0.0), host.transformer.patch_embedding(x))
    seen = []
    hook = host.transformer.condition_embedder.register_forward_hook(lambda m, a, out: seen.append(out[1]))
    next(take(host))
    hook.remove()
    t = take(host).schedule.timesteps[0]
    torch.testing.assert_close(host.feature("timestep", None, t), seen[0][:1], rtol=1e-5, atol=1e-5)


# --- on the chunked sampler -------------------------------------------------------------------------------------------


def take(host=None, policy=None, **options) -> Session:
    host = host or tiny_wan(timesteps=(1000, 800, 600, 400, 200))
    defaults = {"prompt_embeds": text(), "decode": False, "seed": 3}
    return Session(host, policy or SlidingWindow(9, sink=3), **defaults | options)


def latents(session: Session, chunks: int = 4) -> torch.Tensor:
    return torch.stack([next(session).latents for _ in range(chunks)])


@pytest.mark.parametrize("policy", [FullHistory(), SlidingWindow(6, sink=3, positions="slots")], ids=lambda p: p.name)
@pytest.mark.parametrize("carry", ["velocity", "residual"])
@pytest.mark.parametrize("reuse", [FlowCacheReuse, TeaCacheReuse])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_threshold_zero_is_no_reuse_bitwise(policy, carry, reuse, guidance):
    options = {"guidance_scale": guidance, "negative_prompt_embeds": text(seed=2) if guidance != 1 else None}
    zero = reuse(0.0, "timestep", carry, warmup=0, last="none", rescale="wan2.1-1.3b", clamp=False)
    with_it, without = take(policy=policy, reuse=zero, **options), take(policy=policy, **options)
    assert torch.equal(latents(with_it), latents(without))
    assert with_it.stats.reused == 0 and with_it.stats.forwards == without.stats.forwards


def always(**options) -> FlowCacheReuse:
    return FlowCacheReuse(1e9, "timestep", warmup=1, last="none", rescale="identity", **options)


def test_a_reused_step_runs_no_forward_and_is_counted():
    host = tiny_wan(timesteps=(1000, 800, 600, 400, 200))
    calls = []
    host.transformer.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for carry in ("velocity", "residual"):
        calls.clear()
        stats = next(take(host, reuse=always(carry=carry), guidance_scale=2.0, negative_prompt_embeds=text())).stats
        assert len(calls) == stats.forwards == 4 and stats.reused == 8  # one step and the commit pass, two streams
        assert [d.reused for d in stats.decisions] == [False, True, True, True, True]
        assert stats.decisions[0].reason == "first" and stats.decisions[4].reason == "still"


def test_where_noise_is_renewed_the_prediction_carries_over_not_the_velocity():
    """After fresh noise the old velocity points away from noise that is gone; what stays is x0, to the bit."""
    host = tiny_wan(timesteps=(1000, 800, 600, 400, 200))
    one_step = take(tiny_wan(timesteps=(1000,)), seed=3)
    many = take(host, reuse=always())
    predictions = []
    many.callback_on_step_end = lambda session, step, t, given: predictions.append(given["latents"])
    next(many)
    for x0 in predictions[1:]:
        torch.testing.assert_close(x0, predictions[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(predictions[0][0], next(one_step).latents, rtol=0, atol=1e-6)


def test_a_residual_goes_between_this_steps_embedding_and_head():
    """If nothing of the input changes, embedding, residual and head make the computed velocity again."""
    host, x = tiny_wan(), torch.randn(1, 4, 3, 4, 6)
    session = take(host)
    state = session.texts["cond"]
    block = session.rollout.admit(3)
    plain = host.forward(x, 700.0, state, session.history.layers("cond", block))
    computed, residual = host.forward_residual(x, 700.0, state, session.history.layers("cond", block))
    again, same = host.forward_residual(x, 700.0, state, [], residual)
    assert torch.equal(plain, computed) and same is residual
    torch.testing.assert_close(again, computed, rtol=1e-5, atol=1e-5)
    other, _ = host.forward_residual(x + 1, 700.0, state, [], residual)
    assert not torch.allclose(other, computed)
    assert len(host.transformer.blocks) == 3  # and the blocks are in their place


def test_the_published_update_is_refused_where_noise_is_renewed():
    with pytest.raises(LongtakeError, match="fresh noise"):
        take(reuse=always(carry="update"))


def test_an_interrupted_chunk_is_decided_anew():
    plain, broken = take(reuse=always()), take(reuse=always())

    def stop(session, step, t, given):
        if step == 2 and session.index == 1 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt

    stopped: list[int] = []
    broken.callback_on_step_end = stop
    want = latents(plain, 3)
    got = [next(broken).latents]
    with pytest.raises(KeyboardInterrupt):
        next(broken)
    got += [next(broken).latents for _ in range(2)]
    assert torch.equal(torch.stack(got), want)


def test_two_interleaved_takes_keep_their_reuse_apart():
    host = tiny_wan(timesteps=(1000, 800, 600, 400, 200))
    slow = FlowCacheReuse(1.0, "timestep", warmup=1, last="chunk", rescale="identity")
    alone = [latents(take(host, reuse=r, seed=s), 3) for r, s in ((slow, 1), (always(), 2))]
    first, second = take(host, reuse=slow, seed=1), take(host, reuse=always(), seed=2)
    pairs = [(next(first).latents, next(second).latents) for _ in range(3)]
    for want, got in zip(alone, zip(*pairs, strict=True), strict=True):
        assert torch.equal(want, torch.stack(got))


def test_takes_in_lockstep_decide_together_for_the_one_that_moves_most():
    pair = Change.between([(torch.tensor([[1.01], [1.5]]), torch.ones(2, 1))])[0]
    assert pair.relative == 0.5
    assert not flowcache(threshold=0.1).one(turn(0, 1, 9), ReuseState(), pair).reused


def test_a_four_step_model_can_gain_two_forwards_of_five():
    host = tiny_wan(timesteps=(1000, 750, 500, 250))
    chunk = next(take(host, reuse=FlowCacheReuse(1e9)))  # all but the threshold by the preset for causal Wan
    assert [d.reused for d in chunk.stats.decisions] == [False, True, True, False]
    assert chunk.stats.forwards == 3


# --- logs, replay, snapshots, names -----------------------------------------------------------------------------------


def test_a_log_replays_to_the_bit(tmp_path):
    reuse = FlowCacheReuse(1.0, "timestep", warmup=1, last="chunk", rescale="identity")
    session = take(reuse=reuse)
    chunks = [next(session) for _ in range(3)]
    decisions = [d for chunk in chunks for d in chunk.stats.decisions]
    assert 0 < sum(d.reused for d in decisions) < len(decisions)
    log = tmp_path / "log.json"
    write_log(log, decisions, {"model": "tiny"})
    assert read_log(log) == decisions
    for replay in (ReplayReuse(str(log)), ReplayReuse.of(decisions), parse(f"replay:{log}")):
        again = take(reuse=replay)
        for chunk in chunks:
            got = next(again)
            assert torch.equal(got.latents, chunk.latents)
            assert [d.reused for d in got.stats.decisions] == [d.reused for d in chunk.stats.decisions]


@pytest.mark.parametrize("content", ["", "{}", '{"decisions": [{"chunk": 0}]}', "[]"])
def test_a_file_that_is_no_log_is_refused_at_once(tmp_path, content):
    path = tmp_path / "log.json"
    path.write_text(content)
    with pytest.raises(LongtakeError, match="no reuse log"):
        ReplayReuse(str(path))
    with pytest.raises(LongtakeError, match="cannot be read"):
        ReplayReuse(str(tmp_path / "missing.json"))
    with pytest.raises(LongtakeError, match="the log to follow"):
        ReplayReuse()


@pytest.mark.parametrize("carry", ["velocity", "residual"])
def test_a_restored_take_goes_on_with_the_same_reuse(tmp_path, carry):
    reuse = FlowCacheReuse(1.0, "timestep", carry, warmup=1, last="chunk", rescale="identity")
    session = take(reuse=reuse)
    next(session)
    session.snapshot(tmp_path / "take.safetensors")
    again = Session.restore(tmp_path / "take.safetensors", session.host)
    assert again.reuse == reuse
    assert torch.equal(latents(again, 2), latents(session, 2))


def test_the_state_of_chunks_in_flight_survives_being_written_down():
    policy = flowcache(threshold=0.3)
    feature = lambda metric, x, t: x.flatten(1)
    noise = torch.Generator().manual_seed(0)
    rows = [[torch.randn(1, 2, 2, 2, 2, generator=noise) * 0.1 + 1 for _ in range(2)] for _ in range(12)]

    def go(run: ReuseRun, start: int, stop: int) -> list[bool]:
        seen = []
        for k in range(start, stop):
            turns = [turn(c, k, 12) for c in (0, 1)]
            seen += (computed := run.decide(turns, rows[k]))
            for now, x, yes in zip(turns, rows[k], computed, strict=True):
                if yes:
                    run.keep(now, x, 2 * x)
        return seen

    whole, first = ReuseRun(policy, feature), ReuseRun(policy, feature)
    want = go(whole, 0, 12)
    go(first, 0, 6)
    tensors, meta = first.state_dict()
    second = ReuseRun(policy, feature)
    second.load_state_dict(tensors, json.loads(json.dumps(meta)))
    assert second.nbytes == first.nbytes > 0
    assert go(second, 6, 12) == want[12:] and True in want and False in want
    assert second.finish(0) == whole.finish(0)
    assert torch.equal(second.carried(turn(1, 11, 12), rows[0][0]), whole.carried(turn(1, 11, 12), rows[0][0]))


def test_memory_of_reuse_is_counted_while_chunks_are_in_flight():
    seen = []
    for carry in ("velocity", "residual"):
        session = take(reuse=always(carry=carry))
        session.callback_on_step_end = lambda session, *_: seen.append(session.memory()["reuse"])
        next(session)
        assert session.memory()["reuse"] == 0
        hidden, chunk = 3 * 6 * 24 * 4, 4 * 3 * 4 * 6 * 4
        assert set(seen) == {hidden if carry == "residual" else chunk}
        seen.clear()


@pytest.mark.parametrize(
    "spec",
    ["flowcache", "flowcache:slow", "flowcache:fast,carry=residual", "teacache:0.2", "flowcache:last=none", "none"],
)
def test_a_specification_names_a_policy_and_its_options(spec):
    policy = parse(spec)
    assert policy == build(*describe(policy)) == parse(specification(policy))
    assert getattr(parse("flowcache:last=none").for_model("skyreels"), "last", "") == "none"
    assert parse("flowcache:0.2,metric=latent,warmup=3") == FlowCacheReuse(0.2, "latent", warmup=3)
    assert isinstance(parse("none"), NoReuse)


WRONG = ["all", "flowcache:quick", "flowcache:-1", "flowcache:nan", "flowcache:carry=x", "flowcache:metric=x"]
WRONG += ["flowcache:warmup=-1", "flowcache:rescale=x", "flowcache:last=x", "flowcache:speed=3", "replay"]


@pytest.mark.parametrize("spec", WRONG)
def test_a_wrong_specification_is_refused_in_one_line(spec):
    with pytest.raises(LongtakeError) as error:
        parse(spec)
    assert "\n" not in str(error.value)


def test_slow_and_fast_are_data_of_the_model_and_what_is_given_stays():
    for name, preset in PRESETS.items():
        slow, fast = (FlowCacheReuse(speed).for_model(name) for speed in ("slow", "fast"))
        assert (slow.threshold, fast.threshold) == (preset.slow, preset.fast)
        assert slow.threshold < fast.threshold and replace(slow, threshold=fast.threshold) == fast
        assert TeaCacheReuse("fast").for_model(name).threshold == preset.tea_fast
        assert FlowCacheReuse(0.3, warmup=2, rescale="identity").for_model(name) == FlowCacheReuse(
            0.3, preset.metric, warmup=2, last=preset.last, rescale="identity"
        )
    with pytest.raises(LongtakeError, match="no reuse thresholds"):
        FlowCacheReuse().for_model("something")
    complete = flowcache()
    assert complete.for_model("something") == complete


def test_thresholds_go_by_the_models_settings_not_by_the_name_of_its_folder():
    host = tiny_wan(reuse="magi")
    assert take(host, reuse=FlowCacheReuse("fast")).reuse.threshold == PRESETS["magi"].fast
    host.name = "somewhere/else"
    assert take(host, reuse=FlowCacheReuse("fast")).reuse.threshold == PRESETS["magi"].fast


# --- the published mistakes -------------------------------------------------------------------------------------------


def walk(run: ReuseRun, widths: list[float], velocity) -> tuple[float, float]:
    """Euler from 0 with the given steps: where it ends, and the sum of the steps applied."""
    x, sigma = torch.zeros(1, 1, 1, 1, 1), 1.0
    for k, width in enumerate(widths):
        now = Turn(0, k, len(widths), sigma, sigma, sigma - width)
        computed, width = run.decide([now], [x + k])[0], now.next_sigma - now.sigma
        v = velocity(sigma) if computed else run.carried(now, x)
        if computed:
            run.keep(now, x, v)
            run.moved(now, width * v)
        x, sigma = x + width * v, now.next_sigma
    return x.item(), sigma


def test_a_reused_velocity_covers_the_whole_way_and_the_published_update_falls_short():
    """Steps that grow towards the end: repeating Δx leaves part of the way undone."""
    widths = [0.05, 0.1, 0.15, 0.3, 0.4]
    constant = lambda sigma: torch.full((1, 1, 1, 1, 1), -1.0)
    end, _ = walk(ReuseRun(always(), lambda *_: torch.ones(1, 1)), widths, constant)
    assert end == pytest.approx(1.0)
    published, _ = walk(ReuseRun(always(carry="update"), lambda *_: torch.ones(1, 1)), widths, constant)
    assert published == pytest.approx(5 * 0.05)


def test_teacache_compares_a_chunk_with_itself_when_the_window_slides():
    """Slot by slot, chunk 1 would be compared with chunk 0, which lies elsewhere: every slide would compute."""
    run = ReuseRun(
        TeaCacheReuse(0.1, "latent", warmup=0, last="none", rescale="identity"), lambda metric, x, t: x.flatten(1)
    )
    at = lambda c: torch.full((1, 1, 1, 1, 1), 10.0**c)
    for k, active in enumerate([(0, 1), (0, 1), (1, 2), (1, 2)]):
        turns = [turn(c, k, 9) for c in active]
        computed = run.decide(turns, [at(c) for c in active])
        for now, yes in zip(turns, computed, strict=True):
            if yes:
                run.keep(now, at(now.chunk), at(now.chunk))
        if k == 2:
            assert computed == [False, True]  # chunk 2 has just entered
    assert run.states[1].decisions[2].reason == "still" and run.states[2].decisions[0].reason == "entered"


@pytest.mark.parametrize("commit", ["clean", "adopt"])
def test_teacache_writes_what_it_computes_and_moves_what_it_reuses(commit):
    """With several chunks in flight: nothing is read before it was written (every buffer begins as NaN, and no bit of
    the take changes), and every chunk moves in steps that are reused."""

    def made(poison: bool) -> torch.Tensor:
        host = tiny_skyreels(overlap=None, commit=commit, condition_noise=0.0)
        session = Session(
            host, FullHistory(), prompt_embeds=torch.ones(1, 7, 10), guidance_scale=1.0, decode=False, seed=4, chunks=6,
            reuse=TeaCacheReuse(2.0, "timestep", warmup=2, last="none", rescale="identity"),
        )  # fmt: skip
        if poison:
            for store in session.history.stores.values():
                store.k.fill_(float("nan"))
                store.v.fill_(float("nan"))
        step, moves = session.rollout._step, []

        def watched(chunk, velocity, clock):
            before = chunk.x
            step(chunk, velocity, clock)
            moves.append((velocity is None, torch.equal(before, chunk.x)))

        session.rollout._step = watched
        video = latents(session, 6)
        assert any(reused for reused, _ in moves) and not any(stood for _, stood in moves)
        return video

    clean = made(False)
    assert torch.isfinite(clean).all() and torch.equal(clean, made(True))


def test_both_guidance_streams_follow_one_decision():
    """Published: branches are told apart by who calls when. Here a decision is a chunk's, for both."""
    host = tiny_wan(timesteps=(1000, 800, 600, 400, 200))
    reuse = FlowCacheReuse(1.0, "timestep", "residual", warmup=1, last="chunk", rescale="identity")
    swapped = take(host, reuse=reuse, guidance_scale=2.0, negative_prompt_embeds=text(seed=2))
    counts = [next(swapped).stats for _ in range(2)]
    for stats in counts:
        assert stats.reused == 2 * sum(d.reused for d in stats.decisions) > 0
        assert stats.forwards == 2 * (1 + sum(not d.reused for d in stats.decisions))  # and the commit pass


# --- the command line -------------------------------------------------------------------------------------------------


def test_generate_says_the_schedule_writes_the_log_and_replays_it(tmp_path):
    log, clip, latents_file = tmp_path / "log.json", tmp_path / "a.mp4", tmp_path / "a.safetensors"
    base = ["generate", "a red ball", "--chunks", "2", "--json", "--size", "64x64"]
    files = ["-o", str(clip), "--latents", str(latents_file), "--reuse-log", str(log)]
    result = CliRunner().invoke(app, [*base, *files, "--reuse", "flowcache:fast"])
    assert result.exit_code == 0, result.output
    assert "reuses 2 of 4 steps of a chunk: steps 1, 2" in result.stderr
    report = json.loads(result.stdout)
    assert report["reused"] == 4 and report["reuse"].startswith("flowcache:threshold=0.8,metric=timestep")
    assert parse(report["reuse"]).threshold == 0.8
    again = [*base, "-o", str(tmp_path / "b.mp4"), "--latents", str(tmp_path / "b.safetensors")]
    result = CliRunner().invoke(app, [*again, "--reuse", f"replay:{log}"])
    assert result.exit_code == 0, result.output
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_policies_lists_reuse_policies_and_the_thresholds_of_models():
    told = json.loads(CliRunner().invoke(app, ["policies", "--json"]).stdout)
    assert {"none", "flowcache", "teacache", "replay"} <= set(told["reuse"])
    assert told["reuse_presets"]["magi"]["slow"] == 0.01
    text_ = CliRunner().invoke(app, ["policies"]).stdout
    assert "magi: 0.01 / 0.015" in text_ and "teacache" in text_

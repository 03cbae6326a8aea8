"""Training compressors: the differentiable rollout is the take, and a few steps lower the loss."""

import json
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from longtake import FullHistory, LongtakeError, Session, load_compressor
from longtake.compressors import DualBranch
from longtake.hosts.digest import weights_digest
from longtake.policies import parse
from longtake.samplers.chunked import Schedule
from longtake.zoo import compressor_losses as losses
from longtake.zoo.lora import Adapter
from longtake.zoo.rollout import Rollout
from longtake.zoo.stages import Stage, Stopped, read_checkpoint
from longtake.zoo.train_compressor import Critic, Recipe, Trainer, train

from .test_compressors import Middle, trained
from .tiny import text, tiny_wan

CLOSE = {"atol": 2e-5, "rtol": 0}
PACKED = "packforcing:sink=1,recent=1,top_k=2,archive=4"


def host_of(grid=(4, 4), **options):
    return tiny_wan(grid=grid, layers=2, **options)


def recipe(**changes) -> Recipe:
    return replace(Recipe(chunks=4, batch=1, policy=PACKED, low="latents"), **changes)


class Fixed:
    """The same noise for a take and for a rollout."""

    def __init__(self, host, batch=1):
        self.shape = (batch, 4, host.config.chunk_frames, *host.geometry().latent_size)
        self.generator = torch.Generator().manual_seed(3)

    def draw(self, *_):
        return torch.randn(self.shape, generator=self.generator)


@pytest.mark.parametrize("carry", ["blocks", "projection"])
@pytest.mark.parametrize(
    "policy", [Middle(), parse("packforcing:sink=1,recent=1,top_k=8,archive=8")], ids=["middle", "packforcing"]
)
def test_a_rollout_with_gradients_is_the_take(policy, carry):
    host, compressor = host_of((8, 8), vae=True), trained(carry=carry)
    take = Session(host, policy, prompt_embeds=text(), noise=Fixed(host), decode=False, compressor=compressor)
    rollout, noise = Rollout(host, policy, host.geometry(), host.text_state(text()), compressor), Fixed(host)
    sigmas, times = take.schedule.sigmas, take.schedule.timesteps
    for _ in range(6):
        rollout.begin()
        x = noise.draw()
        for i, t in enumerate(times):
            clean = x - sigmas[i] * rollout.velocity(x, t).detach()
            if i + 1 < len(times):
                x = (1 - sigmas[i + 1]) * clean + sigmas[i + 1] * noise.draw()
        rollout.commit(clean)
        torch.testing.assert_close(clean[0], next(take).latents, **CLOSE)


def test_gradients_reach_the_compressor_through_later_chunks_only():
    host, compressor = host_of(), DualBranch.sized(4, 24, low="latents")
    host.transformer.requires_grad_(False)
    rollout = Rollout(host, Middle(), host.geometry(), host.text_state(text()), compressor)
    noise = Fixed(host)
    for i in range(4):
        rollout.begin()
        velocity = rollout.velocity(noise.draw(), 800.0)
        assert velocity.requires_grad == (i == 3)  # chunk 1 is the first in the middle, and chunk 3 the first to see it
        rollout.commit(noise.draw())
    velocity.square().mean().backward()
    assert compressor.proj_out.weight.grad.abs().max() > 0


def test_a_whole_past_needs_no_distilling():
    host = host_of()
    takes = [Rollout(host, FullHistory(), host.geometry(), host.text_state(text())) for _ in range(2)]
    noise = Fixed(host)
    for _ in range(3):
        for take in takes:
            take.begin()
        x = noise.draw()
        assert torch.equal(takes[0].velocity(x, 500.0), takes[1].velocity(x, 500.0))
        for take in takes:
            take.commit(x)


def test_a_few_steps_of_distillation_lower_the_loss():
    torch.manual_seed(0)
    trainer = Trainer(host_of(), recipe(), text(2))
    before = trainer.judge(2)
    assert before["trained"] == before["low_resolution_alone"] > 0  # it starts as the training-free compressor
    optimizer = torch.optim.Adam(trainer.compressor.parameters(), lr=2e-3)
    for step in range(12):
        loss, _ = trainer.loss(seed=0, steps=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = trainer.judge(2)
    assert after["low_resolution_alone"] == before["low_resolution_alone"]
    assert after["trained"] < 0.98 * before["trained"]


class Shelf:
    """Films that are noise: what a library of the world would draw."""

    films = 10**6

    def draw(self, rng, batch, chunks):
        latents = torch.from_numpy(rng.standard_normal((batch, 4, 3 * chunks, 8, 8))).float()
        return SimpleNamespace(latents=latents, captions=["a ball"] * batch)

    def grow(self, films):
        pass


def test_films_are_remembered_instead_of_what_was_rolled_out(monkeypatch):
    trainer = Trainer(host_of(), recipe(), text(2))
    monkeypatch.setattr(trainer.host, "encode_prompt", lambda prompts: text(len(prompts)), raising=False)
    trainer.films, seen = Shelf(), []
    commit = Rollout.commit
    monkeypatch.setattr(Rollout, "commit", lambda self, x0: (seen.append(x0), commit(self, x0)))
    loss, _ = trainer.loss(seed=0, steps=0)
    assert len(seen) == 2 * 4 and all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert torch.cat(seen[::2], 2).shape == (1, 4, 12, 8, 8)
    loss.backward()
    assert trainer.compressor.proj_out.weight.grad.abs().max() > 0


def test_films_are_for_models_of_the_world_and_for_self_distillation():
    with pytest.raises(LongtakeError, match="not trained on the procedural world"):
        Trainer(host_of(), recipe(past="films"), text(2))


def test_distribution_matching_trains_the_compressor_and_the_critic_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    score_model().save_pretrained(teacher / "transformer")
    trainer = Trainer(host_of(), recipe(real=teacher), text(2))
    frozen = [p.detach().clone() for p in trainer.host.transformer.parameters()]
    critic = [p.detach().clone() for p in trainer.critic.model.parameters()]
    real = [p.detach().clone() for p in trainer.real.parameters()]
    optimizer = torch.optim.Adam(trainer.compressor.parameters(), lr=1e-3)
    for step in range(2):
        loss, numbers = trainer.loss(seed=0, steps=step)
        assert loss.isfinite() and numbers["critic"] > 0
        optimizer.zero_grad()
        loss.backward()
        assert trainer.compressor.proj_out.weight.grad.abs().max() > 0
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(frozen, trainer.host.transformer.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(real, trainer.real.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(critic, trainer.critic.model.parameters(), strict=True))


def score_model() -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10, freq_dim=16,
        ffn_dim=32, num_layers=2,
    )  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_the_gradient_of_the_matching_loss_is_the_normalised_difference_of_scores():
    real, fake = score_model(), score_model()
    clip = torch.randn(2, 4, 6, 4, 4, requires_grad=True)
    embeds, nothing = text(2), torch.zeros(2, 5, 10)
    at = losses.noised(clip, 5.0, torch.Generator().manual_seed(1))
    losses.dmd_loss(clip, real, fake, embeds, nothing, 3.0, at).backward()
    with torch.no_grad():
        c, u, f = (losses.clean_of(m, at, t) for m, t in ((real, embeds), (real, nothing), (fake, embeds)))
        true = c + 3.0 * (c - u)
        expected = (f - true) / (clip - true).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(clip.grad, expected / clip.numel(), atol=1e-7, rtol=1e-4)


def test_a_critic_learns_the_clips_it_is_shown():
    torch.manual_seed(0)
    critic = Critic(score_model())
    for group in critic.optimizer.param_groups:
        group["lr"] = 5e-3
    clip, generator = torch.randn(1, 4, 3, 4, 4), torch.Generator().manual_seed(0)
    told = [critic.learn(clip, text(), 5.0, generator) for _ in range(60)]
    assert sum(told[-10:]) < 0.8 * sum(told[:10])


def test_clips_are_judged_away_from_both_ends_of_the_noise():
    at = losses.noised(torch.zeros(4000, 1, 1, 1, 1), 5.0, torch.Generator().manual_seed(0))
    assert float(at.sigma.min()) == pytest.approx(0.02) and float(at.sigma.max()) == pytest.approx(0.98)
    u = 0.5
    assert float(at.sigma.median()) == pytest.approx(5 * u / (1 + 4 * u), abs=0.02)


def test_an_adapter_learns_along_and_its_teacher_does_without():
    torch.manual_seed(0)
    trainer = Trainer(host_of(), recipe(lora=2), text(1))
    for layer in trainer.adapter.layers:
        torch.nn.init.normal_(layer.up, std=0.3)
    loss, _ = trainer.loss(seed=0, steps=0)
    loss.backward()
    assert all(layer.up.grad.abs().max() > 0 for layer in trainer.adapter.layers)
    theirs = {id(p) for p in trainer.adapter.parameters()}
    assert all(p.grad is None for p in trainer.host.transformer.parameters() if id(p) not in theirs)
    plain = host_of()
    teacher = trainer.teacher(text())
    bare = Rollout(plain, FullHistory(), plain.geometry(), plain.text_state(text()))
    x = Fixed(plain).draw()
    for take in (teacher, bare):
        take.begin()
    with torch.no_grad():
        assert torch.equal(teacher.velocity(x, 700.0), bare.velocity(x, 700.0))


def test_an_adapter_is_saved_in_names_that_convert_merges(tmp_path):
    from longtake.hosts.convert.lora import merge_lora
    from longtake.hosts.convert.reading import Weight

    host = host_of()
    whole = {name: p.detach().clone() for name, p in host.transformer.named_parameters()}
    adapter = Adapter(host.transformer, 2)
    for layer in adapter.layers:
        torch.nn.init.normal_(layer.up)
    adapter.save(tmp_path / "lora.safetensors")
    weight = lambda t: Weight(t.shape, lambda: t)
    stored = {k: weight(v) for k, v in load_file(tmp_path / "lora.safetensors").items()}
    merged = merge_lora(stored, {k: weight(v) for k, v in whole.items()}, 1.0, tmp_path / "lora.safetensors")
    assert len(merged) == len(adapter.placed) == 8
    x = torch.randn(1, 3, 24)
    name = "blocks.0.attn1.to_q"
    ours = adapter.placed[name](x)
    theirs = torch.nn.functional.linear(x, merged[f"{name}.weight"].read(), whole[f"{name}.bias"])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_training_goes_on_where_it_was_stopped_and_its_result_is_used(tmp_path):
    facts = train(host_of(), tmp_path, 0.02, recipe=recipe(), prompts=text(2))
    assert facts["steps"] > 0 and facts["loss"] == "self-distillation"
    rows = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == facts["steps"]
    again = train(host_of(), tmp_path, 0.02, recipe=recipe(), prompts=text(2))
    assert again["steps"] == facts["steps"] and again["held_out_distillation"] == facts["held_out_distillation"]
    more = train(host_of(), tmp_path, 0.04, recipe=recipe(), prompts=text(2))
    assert more["steps"] > facts["steps"]
    branch = DualBranch.from_pretrained(tmp_path / "compressor")
    take = Session(host_of(), Middle(), prompt_embeds=text(), decode=False, compressor=branch)
    for _ in range(4):
        next(take)


def test_distribution_matching_goes_on_with_its_critic(tmp_path):
    score_model().save_pretrained(tmp_path / "teacher" / "transformer")
    told = recipe(real=tmp_path / "teacher", chunks=3, policy="packforcing:sink=1,recent=0,top_k=2,archive=4")
    first = train(host_of(), tmp_path / "out", 0.02, recipe=told, prompts=text(1))
    assert first["loss"] == "dmd" and first["steps"] > 0
    state = torch.load(tmp_path / "out" / "work" / "compressor.pt", weights_only=True)
    trainer = Trainer(host_of(), told, text(1))
    trainer.critic.load_state_dict(state["beside"]["critic"])
    kept = trainer.critic.model.state_dict()
    assert not torch.equal(kept["proj_out.weight"], trainer.real.state_dict()["proj_out.weight"])
    assert train(host_of(), tmp_path / "out", 0.04, recipe=told, prompts=text(1))["steps"] > first["steps"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"policy": "window"}, "no use"), ({"chunks": 2}, "more chunks"), ({"carry": "x"}, "carry")],
)
def test_a_recipe_that_would_teach_nothing_is_refused(changes, word):
    with pytest.raises(LongtakeError, match=word):
        Trainer(host_of(), recipe(**changes), text(1))


def test_a_score_model_of_another_kind_is_refused(tmp_path):
    WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=8, out_channels=8, text_dim=10, freq_dim=16,
        ffn_dim=16, num_layers=1,
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(LongtakeError, match="in_channels 8"):
        Trainer(host_of(), recipe(real=tmp_path), text(1))
    with pytest.raises(LongtakeError, match="cannot be loaded"):
        Trainer(host_of(), recipe(real=tmp_path / "nothing"), text(1))


def test_the_command_trains_and_generate_uses_the_result(tmp_path):
    from typer.testing import CliRunner

    from longtake.cli import app

    told = CliRunner().invoke(app, [
        "train", "compressor", "--out", str(tmp_path / "c"), "--minutes", "0.25", "--batch", "1", "--chunks", "4",
        "--policy", "packforcing:sink=1,recent=1", "--low", "latents", "--json",
    ])  # fmt: skip
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert facts["steps"] > 0 and facts["held_out_distillation"]["low_resolution_alone"] > 0
    made = CliRunner().invoke(app, [
        "generate", "a red ball at night", "-o", str(tmp_path / "v.mp4"), "--chunks", "5", "--json",
        "--policy", "packforcing:sink=1,recent=1", "--compressor", str(tmp_path / "c"),
    ])  # fmt: skip
    assert made.exit_code == 0, made.output


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--fake-score", "x"], "--real-score"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--chunks", "1"], "--chunks"),
        (["--rate", "-1"], "--rate"),
        (["--seed", "-1"], "--seed -1"),
        (["--carry", "x"], "--carry 'x': use one of blocks, projection"),
        (["--positions", "x"], "--positions 'x'"),
        (["--low", "x"], "--low 'x'"),
        (["--out", __file__], "is not a folder"),
        (["--policy", "packforcing:sink=x"], "sink='x' is not int"),
    ],
)
def test_a_wrong_option_of_the_command_is_one_line(options, word, tmp_path):
    from typer.testing import CliRunner

    from longtake.cli import app

    told = CliRunner().invoke(app, ["train", "compressor", "--out", str(tmp_path / "c"), *options])
    assert told.exit_code == 2 and word in told.output and "training for" not in told.output
    assert not (tmp_path / "c").exists()


def test_the_schedule_of_training_is_the_model_s_own():
    host = host_of()
    assert Trainer(host, recipe(), text(1)).schedule == Schedule.shifted(host.config.timesteps, host.config.shift)


# --- one folder, one training -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder in which a training was stopped after three steps."""
    out, turns = tmp_path_factory.mktemp("begun"), iter([False] * 3)
    with pytest.raises(Stopped, match=r"stopped after 3 steps .* kept in .*compressor.pt; the same command goes on"):
        train(host_of(), out, 5.0, recipe=recipe(), prompts=text(2), stop=lambda: next(turns, True))
    return out


@pytest.fixture
def stopped(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "out")


def asked_at_once() -> bool:
    return True


def test_a_training_that_is_stopped_keeps_its_steps_and_goes_on_with_them(stopped):
    assert read_checkpoint(stopped / "work" / "compressor.pt", "cpu")["steps"] == 3
    assert json.loads((stopped / "work" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert not (stopped / "compressor").exists()
    turns = iter([False] * 2)
    with pytest.raises(Stopped, match="after 5 steps"):
        train(host_of(), stopped, 5.0, recipe=recipe(), prompts=text(2), stop=lambda: next(turns, True))
    with pytest.raises(LongtakeError, match=r"the training in .* is not finished: run it again"):
        load_compressor(stopped)


@pytest.mark.parametrize(
    ("changes", "given", "word"),
    [
        ({"batch": 2}, {}, "batch=1, now batch=2"),
        ({"chunks": 5}, {}, "chunks=4, now chunks=5"),
        ({"carry": "projection"}, {}, "carry=blocks, now carry=projection"),
        ({"where": "raster", "rate": 0.5}, {}, r"rate=0\.002, positions=midpoint, now rate=0\.5, positions=raster"),
        ({"policy": "packforcing:sink=0,recent=1,top_k=2,archive=4"}, {}, r"policy=.*sink=1.*, now policy=.*sink=0"),
        ({}, {"seed": 1}, "seed=0, now seed=1"),
        ({}, {"prompts": text(1)}, r"prompts=2 \(.*\), now prompts=1 \("),
        ({}, {"source": "other"}, "model="),
    ],
)
def test_a_folder_is_gone_on_with_under_the_settings_it_was_begun_with_alone(changes, given, word, stopped):
    host = host_of()
    if given.pop("source", None):
        host.transformer.blocks[0].attn1.to_q.weight.data.add_(1.0)
    before = (stopped / "work" / "compressor.pt").read_bytes()
    given = {"prompts": text(2), "stop": asked_at_once} | given
    with pytest.raises(LongtakeError, match=rf"holds a training with {word}") as told:
        train(host, stopped, 5.0, recipe=recipe(**changes), **given)
    assert "give another --out, or the same settings" in str(told.value)
    assert (stopped / "work" / "compressor.pt").read_bytes() == before


def test_minutes_may_change_and_a_checkpoint_that_names_no_recipe_is_gone_on_with(stopped):
    path = stopped / "work" / "compressor.pt"
    state = read_checkpoint(path, "cpu")
    del state["recipe"]
    torch.save(state, path)
    with pytest.raises(Stopped, match=r"after 3 steps .* of 9 minutes"):
        train(host_of(), stopped, 9.0, recipe=recipe(batch=2), prompts=text(2), stop=asked_at_once)
    del state["modules"]["compressor"]["proj_out.bias"]
    torch.save(state, path)
    with pytest.raises(LongtakeError, match="is not of this training"):
        train(host_of(), stopped, 9.0, recipe=recipe(), prompts=text(2), stop=asked_at_once)


@pytest.mark.parametrize("left", [0, 10, 5000])
def test_a_checkpoint_that_was_cut_short_is_one_line_that_says_what_to_do(left, stopped):
    path = stopped / "work" / "compressor.pt"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(LongtakeError, match=r"damaged or cut short: delete it to begin anew") as told:
        train(host_of(), stopped, 5.0, recipe=recipe(), prompts=text(2), stop=asked_at_once)
    assert "\n" not in str(told.value) and str(path) in str(told.value)


def test_nothing_is_made_or_said_before_everything_is_checked(tmp_path):
    said = []
    for changes in ({"policy": "window"}, {"chunks": 2}, {"real": tmp_path / "nowhere"}, {"past": "films"}):
        with pytest.raises(LongtakeError):
            train(host_of(), tmp_path / "out", 5.0, recipe=recipe(**changes), prompts=text(2), ready=said.append)
    assert not said and not (tmp_path / "out").exists()
    with pytest.raises(LongtakeError, match="cannot make folder"):
        (tmp_path / "file").touch()
        train(host_of(), tmp_path / "file", 5.0, recipe=recipe(), prompts=text(2))


def test_a_result_names_its_model_and_is_readable_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        train(host_of(), tmp_path, 0.001, recipe=recipe(lora=0), prompts=text(1))
        train(host_of(), tmp_path / "lora", 0.001, recipe=recipe(lora=1), prompts=text(1))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*.safetensors")]
    assert len(files) == 3 and {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    branch, host = load_compressor(tmp_path), host_of()
    assert branch.config["trained_for"] == {"model": host.name, "weights": weights_digest(host.transformer)}
    branch.check(host)
    host.transformer.blocks[0].attn1.to_q.weight.data.add_(1.0)
    with pytest.raises(LongtakeError, match="was trained for another model"):
        branch.check(host)
    load_compressor(tmp_path / "lora").check(host)  # the adapter makes another model than the one that was loaded


def test_a_policy_that_does_not_compress_is_told_by_the_option_that_keeps_it_from_it():
    with pytest.raises(LongtakeError, match="no use for a compressor with middle=full: leave that away"):
        Trainer(host_of(), recipe(policy="packforcing:middle=full"), text(1))


def test_a_model_of_many_steps_is_refused_for_what_it_is(tmp_path):
    with pytest.raises(LongtakeError, match="tiny-skyreels is not a few-step causal Wan model"):
        train("tiny-skyreels", tmp_path / "out", 5.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("hits", "word"), [(1, "stopped after 2 steps"), (2, "stopped at once")])
def test_an_interrupted_command_says_what_is_kept(hits, word, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from longtake.cli import app

    step = Stage.step

    def interrupting(self, loss, **numbers):
        step(self, loss, **numbers)
        if self.steps == 2:
            for _ in range(hits):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Stage, "step", interrupting)
    monkeypatch.setattr("longtake.zoo.train_compressor.load", lambda *_, **__: host_of())
    monkeypatch.setattr("longtake.zoo.train_compressor._digest", lambda prompts: "prompts")
    monkeypatch.setattr(type(host_of()), "encode_prompt", lambda self, prompts: text(len(prompts)), raising=False)
    (tmp_path / "prompts").write_text("one\ntwo\n")
    told = CliRunner().invoke(app, [
        "train", "compressor", "--out", str(tmp_path / "c"), "--minutes", "5", "--batch", "1", "--chunks", "4",
        "--policy", PACKED, "--low", "latents", "--prompts", str(tmp_path / "prompts"),
    ])  # fmt: skip
    assert told.exit_code == 130 and word in told.output, told.output
    assert ("goes on" in told.output) == (tmp_path / "c" / "work" / "compressor.pt").exists() == (hits == 1)

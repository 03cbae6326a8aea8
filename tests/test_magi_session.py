"""MAGI-1 from the authors' files to chunks of frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import longtake
from longtake import (
    DummyForcing,
    FlowCacheKV,
    FlowCacheReuse,
    FullHistory,
    LongtakeError,
    ReplayReuse,
    Session,
    SlidingWindow,
)
from longtake.flops import Flops
from longtake.hosts.base import Pass
from longtake.hosts.magi.host import MagiHost
from longtake.planner.magi import MagiShape, count
from longtake.policies import KVPolicy, KVRange
from longtake.samplers.staggered import Stagger

from .magi import published_config, special_tokens, tiny_model, tiny_vae, write_published


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> MagiHost:
    return longtake.load(write_published(tmp_path_factory.mktemp("base")), device="cpu")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> MagiHost:
    return longtake.load(write_published(tmp_path_factory.mktemp("distill"), distill=True, shards=1), device="cpu")


def words(batch: int = 1, length: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(batch, length, 20, generator=torch.Generator().manual_seed(seed))


def latents(session: Session) -> Tensor:
    return torch.cat([chunk.latents for chunk in session], -3)


def test_the_published_files_say_how_a_model_is_run(base: MagiHost, distilled: MagiHost) -> None:
    assert (base.settings.cfg_number, base.settings.distill) == (3, False)
    assert (distilled.settings.cfg_number, distilled.settings.distill) == (1, True)
    for host in (base, distilled):
        assert (host.config.steps, host.config.lag, host.config.fps) == (8, 2, 8)
        assert torch.equal(host.transformer.videodit_blocks.layers[1].mlp.linear_fc1.weight,
                           tiny_model().videodit_blocks.layers[1].mlp.linear_fc1.weight)  # fmt: skip
    take = Session(base, prompt_embeds=words(), decode=False)
    assert take.policy == KVRange("5/4/3/2")
    assert list(take.texts) == ["cond"]


@pytest.mark.parametrize("kind", ["base", "distilled"])
@pytest.mark.parametrize(
    "policy", [None, FullHistory(), SlidingWindow(14, sink=2), FlowCacheKV(7)], ids=lambda p: type(p).__name__
)
def test_twelve_chunks_come_out_under_every_policy(kind: str, policy: object, request: pytest.FixtureRequest) -> None:
    host = request.getfixturevalue(kind)
    take = Session(host, policy, prompt_embeds=words(2), chunks=12, seed=5)
    chunks = list(take)
    assert len(chunks) == 12
    assert all(chunk.frames.shape == (2, 8, 32, 48, 3) for chunk in chunks)  # 4 pixel frames per latent one
    assert all(torch.isfinite(chunk.latents).all() for chunk in chunks)
    if policy is not None and not isinstance(policy, FullHistory):
        held = take.policy.capacity(take.history.shape) * take.history.shape.token_bytes
        assert max(chunk.stats.history_bytes for chunk in chunks) <= held


@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_two_takes_in_lockstep_are_the_two_alone(kind: str, request: pytest.FixtureRequest) -> None:
    """Their prompts have different lengths."""
    host = request.getfixturevalue(kind)
    both = words(2)
    both[1, 3:] = 0
    together = latents(Session(host, prompt_embeds=both, chunks=5, seed=[5, 6], decode=False))
    for i in range(2):
        alone = latents(Session(host, prompt_embeds=both[i : i + 1], chunks=5, seed=5 + i, decode=False))
        torch.testing.assert_close(together[i], alone, rtol=0, atol=2e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_an_image_begins_the_first_chunk_and_comes_out_as_it_was_given(
    kind: str, request: pytest.FixtureRequest
) -> None:
    host = request.getfixturevalue(kind)
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    chunks = list(Session(host, prompt_embeds=words(), image=image, chunks=3, seed=5))
    given = host.encode_image(image[None])
    assert given.shape == (1, 4, 1, 4, 6)
    assert torch.equal(chunks[0].latents[:, :1], given[0])
    plain = list(Session(host, prompt_embeds=words(), chunks=3, seed=5))
    assert not torch.equal(chunks[1].latents, plain[1].latents)


@pytest.mark.parametrize("kind", ["base", "distilled"])
@pytest.mark.parametrize("frames", [4, 5])
def test_a_video_is_continued(kind: str, frames: int, request: pytest.FixtureRequest) -> None:
    """Whole given chunks are read and not made again; what is left over begins the first that is made."""
    host = request.getfixturevalue(kind)
    video = host.encode_video(torch.rand(1, 3, 4 * frames, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1)
    for policy in (FullHistory(), FlowCacheKV(6 if kind == "base" else 5), None):
        take = Session(host, policy, prompt_embeds=words(), num_frames=56, seed=5, decode=False)
        take.extend(video)
        made = latents(take)
        rest = frames % 2
        assert made.shape[-3] == 14 - frames + rest
        assert isinstance(policy, FlowCacheKV) == (take.history.table().blocks[0].role == "fused")
        assert torch.equal(made[:, :rest], video[0, :, frames - rest :])
        assert torch.isfinite(made).all()


@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_a_take_may_end_within_a_chunk(kind: str, request: pytest.FixtureRequest) -> None:
    host = request.getfixturevalue(kind)
    take = Session(host, FullHistory(), prompt_embeds=words(), num_frames=36, seed=5, decode=False)
    made = [chunk.latents for chunk in take]
    assert [x.shape[1] for x in made] == [2, 2, 2, 2, 1] and all(torch.isfinite(x).all() for x in made)
    longer = Session(host, FullHistory(), prompt_embeds=words(), num_frames=40, seed=5, decode=False)
    assert torch.equal(made[0], next(longer).latents), "the first chunk sees nothing of the end"


def test_alias_is_refused_for_what_it_is(distilled) -> None:
    take = Session(distilled, FullHistory(), prompt_embeds=words(), chunks=3, residency="alias", decode=False)
    with pytest.raises(LongtakeError, match="'alias' is for takes of one chunk at a time"):
        list(take)


@pytest.mark.parametrize("kind", ["base", "distilled"])
@pytest.mark.parametrize("policy", [None, FlowCacheKV(6)], ids=["ranges", "flowcache"])
def test_a_restored_take_goes_on_bit_for_bit(
    kind: str, policy: object, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    host = request.getfixturevalue(kind)
    take = Session(host, policy, prompt_embeds=words(), chunks=7, seed=5, reuse=FlowCacheReuse(0.2, warmup=2))
    for _ in range(2):
        next(take)
    take.snapshot(tmp_path / "take.safetensors")
    rest = [chunk.latents for chunk in take]
    again = Session.restore(tmp_path / "take.safetensors", host)
    for want, got in zip(rest, again, strict=True):
        assert torch.equal(want, got.latents)


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_reuse_with_threshold_0_changes_no_bit(kind: str, residency: str, request: pytest.FixtureRequest) -> None:
    host = request.getfixturevalue(kind)
    run = lambda reuse: latents(
        Session(host, prompt_embeds=words(), chunks=5, seed=5, reuse=reuse, residency=residency, decode=False)
    )
    assert torch.equal(run(None), run(FlowCacheReuse(0.0)))


def test_steps_are_skipped_and_logged(distilled: MagiHost) -> None:
    reuse = FlowCacheReuse(0.5, warmup=2)
    take = Session(distilled, prompt_embeds=words(), chunks=4, seed=5, reuse=reuse, decode=False)
    chunks = list(take)
    reused = [d for chunk in chunks for d in chunk.stats.decisions if d.reused]
    assert reused and all(d.index >= 2 for d in reused)
    assert sum(chunk.stats.reused for chunk in chunks) >= len(reused)


@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_forwards_are_counted_as_they_are_made(kind: str, request: pytest.FixtureRequest) -> None:
    """Of 6 chunks and 8 steps: three passes a step and two for each clean chunk, or one, one of each, and the two
    nearly-clean steps of the oldest chunk. The last chunk is not read again."""
    host = request.getfixturevalue(kind)
    chunks = list(Session(host, prompt_embeds=words(), chunks=6, seed=5, decode=False))
    total = sum(chunk.stats.forwards for chunk in chunks)
    assert total == (6 * 8 * 3 + 5 * 2 if kind == "base" else 6 * 8 + 5 + 6 * 2)


@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_another_number_of_steps_keeps_as_many_chunks_in_flight(kind: str, request: pytest.FixtureRequest) -> None:
    host = request.getfixturevalue(kind)
    take = Session(host, prompt_embeds=words(), chunks=5, num_inference_steps=16, decode=False)
    assert take.sampler.lag == 4 and take.rollout.matrix.in_flight(5) == 4
    assert host.with_steps(16).settings.step_size(0) == (8 if kind == "distilled" else None)
    with pytest.raises(LongtakeError, match="multiple of 4"):
        Session(host, prompt_embeds=words(), chunks=5, num_inference_steps=10, decode=False)


@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_options_that_could_do_nothing_are_refused(kind: str, request: pytest.FixtureRequest) -> None:
    take = lambda **options: Session(request.getfixturevalue(kind), prompt_embeds=words(), decode=False, **options)
    with pytest.raises(LongtakeError, match="scales of its own"):
        take(guidance_scale=3.0)
    with pytest.raises(LongtakeError, match="use metric=latent"):
        list(take(chunks=2, reuse=FlowCacheReuse(0.1, "timestep")))
    with pytest.raises(LongtakeError, match="let the first range be"):
        take(chunks=6, policy=KVRange("2/1"))
    assert len(latents(take(chunks=6, policy=DummyForcing(local=2)))) == 4


# --- what an upstream program got wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("kind", ["base", "distilled"])
@pytest.mark.parametrize("policy", [None, FullHistory(), FlowCacheKV(6)], ids=["ranges", "full", "flowcache"])
def test_no_forward_looks_at_memory_that_nobody_wrote(
    kind: str, policy: object, residency: str, request: pytest.FixtureRequest
) -> None:
    """The published TeaCache for MAGI-1 never writes chunk 0 and attends to its uninitialised rows from then on; a
    store and a view full of NaN show any such row."""
    host = request.getfixturevalue(kind)
    run = lambda poison: _poisoned(host, policy, residency, poison)
    assert torch.equal(run(False), run(True))


def _poisoned(host: MagiHost, policy: object, residency: str, poison: bool) -> Tensor:
    take = Session(
        host, policy, prompt_embeds=words(), chunks=7, seed=5, residency=residency, decode=False,
        reuse=FlowCacheReuse(0.2, warmup=2),
    )  # fmt: skip
    if poison:
        for store in take.history.stores.values():
            store.k.fill_(float("nan"))
            store.v.fill_(float("nan"))
        for pair in take.history.buffers._held.values():
            for tensor in pair:
                tensor.fill_(float("nan"))
    return latents(take)


def test_a_smaller_budget_than_the_chunks_in_flight_is_refused_with_advice(distilled: MagiHost) -> None:
    """Published: it overflows into a debugger."""
    with pytest.raises(LongtakeError, match="chunks=4"):
        Session(distilled, FlowCacheKV(4), prompt_embeds=words(), chunks=6, decode=False)
    assert len(list(Session(distilled, FlowCacheKV(5), prompt_embeds=words(), chunks=6, decode=False))) == 6


@pytest.mark.parametrize("kind", ["base", "distilled"])
@pytest.mark.parametrize("policy", [None, FullHistory(), FlowCacheKV(6), FlowCacheKV(7)], ids=repr)
def test_the_flops_executed_are_the_planned_ones(
    kind: str, policy: KVPolicy | None, request: pytest.FixtureRequest
) -> None:
    """To the last one; of the base model, a finished chunk is in flight for one more row."""
    host = request.getfixturevalue(kind)
    take = Session(host, policy, prompt_embeds=words(), chunks=9, decode=False)
    stats = [chunk.stats for chunk in take]
    shape = MagiShape.of(
        "tiny", host.transformer.config, host.config.as_dict(), host.settings.as_dict(), itemsize=4, text_tokens=5
    )
    planned = count(shape, 9, 8, take.geometry.tokens_per_frame, take.policy)
    made = sum((s.flops for s in stats), Flops())
    assert (made.linear, made.attention) == (planned.total.linear, planned.total.attention)
    assert sum(s.forwards for s in stats) == planned.forwards


def test_a_log_replays_to_the_bit(distilled: MagiHost) -> None:
    make = lambda reuse: Session(distilled, prompt_embeds=words(), chunks=6, seed=5, decode=False, reuse=reuse)
    own = list(make(FlowCacheReuse(0.2, warmup=2)))
    log = [decision for chunk in own for decision in chunk.stats.decisions]
    assert 0 < sum(decision.reused for decision in log) < len(log)
    again = latents(make(ReplayReuse.of(log)))
    assert torch.equal(again, torch.cat([chunk.latents for chunk in own], -3))


def test_two_takes_of_one_host_do_not_meet(distilled: MagiHost) -> None:
    """Published: cache, compressor and flags are attributes of a class, and a second video sees the first's."""
    make = lambda seed: Session(
        distilled, FlowCacheKV(5), prompt_embeds=words(seed=seed), chunks=6, seed=seed, decode=False,
        reuse=FlowCacheReuse(0.2, warmup=2),
    )  # fmt: skip
    alone = [latents(make(seed)) for seed in (3, 4)]
    first, second = make(3), make(4)
    mixed = [torch.cat([c.latents for c in pair], -3) for pair in zip(*zip(first, second, strict=True), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))
    assert all(take.history.table().blocks[0].role == "fused" for take in (first, second))  # it was compressed


def test_a_reused_step_goes_as_far_as_its_own_time(distilled: MagiHost) -> None:
    """Published: the last Δx is added again although steps grow, so their sum falls short of 1. Here it is the velocity
    that is carried: with a constant one, reuse changes nothing."""

    class Straight(MagiHost):
        def forward(self, latents: Tensor, timestep: float, text: object, layers: list) -> Tensor:
            super().forward(latents, timestep, text, layers)  # its K/V are written
            return torch.ones_like(latents)

    host = Straight(distilled.transformer, distilled.settings, distilled.config, special=distilled.special)
    run = lambda **reuse: latents(
        Session(host, prompt_embeds=words(), chunks=3, seed=5, decode=False, reuse=FlowCacheReuse(**reuse))
    )
    exact = run(threshold=0.0)
    torch.testing.assert_close(run(threshold=10.0, warmup=1), exact, rtol=0, atol=1e-5)
    assert (run(threshold=10.0, warmup=1, carry="update") - exact).abs().max() > 0.1


@pytest.mark.parametrize("commit", ["clean", "adopt"])
@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_the_residual_of_the_blocks_is_carried_over(
    kind: str, commit: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Of every pass, with and without a clean one; a restored take goes on with it."""
    host = request.getfixturevalue(kind)
    sampler = Stagger(steps=8, lag=2, commit=commit)

    def take(threshold: float, carry: str = "residual") -> Session:
        reuse = FlowCacheReuse(threshold, carry=carry, warmup=2)
        return Session(host, prompt_embeds=words(), chunks=4, seed=5, decode=False, reuse=reuse, sampler=sampler)

    whole = latents(take(0.0))
    assert torch.equal(whole, latents(take(0.0, carry="velocity")))
    some = take(9.0)
    made = latents(some)
    assert some.stats.reused and torch.isfinite(made).all() and (made - whole).abs().max() > 1e-3

    stopped = take(9.0)
    first = [next(stopped).latents for _ in range(2)]
    stopped.snapshot(tmp_path / "take.safetensors")
    again = Session.restore(tmp_path / "take.safetensors", host)
    assert torch.equal(torch.cat([*first, latents(again)], -3), made)


def test_a_reused_residual_stands_between_this_steps_embedding_and_head(distilled: MagiHost) -> None:
    x = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    take = Session(distilled, prompt_embeds=words(), chunks=2, seed=5, decode=False).rollout
    text = distilled.chunk_texts(take.texts, 0, 2)["cond"]
    layers = lambda: take._layers(block, Pass("cond"), observe=False)
    block = take._admit(0, 2)
    velocity, residual = distilled.forward_residual(x, 0.3, text, layers())
    assert torch.equal(velocity, distilled.forward(x, 0.3, text, layers()))
    model, y = distilled.transformer, x + 0.1
    reused, same = distilled.forward_residual(y, 0.4, text, [], residual)
    assert same is residual
    assert torch.equal(reused, model.head(model.tokens(y) + residual, y.shape))
    torch.testing.assert_close(distilled.forward_residual(x, 0.3, text, [], residual)[0], velocity, rtol=0, atol=1e-5)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_that_cannot_work_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(match: str, change) -> None:
        folder = write_published(tmp_path / match.replace(" ", "-").replace("*", ""), vae=False)
        change(folder)
        with pytest.raises(LongtakeError, match=match) as error:
            longtake.load(folder, device="cpu")
        assert "\n" not in str(error.value)

    weights = lambda folder: folder / "inference_weight"
    index = lambda folder: weights(folder) / "model.safetensors.index.json"
    config = lambda **changes: (
        lambda folder: (folder / "4.5B_config.json").write_text(json.dumps(published_config(tiny_model(), **changes)))
    )
    refused("fp8 weights", lambda folder: weights(folder).rename(folder / "inference_weight.fp8"))
    refused("zstd -d", lambda folder: (weights(folder) / "model-00001.safetensors.zst").touch())
    refused("which its index names", lambda folder: (weights(folder) / "model-00002-of-00002.safetensors").unlink())
    refused("lacks .* weights", lambda folder: index(folder).write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    ))  # fmt: skip
    refused("does not fit", config(model_config={"hidden_size": 192}))
    refused("24B is not supported", config(model_config={"gated_linear_unit": True}))
    distill = config(engine_config={"distill": True}, runtime_config={"cfg_number": 1})
    refused("are not: take the configuration", distill)
    refused("a multiple of 4", config(runtime_config={"num_steps": 10}))
    refused("not a MAGI-1 configuration", lambda folder: (folder / "4.5B_config.json").write_text("[]"))


def test_without_special_tokens_a_prompt_is_refused_unless_the_settings_say_so(tmp_path: Path) -> None:
    folder = write_published(tmp_path, vae=False)
    (folder / "special_tokens.npz").unlink()
    host = longtake.load(folder, device="cpu")
    with pytest.raises(LongtakeError, match=r"special_tokens\.npz"):
        Session(host, prompt_embeds=words(), chunks=2, decode=False)
    with pytest.raises(LongtakeError, match="without a VAE"):
        special_tokens(folder / "special_tokens.npz")
        Session(longtake.load(folder, device="cpu"), prompt_embeds=words(), chunks=2)


def test_a_longtake_folder_says_the_same(base: MagiHost, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "transformer")
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    special_tokens(tmp_path / "special_tokens.npz")
    told = {**base.config.as_dict(), "magi": base.settings.as_dict()}
    (tmp_path / "longtake.json").write_text(json.dumps(told))
    host = longtake.load(tmp_path, device="cpu")
    assert host.settings == base.settings and host.config == base.config
    run = lambda host: latents(Session(host, prompt_embeds=words(), chunks=2, seed=5, decode=False))
    assert torch.equal(run(host), run(base))


def test_a_chunk_at_a_time_is_a_lag_of_all_steps(distilled: MagiHost) -> None:
    take = Session(distilled, FullHistory(), prompt_embeds=words(), chunks=3, sampler=Stagger(lag=8), decode=False)
    flights, row = [], take.rollout._row
    take.rollout._row = lambda clock: flights.append(len(take.rollout._denoising())) or row(clock)
    assert len(list(take)) == 3
    assert set(flights) == {0, 1} and take.rollout.row == 3 * 8


def test_in_bf16_embedders_norms_and_times_stay_in_fp32(tmp_path: Path) -> None:
    folder = write_published(tmp_path, distill=True, shards=3)
    host = longtake.load(folder, device="cpu", dtype="bfloat16")
    kinds = {name: p.dtype for name, p in host.transformer.named_parameters()}
    full = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert {"x_embedder.weight", "rope.bands", "final_linear.linear.weight", "t_embedder.mlp.0.weight"} <= full
    assert "videodit_blocks.layers.0.self_attention.q_layernorm.weight" in full
    assert "videodit_blocks.layers.0.mlp.linear_fc1.weight" not in full
    assert host.dtype == torch.bfloat16
    take = Session(host, prompt_embeds=words(), chunks=3, seed=5, decode=False)
    made = latents(take)
    assert made.dtype == torch.float32 and take.history.stores["cond"].k.dtype == torch.bfloat16
    exact = latents(Session(longtake.load(folder, device="cpu"), prompt_embeds=words(), chunks=3, seed=5, decode=False))
    assert (made - exact).norm() / exact.norm() < 0.05

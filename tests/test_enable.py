"""A diffusers pipeline that runs chunk by chunk inside `longtake.enable`, and as ever outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler
from torch import Tensor

import longtake
from longtake import FullHistory, LongtakeError, Session, SlidingWindow
from longtake.reuse import Decision, FlowCacheReuse, ReplayReuse, TeaCacheReuse
from longtake.samplers.staggered import Stagger
from tests.test_skyreels import FuseTo

from .skyreels import tiny_skyreels, tiny_transformer
from .tiny_checkpoints import write_base

STEPS = 6


class OwnTable(UniPCMultistepScheduler):
    """The scheduler with SkyReels-V2's own noise levels, which the pipeline does not ask for."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(device=device, sigmas=np.linspace(0.999, 0, num_inference_steps + 1)[:-1])


def pipeline(scheduler: type = UniPCMultistepScheduler, fps: bool = True) -> SkyReelsV2DiffusionForcingPipeline:
    torch.manual_seed(5)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    plan = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    pipe = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, transformer=tiny_transformer(fps=fps), vae=vae, scheduler=plan
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def words(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 7, 10, generator=torch.Generator().manual_seed(seed))


def call(pipe: Any, num_frames: int = 97, **options: Any) -> Tensor:
    given: dict[str, Any] = {
        "prompt": None, "prompt_embeds": words(1), "negative_prompt_embeds": words(2), "height": 32, "width": 32,
        "num_frames": num_frames, "num_inference_steps": STEPS, "guidance_scale": 6.0, "ar_step": 2,
        "causal_block_size": 5, "output_type": "latent", "generator": torch.Generator().manual_seed(3),
    }  # fmt: skip
    return pipe(**(given | options)).frames


LONG = {"num_frames": 257, "base_num_frames": 97, "overlap_history": 17}  # three windows


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("fps", [True, False])
@pytest.mark.parametrize("options", [{}, {"ar_step": 0}, {"num_frames": 57}, {"guidance_scale": 1.0}, LONG])
def test_without_policies_the_video_is_the_pipelines_own(options: dict[str, Any], fps: bool, residency: str) -> None:
    pipe = pipeline(fps=fps)
    own = call(pipe, **options)
    with longtake.enable(pipe, residency=residency):
        ours = call(pipe, **options)
    assert float((ours - own).abs().max() / own.abs().max()) < 2e-5


def test_afterwards_the_pipeline_is_bit_identical() -> None:
    pipe = pipeline()
    processors = list(pipe.transformer.attn_processors.values())
    own, attributes = call(pipe), (set(vars(pipe)), set(vars(pipe.transformer)))
    with longtake.enable(pipe, reuse=FlowCacheReuse(5.0, "timestep", "velocity", 1, "chunk", "identity")) as run:
        changed = call(pipe)
    assert run.clock.reused > 0
    assert not torch.equal(own, changed)
    assert torch.equal(own, call(pipe))
    assert all(a is b for a, b in zip(pipe.transformer.attn_processors.values(), processors, strict=True))
    assert (set(vars(pipe)), set(vars(pipe.transformer))) == attributes


def test_an_error_inside_restores_the_pipeline_too() -> None:
    pipe = pipeline()
    own = call(pipe)
    with pytest.raises(ZeroDivisionError), longtake.enable(pipe):
        call(pipe, callback_on_step_end=lambda *_: 1 / 0)
    assert torch.equal(own, call(pipe))


def test_a_session_makes_the_same_video_as_the_pipeline() -> None:
    """Same noise, own noise levels, the pipeline's slip in UniPC: our loop against theirs."""
    pipe = pipeline(OwnTable)
    host = tiny_skyreels()
    host.transformer.load_state_dict(pipe.transformer.state_dict())

    class Recorded:
        at = 0

        def draw(self, channels: int, frames: int, *size: int) -> Tensor:
            self.at += frames
            return start[:, :, self.at - frames : self.at]

    own = call(pipe)
    start = torch.randn(1, 4, 25, 4, 4, generator=torch.Generator().manual_seed(3))
    take = Session(
        host, prompt_embeds=words(1), negative_prompt_embeds=words(2), guidance_scale=6.0, num_frames=97, decode=False,
        sampler=Stagger(STEPS, 2, window=25, overlap=5, compat="upstream"), noise=Recorded(),
    )  # fmt: skip
    ours = torch.cat([chunk.latents for chunk in take], 1)[None]
    assert float((ours - own).abs().max() / own.abs().max()) < 2e-5


def test_only_chunks_that_take_a_step_are_computed() -> None:
    pipe = pipeline()
    with longtake.enable(pipe) as run:
        call(pipe)
    assert run.clock.forwards == 2 * (5 * STEPS + 4)  # a clean pass of all but the last chunk, which nobody reads
    with longtake.enable(pipe, commit="adopt") as run:
        call(pipe)
    assert run.clock.forwards == 2 * 5 * STEPS


def test_threshold_zero_equals_no_reuse_bitwise() -> None:
    pipe = pipeline()
    results = []
    for reuse in (None, FlowCacheReuse(0.0, "timestep", "residual", 1, "chunk", "identity")):
        with longtake.enable(pipe, reuse=reuse):
            results.append(call(pipe))
    assert torch.equal(*results)


@pytest.mark.parametrize("carry", ["velocity", "residual"])
def test_branches_decide_alike_and_every_decision_is_logged(carry: str) -> None:
    pipe = pipeline()
    with longtake.enable(pipe, reuse=FlowCacheReuse(1.0, "timestep", carry, 1, "chunk", "identity")) as run:
        call(pipe, **LONG)
    cond, uncond = run.decisions["cond"], run.decisions["uncond"]
    assert cond == uncond
    assert len(cond) == STEPS * (5 + 4 + 4)
    assert sum(d.reused for d in cond + uncond) == run.clock.reused > 0


@pytest.mark.parametrize("options", [{}, LONG])
@pytest.mark.parametrize("kind", [FlowCacheReuse, TeaCacheReuse])
def test_decisions_are_those_of_a_session_in_every_window(kind: type, options: dict[str, Any]) -> None:
    """A joint decision is for all chunks of a row together, and goes on through windows; only the last chunk of the
    whole call has the take's last step."""
    reuse = kind(1.0, "timestep", warmup=2, last="take", rescale="identity")
    pipe = pipeline(OwnTable)
    host = tiny_skyreels()
    host.transformer.load_state_dict(pipe.transformer.state_dict())
    with longtake.enable(pipe, reuse=reuse) as run:
        call(pipe, **options)
    take = Session(
        host, prompt_embeds=words(1), negative_prompt_embeds=words(2), guidance_scale=6.0, decode=False, reuse=reuse,
        num_frames=options.get("num_frames", 97), sampler=Stagger(STEPS, 2, window=25, overlap=5),
    )  # fmt: skip
    told = lambda decisions: sorted((d.chunk, d.index, d.reused, d.reason) for d in decisions)
    ours = told(d for chunk in take for d in chunk.stats.decisions)
    assert told(run.decisions["cond"]) == told(run.decisions["uncond"]) == ours
    assert 0 < sum(reused for _, _, reused, _ in ours) < len(ours) == STEPS * (13 if options else 5)


def test_a_log_of_several_windows_replays_to_the_bit_and_finished_chunks_are_forgotten() -> None:
    pipe = pipeline()
    steps = [(chunk, index) for chunk in range(13) for index in range(STEPS)]
    wanted = {(c, k) for c, k in steps if k > 1 and (5 * c + k) % 3 == 0}  # another pattern in every window
    by_hand = ReplayReuse.of([Decision(c, k, 0.0, None, 0.0, (c, k) in wanted, "") for c, k in steps])
    with longtake.enable(pipe, reuse=by_hand) as run:
        own = call(pipe, **LONG)
        assert len(run._runs) == 2 and not any(one.states for one in run._runs.values())
    log = run.decisions["cond"]
    assert [(d.chunk, d.index) for d in log] == steps and {(d.chunk, d.index) for d in log if d.reused} == wanted
    with longtake.enable(pipe, reuse=ReplayReuse.of(log)) as run:
        call(pipe, num_frames=17)
        assert {(d.chunk, d.index) for d in run.decisions["cond"] if d.reused} == {w for w in wanted if w[0] == 0}
        assert torch.equal(own, call(pipe, **LONG))  # another call begins at chunk 0 again
    assert run.decisions["cond"] == log


def test_reuse_and_compression_together_as_in_the_readme() -> None:
    """Three chunks in flight: a budget of four compresses, one of five is the whole window."""
    pipe = pipeline()
    for metric in ("timestep", "latent"):
        reuse = FlowCacheReuse(1.5, metric, warmup=1, last="none", rescale="identity")
        videos = []
        for policy in (None, longtake.FlowCacheKV(5), longtake.FlowCacheKV(4)):
            with longtake.enable(pipe, reuse=reuse, policy=policy) as run:
                videos.append(call(pipe))
            assert run.clock.reused > 0
        assert torch.equal(videos[0], videos[1])
        assert bool(videos[2].isfinite().all()) and not torch.allclose(videos[0], videos[2], atol=1e-3)


def test_policies_of_a_window_are_obeyed() -> None:
    pipe = pipeline()
    with longtake.enable(pipe, policy=FullHistory()):
        full = call(pipe)
    with longtake.enable(pipe, policy=SlidingWindow(25, sink=0)):
        assert torch.equal(full, call(pipe))
    with longtake.enable(pipe, policy=FuseTo(1), commit="adopt", reuse=None) as run:
        fused = call(pipe)
    assert bool(fused.isfinite().all())
    assert not torch.allclose(full, fused, atol=1e-3)
    with longtake.enable(pipe, policy=FuseTo(5)):
        assert torch.equal(full, call(pipe))
    assert run.clock.forwards == 2 * 5 * STEPS


def test_two_prompts_at_once_with_a_frame_rate() -> None:
    """The stock transformer cannot: it adds one frame-rate row per frame and prompt in the wrong order of axes."""
    pipe = pipeline()
    both = {"prompt_embeds": torch.cat([words(1), words(9)]), "negative_prompt_embeds": torch.cat([words(2)] * 2)}
    with pytest.raises(RuntimeError):
        call(pipe, **both)
    generators = [torch.Generator().manual_seed(n) for n in (3, 8)]
    with longtake.enable(pipe):
        together = call(pipe, **both, generator=generators)
        alone = [
            call(pipe, prompt_embeds=words(s), generator=torch.Generator().manual_seed(n)) for s, n in ((1, 3), (9, 8))
        ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    assert not torch.allclose(*together.split(1), atol=0.1)


def test_calls_that_cannot_be_run_are_refused_with_advice() -> None:
    pipe = pipeline()
    with longtake.enable(pipe):
        with pytest.raises(LongtakeError, match="causal_block_size=5"):
            call(pipe, causal_block_size=None, ar_step=0)
        with pytest.raises(LongtakeError, match="change num_frames"):
            call(pipe, num_frames=93)
        with pytest.raises(LongtakeError, match="enabled already"), longtake.enable(pipe):
            pass
    with pytest.raises(LongtakeError, match="not a object"), longtake.enable(object()):
        pass
    with pytest.raises(LongtakeError, match="clean or adopt"), longtake.enable(pipe, commit="x"):
        pass
    with pytest.raises(LongtakeError, match="no KVPolicy"), longtake.enable(pipe, policy=SlidingWindow):
        pass
    update = FlowCacheReuse("slow", carry="update")
    with pytest.raises(LongtakeError, match="scheduler makes every step"), longtake.enable(pipe, reuse=update):
        pass


def test_a_pipeline_and_its_folder_load_as_a_host(tmp_path: Any) -> None:
    pipe = pipeline()
    assert longtake.load(pipe).config.sampler == "staggered"
    folder = write_base(tmp_path / "sky")  # components of a Wan folder, and SkyReels' own transformer and index
    tiny_transformer(text_dim=16).save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "SkyReelsV2DiffusionForcingPipeline"}')
    host = longtake.load(folder)
    assert (host.config.host, host.config.overlap, host.solver) == ("skyreels", 5, "unipc")
    take = Session(host, prompt="red kite", num_frames=9, num_inference_steps=2, height=32, width=32, decode=False)
    assert [chunk.latents.shape for chunk in take] == [(4, 3, 4, 4)]


@pytest.mark.parametrize("reuse", [FlowCacheReuse("slow"), FlowCacheReuse(), TeaCacheReuse("fast"), None], ids=str)
def test_defaults_and_presets_reuse_and_keep_a_window_that_fits_whole(reuse: Any) -> None:
    """A window of five chunks, all in flight at once, and a budget of six by default: nothing is ever compressed."""
    pipe = pipeline()
    videos = []
    for policy in (None, longtake.FlowCacheKV()):
        with longtake.enable(pipe, reuse=reuse, policy=policy) as run:
            videos.append(call(pipe, num_inference_steps=12))
        assert (run.clock.reused > 0) == (reuse is not None)
    assert torch.equal(*videos)


@pytest.mark.parametrize("reuse", ["slow", FlowCacheReuse(0.2, "latent", warmup=2), None], ids=str)
def test_a_session_compresses_as_the_pipeline_does(reuse: Any) -> None:
    pipe, host = pipeline(OwnTable), tiny_skyreels()
    host.transformer.load_state_dict(pipe.transformer.state_dict())
    reuse = FlowCacheReuse(reuse) if isinstance(reuse, str) else reuse
    policy, options = longtake.FlowCacheKV(4), {"num_inference_steps": 9, "ar_step": 3, "guidance_scale": 1.0}

    class Recorded:
        at = 0

        def draw(self, channels: int, frames: int, *size: int) -> Tensor:
            self.at += frames
            return start[:, :, self.at - frames : self.at]

    with longtake.enable(pipe, reuse=reuse, policy=policy) as run:
        own = call(pipe, **options)
    start = torch.randn(1, 4, 25, 4, 4, generator=torch.Generator().manual_seed(3))
    take = Session(
        host, policy, prompt_embeds=words(1), guidance_scale=1.0, num_frames=97, decode=False, reuse=reuse,
        sampler=Stagger(9, 3, window=25, overlap=5, compat="upstream"), noise=Recorded(),
    )  # fmt: skip
    chunks = list(take)
    assert sum(chunk.stats.reused for chunk in chunks) == run.clock.reused
    assert (run.clock.reused > 0) == (reuse is not None)
    ours = torch.cat([chunk.latents for chunk in chunks], 1)[None]
    assert float((ours - own).abs().max() / own.abs().max()) < 2e-5

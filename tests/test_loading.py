"""From a name, a folder, a Hub id or a pipeline object to a host; and what is refused, in one line, with advice."""

import json
import shutil

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

import longtake
from longtake import LongtakeError, Session, SlidingWindow
from longtake.hosts.base import HostConfig
from longtake.hosts.loading import KNOWN_CAUSAL, embedded
from longtake.session import default_policy

from .test_session import one_line
from .tiny_checkpoints import write_base

SETTINGS = {
    "causal": True, "chunk_frames": 2, "timesteps": [1000, 500], "height": 32, "width": 48, "text_tokens": 6,
    "training_frames": 10, "window": 8, "sink": 1, "guidance_scale": 1.0, "fps": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def bidirectional(tmp_path_factory):
    """A stock Wan folder: it says nothing of causal weights."""
    folder = write_base(tmp_path_factory.mktemp("stock") / "wan")
    config = folder / "vae" / "config.json"  # statistics of as many channels as the VAE has
    statistics = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    config.write_text(json.dumps(json.loads(config.read_text()) | statistics))
    return folder


@pytest.fixture
def causal(bidirectional, tmp_path):
    """The same folder with a `longtake.json`."""
    folder = tmp_path / "causal"
    shutil.copytree(bidirectional, folder)
    (folder / "longtake.json").write_text(json.dumps(SETTINGS))
    return folder


def weights(folder):
    return next((folder / "transformer").glob("*.safetensors"))


def refused(source, **options) -> str:
    with pytest.raises(LongtakeError) as error:
        longtake.load(source, **({"device": "cpu"} | options))
    return one_line(error)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_run_as_its_longtake_json_says(causal):
    host = longtake.load(causal)
    take = Session(host, prompt="red kite", seed=3)
    assert (take.geometry.chunk_frames, take.geometry.height, take.geometry.width, take.geometry.fps) == (2, 32, 48, 8)
    assert take.schedule.timesteps == pytest.approx((1000, 2500 / 3)) and take.policy == SlidingWindow(8, sink=1)
    assert next(take).frames.shape == (5, 32, 48, 3)
    again = Session(longtake.load(str(causal)), prompt="red kite", seed=3)
    take = Session(host, prompt="red kite", seed=3)
    assert torch.equal(next(take).frames, next(again).frames)
    assert not any(p.requires_grad for p in host.transformer.parameters()) and not host.transformer.training


def test_a_folder_without_vae_and_text_encoder_takes_embeddings_and_gives_latents(causal):
    shutil.rmtree(causal / "vae")
    shutil.rmtree(causal / "text_encoder")
    take = Session(longtake.load(causal), prompt_embeds=torch.ones(1, 6, 16), decode=False)
    assert next(take).latents.shape == (4, 2, 4, 6)
    with pytest.raises(LongtakeError, match="prompt_embeds"):
        Session(longtake.load(causal), prompt="red", decode=False)


def test_bidirectional_weights_are_refused_with_advice(bidirectional):
    message = refused(bidirectional)
    assert "bidirectional" in message and "longtake convert" in message and "causal=True" in message
    assert next(iter(KNOWN_CAUSAL)) in message


def test_bidirectional_weights_are_taken_at_the_users_word(bidirectional):
    host = longtake.load(bidirectional, causal=True)
    assert host.config.chunk_frames == 3 and host.config.timesteps == (1000, 750, 500, 250)
    assert longtake.load(bidirectional, causal="causal-forcing-framewise").config.chunk_frames == 1
    assert default_policy(longtake.load(bidirectional, causal="longlive")) == SlidingWindow(12, sink=3)
    assert "self-forcing" in refused(bidirectional, causal="nobody-forcing")
    assert "bidirectional" in refused(bidirectional, causal=False)


def test_a_longtake_json_that_denies_causality_is_believed(causal):
    (causal / "longtake.json").write_text(json.dumps(SETTINGS | {"causal": False}))
    assert "bidirectional" in refused(causal)


def test_settings_survive_a_round_trip():
    config = HostConfig(causal=True, timesteps=(1000, 250), prompts=("a", "b"), window=9, about="x")
    assert HostConfig.of(json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"'])
def test_an_unreadable_longtake_json_is_refused(causal, text):
    (causal / "longtake.json").write_text(text)
    assert "longtake.json" in refused(causal)


def test_an_unknown_host_is_refused(causal):
    (causal / "longtake.json").write_text(json.dumps(SETTINGS | {"host": "sora"}))
    message = refused(causal)
    assert "'sora'" in message and "wan" in message


@pytest.mark.parametrize("bytes_left", [0, 7, 400, -64])
def test_truncated_weights_are_refused(causal, bytes_left):
    path = weights(causal)
    path.write_bytes(path.read_bytes()[:bytes_left])
    assert str(causal) in refused(causal)


def test_weights_that_lack_a_tensor_are_refused_instead_of_filled_at_random(causal):
    path = weights(causal)
    tensors = load_file(path)
    del tensors["blocks.1.attn1.to_k.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert "blocks.1.attn1.to_k.weight" in refused(causal)


def test_weights_of_another_shape_are_refused(causal):
    path = weights(causal)
    tensors = load_file(path)
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:-1].clone()
    save_file(tensors, path, {"format": "pt"})
    assert str(causal) in refused(causal)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_part_without_a_config_is_refused(causal, part):
    (causal / part / "config.json").unlink()
    assert str(causal) in refused(causal)


def test_a_folder_that_is_no_model_is_refused(tmp_path, causal):
    assert "model_index.json" in refused(tmp_path)
    shutil.rmtree(causal / "transformer")
    assert "transformer" in refused(causal)


def test_an_image_to_video_transformer_is_refused_and_left_as_it_was(causal):
    config = json.loads((causal / "transformer" / "config.json").read_text())
    model = WanTransformer3DModel.from_config(config | {"in_channels": 9, "added_kv_proj_dim": None})
    model.save_pretrained(causal / "transformer")
    assert "image-to-video" in refused(causal) and "image=" in refused(causal)
    before = dict(model.attn_processors)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=model)
    assert "image-to-video" in refused(pipe, causal=True, device=None)
    assert model.attn_processors == before


# --- names, paths, Hub ids --------------------------------------------------------------------------------------------


def test_every_embedded_model_is_found_by_name():
    for name, folder in embedded().items():
        assert folder.is_dir() and HostConfig.read(folder).causal, name


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "/no/such/folder", "~/no-such-folder", "a/b/c"])
def test_a_missing_model_is_refused_with_what_there_is(name):
    message = refused(name)
    assert name in message and "Hub id" in message and all(known in message for known in embedded())


def test_a_checkpoint_file_is_sent_to_convert(causal):
    assert "longtake convert" in refused(weights(causal))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A Hub that cannot be reached, and an empty cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_hub_id_of_unknown_weights_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    assert "not known to be causal" in refused("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


@pytest.mark.parametrize("name", sorted(KNOWN_CAUSAL))
def test_a_hub_that_cannot_be_reached_is_one_line(offline, name):
    assert name in refused(name) and "Hub" in refused(name)


@pytest.mark.parametrize("name", sorted(KNOWN_CAUSAL))
def test_known_causal_hub_ids_need_no_word_from_the_user(name, monkeypatch, bidirectional):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda id, **o: asked.append((id, o)) or str(bidirectional)
    )
    host = longtake.load(name, device="cpu")
    assert host.name == name and host.config.causal and host.config.chunk_frames == 3
    assert [id for id, _ in asked] == [name] and "transformer/*" in asked[0][1]["allow_patterns"]


# --- dtype, device, text encoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_half_precision_keeps_the_islands_diffusers_keeps(causal, dtype):
    host = longtake.load(causal, device="cpu", dtype=dtype)
    assert host.dtype == torch.bfloat16
    kinds = {name: p.dtype for name, p in host.transformer.named_parameters()}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kinds["blocks.0.scale_shift_table"] == torch.float32
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    take = Session(host, prompt="red")
    assert next(take).latents.dtype == torch.float32 and take.history.stores["cond"].k.dtype == torch.bfloat16


def test_a_cpu_computes_in_fp32_unless_told_otherwise(causal):
    assert longtake.load(causal, device="cpu").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["fp8", "int8", torch.int8, torch.complex64, 16], ids=str)
def test_a_dtype_that_cannot_work_is_refused(causal, dtype):
    assert "bfloat16" in refused(causal, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cud", "cuda:99", 3.5], ids=str)
def test_a_device_that_is_not_there_is_refused(causal, device):
    assert str(device) in refused(causal, device=device)


def test_an_unknown_fate_of_the_text_encoder_is_refused(causal):
    assert "offload, keep, free" in refused(causal, text_encoder="eat")


# --- pipeline objects -------------------------------------------------------------------------------------------------


def test_a_pipeline_object_serves_as_a_model(bidirectional, causal):
    pipe = WanPipeline.from_pretrained(bidirectional)
    message = refused(pipe, device=None)
    assert "causal=True" in message
    host = longtake.load(pipe, causal="self-forcing")
    assert host.transformer is pipe.transformer and host.vae is pipe.vae
    take = Session(host, prompt="red kite", height=32, width=48, num_inference_steps=1)
    assert next(take).frames.shape == (9, 32, 48, 3)
    assert "already" in refused(pipe, causal=True, device=None)
    host.release()
    longtake.load(pipe, causal=True)


def test_a_pipeline_that_came_from_a_causal_folder_goes_straight_into_a_session(causal):
    take = Session(WanPipeline.from_pretrained(causal), prompt="red kite")
    same = Session(longtake.load(causal), prompt="red kite")
    assert take.geometry.chunk_frames == 2
    assert torch.equal(next(take).frames, next(same).frames)


def test_a_pipeline_without_text_encoder_takes_embeddings(bidirectional):
    pipe = WanPipeline.from_pretrained(bidirectional, text_encoder=None, tokenizer=None)
    host = longtake.load(pipe, causal=True)
    with pytest.raises(LongtakeError, match="prompt_embeds"):
        Session(host, prompt="red", height=32, width=48)
    assert next(Session(host, prompt_embeds=torch.ones(1, 6, 16), height=32, width=48)).latents.shape == (4, 3, 4, 6)


def test_a_pipeline_keeps_its_device_and_dtype(bidirectional):
    pipe = WanPipeline.from_pretrained(bidirectional)
    assert "pipe.to" in refused(pipe, causal=True, device=None, dtype="bfloat16")
    assert "pipe.to" in refused(pipe, causal=True, device="cpu")


def test_another_familys_pipeline_is_refused(bidirectional):
    class Pipeline:
        transformer, vae = torch.nn.Linear(1, 1), None

    assert "Linear" in refused(Pipeline(), device=None)
    pipe = WanPipeline.from_pretrained(bidirectional)
    two = WanPipeline(
        tokenizer=None, text_encoder=None, vae=pipe.vae, scheduler=pipe.scheduler, transformer=pipe.transformer,
        transformer_2=pipe.transformer, boundary_ratio=0.9,
    )  # fmt: skip
    assert "two transformers" in refused(two, device=None, causal=True)


def test_a_host_released_twice_does_not_rob_the_next(bidirectional):
    pipe = WanPipeline.from_pretrained(bidirectional)
    first = longtake.load(pipe, causal=True)
    first.release()
    second = longtake.load(pipe, causal=True)
    first.release()
    next(Session(second, prompt="red", height=32, width=48, decode=False))

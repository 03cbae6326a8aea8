"""The planner's bytes against what sessions of small models really have allocated, part by part and at their peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel, WanTransformer3DModel
from torch import Tensor

from longtake import Session
from longtake.evaluate.measure import live_tensor_bytes
from longtake.evaluate.peak import PeakBytes
from longtake.hosts.base import Host, HostConfig
from longtake.hosts.lumos import Lumos
from longtake.hosts.magi.host import MagiHost, MagiSettings, host_config
from longtake.hosts.magi.model import MagiTransformer3DModel
from longtake.hosts.skyreels import SkyReels
from longtake.hosts.skyreels import settings as skyreels_settings
from longtake.hosts.wan import CausalWan
from longtake.planner import ModelShape, PlanRequest, memory
from longtake.planner.lumos import LumosShape
from longtake.planner.magi import SHAPES as magi_shapes
from longtake.planner.magi import MagiShape
from longtake.planner.skyreels import SHAPES as skyreels_shapes
from longtake.planner.skyreels import SkyReelsShape
from longtake.planner.vae import MagiVae, WanVae
from longtake.planner.wan import WanShape
from longtake.policies import parse

from . import lumos, magi, skyreels

SIDE = 128
WITHIN = 0.05


def cast(model: Any, dtype: torch.dtype) -> Any:
    """As `from_pretrained(torch_dtype=…)` has it: some modules stay in fp32."""
    full = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32 if full & set(name.split(".")) else dtype)
    return model.eval().requires_grad_(False)


def numbers(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def wan_vae(dtype: torch.dtype) -> tuple[Any, WanVae]:
    model = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return cast(model, dtype), WanVae.of(model.config, numbers(model))


Made = tuple[Host, ModelShape, dict[str, Any]]  # a model, its shape, and what a session of it is given


def wan(dtype: torch.dtype, size: int = SIDE, guidance: float = 1.0) -> Made:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=10, freq_dim=16,
        ffn_dim=256, num_layers=3,
    )  # fmt: skip
    config = HostConfig(
        causal=True, chunk_frames=3, timesteps=(1000, 500), guidance_scale=guidance, height=size, width=size,
        text_tokens=5, training_frames=12,
    )  # fmt: skip
    vae, sizes = wan_vae(dtype)
    host = CausalWan(cast(model, dtype), config, vae=vae, name="mid")
    given = {"prompt_embeds": drawn(1, 5, 10)} | ({"negative_prompt_embeds": drawn(1, 5, 10)} if guidance != 1 else {})
    return host, WanShape.of("mid", model.config, asdict(config), itemsize=dtype.itemsize, vae=sizes), given


def sky(dtype: torch.dtype) -> Made:
    torch.manual_seed(0)
    model = SkyReelsV2Transformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=10, freq_dim=16,
        ffn_dim=256, num_layers=2, inject_sample_info=True,
    )  # fmt: skip
    config = replace(skyreels.CONFIG, height=64, width=64)
    vae, sizes = wan_vae(dtype)
    shape = SkyReelsShape.of(
        "mid", model.config, asdict(config), itemsize=dtype.itemsize, vae=sizes, window=config.training_frames,
        overlap=config.overlap, lag=config.lag, commit=config.commit,
    )  # fmt: skip
    given = {"prompt_embeds": drawn(1, 7, 10), "negative_prompt_embeds": drawn(1, 7, 10)}
    return SkyReels(cast(model, dtype), config, vae=vae), shape, given


def masked(dtype: torch.dtype) -> Made:
    model = lumos.tiny_model(hidden_size=128, intermediate_size=384, num_attention_heads=4)
    config = lumos.tiny_settings(height=SIDE, width=SIDE)
    host = Lumos(
        cast(model, dtype), config, tokenizer=lumos.tiny_words(), codec=cast(lumos.tiny_codec(), dtype), name="mid"
    )
    shape = LumosShape.of(
        "mid", model.config.to_dict(), asdict(config), itemsize=dtype.itemsize, codes=host.codes,
        text_tokens=host.encode_prompt(["red ball"]).shape[1],
    )  # fmt: skip
    return host, shape, {"prompt": "red ball", "image": torch.zeros(3, SIDE, SIDE)}


def staggered(dtype: torch.dtype, passes: int) -> Made:
    torch.manual_seed(0)
    model = MagiTransformer3DModel(
        num_layers=2, hidden_size=192, ffn_hidden_size=512, num_attention_heads=6, num_query_groups=2, kv_channels=32,
        in_channels=4, out_channels=4, caption_channels=20, caption_max_length=56,
    )  # fmt: skip
    settings = MagiSettings(num_steps=8, cfg_number=passes, distill=passes == 1, special_tokens=())
    config = replace(host_config(settings), height=SIDE, width=SIDE, chunk_frames=2, fps=8)
    vae = cast(magi.tiny_vae(), dtype)
    shape = MagiShape.of(
        "mid", model.config, asdict(config), asdict(settings), itemsize=dtype.itemsize, text_tokens=9,
        vae=MagiVae(width=256, inner=2, latent=4, parameters=numbers(vae)),
    )  # fmt: skip
    return MagiHost(cast(model, dtype), settings, config, vae=vae), shape, {"prompt_embeds": drawn(1, 9, 20)}


@dataclass(frozen=True)
class Measured:
    """What a take was seen to allocate, in bytes."""

    weights: int  # afterwards: what all takes share may come with the first
    peak: int  # weights and everything its operations made and held at once
    held: dict[str, int]  # what the session says it holds: the most after any chunk


def measure(host: Host, policy: str, decode: bool, residency: str, chunks: int, given: dict[str, Any]) -> Measured:
    weights = lambda: sum(v for k, v in host.memory().items() if k != "tokenizer" and (decode or k != "vae"))
    before, held = weights(), dict[str, int]()
    gc.collect()
    with PeakBytes() as seen:
        take = Session(host, parse(policy), chunks=chunks, residency=residency, decode=decode, **given)
        for _ in take:
            held = {k: max(v, held.get(k, 0)) for k, v in take.memory().items()}
    return Measured(weights(), before + seen.peak, held)


FULL, HALF = torch.float32, torch.bfloat16
WINDOW = "window:frames=9,sink=3"
CASES: list[Any] = [
    pytest.param(lambda: wan(FULL, 64), WINDOW, True, "resident", 5, id="wan-window-pixels"),
    pytest.param(lambda: wan(HALF), WINDOW, False, "scratch", 6, id="wan-window-half-scratch"),
    pytest.param(lambda: wan(HALF, 256), "full", False, "resident", 5, id="wan-full-half-larger"),
    pytest.param(lambda: wan(FULL, guidance=3.0), "packcache", False, "resident", 7, id="wan-packcache-guidance"),
    pytest.param(
        lambda: wan(HALF, 64),
        "packforcing:sink=1,recent=1,top_k=2,archive=3",
        True,
        "resident",
        8,
        id="wan-packforcing",
    ),
    pytest.param(lambda: wan(FULL), "deep-forcing:frames=17", False, "resident", 9, id="wan-deep-forcing"),
    pytest.param(lambda: sky(HALF), "full", True, "resident", 6, id="skyreels-windows-pixels"),
    pytest.param(lambda: masked(FULL), "packcache", False, "resident", 4, id="lumos-packcache"),
    pytest.param(lambda: masked(HALF), "window:frames=4,sink=1", False, "resident", 5, id="lumos-window-half"),
    pytest.param(lambda: staggered(HALF, 3), "kv-range:ranges=5/4/3/2", True, "resident", 4, id="magi-three-passes"),
    pytest.param(lambda: staggered(FULL, 1), "flowcache:chunks=5", False, "resident", 6, id="magi-flowcache"),
]


@pytest.mark.parametrize(("made", "policy", "decode", "residency", "chunks"), CASES)
def test_a_plan_is_within_five_percent_of_what_is_allocated(
    made: Callable[[], Made], policy: str, decode: bool, residency: str, chunks: int
):
    host, shape, given = made()
    request = PlanRequest(
        model="mid", shape=shape, policy=parse(policy), chunks=chunks, residency=residency, decode=decode
    )
    vram, measured = memory(request)["vram"], measure(host, policy, decode, residency, chunks, given)
    held = measured.held
    assert vram["weights"] == pytest.approx(measured.weights, rel=1e-3)
    assert vram["history"] + vram["live"] == pytest.approx(held["store"] + held["latents"], rel=WITHIN)
    assert vram["view"] == pytest.approx(held["view"], rel=1e-6)
    assert (vram["decoder"], vram["text"]) == (held["decoder"], held["text"])
    assert vram["compressor"] == held["compressor"]
    assert vram["total"] == sum(size for part, size in vram.items() if part != "total")
    assert vram["total"] == pytest.approx(measured.peak, rel=WITHIN), (vram, measured)


def test_what_is_held_between_two_chunks_is_what_is_alive():
    """The same without asking the session: tensors found alive, weights and all."""
    before = live_tensor_bytes()
    host, shape, given = wan(FULL, 64)
    take = Session(host, parse(WINDOW), chunks=6, **given)
    for _ in range(5):
        next(take)
    request = PlanRequest(model="mid", shape=shape, policy=parse(WINDOW), chunks=6)
    vram = memory(request)["vram"]
    planned = sum(size for part, size in vram.items() if part not in ("total", "activations"))
    tables = sum(table.nbytes for table in host.transformer.buffers())  # of rotations, which are no weights
    del given
    assert planned == pytest.approx(live_tensor_bytes() - before - tables, rel=WITHIN)


def test_named_shapes_know_the_clips_their_models_were_trained_on():
    for name, published in (("1.3b", "1.3B-540P"), ("14b", "14B-540P"), ("14b-720p", "14B-720P")):
        shape = skyreels_shapes[f"skyreels-v2-{name}"]
        assert shape.training_frames == skyreels_settings(published, {}).training_frames == shape.window
    for shape in magi_shapes.values():
        assert shape.training_frames == host_config(MagiSettings()).training_frames
        assert shape.history(4, frames=60).training_frames == shape.training_frames, "and policies are told"


def test_a_past_kept_quantised_is_counted_as_it_is_held():
    host, shape, given = wan(FULL)
    take = Session(host, parse(WINDOW), chunks=6, history_dtype="int8", **given)
    request = PlanRequest(model="mid", shape=shape, policy=parse(WINDOW), chunks=6, head_bytes=shape.head_dim + 4)
    vram = memory(request)["vram"]
    assert vram["history"] + vram["live"] == take.memory()["store"] and vram["view"] == take.memory()["view"]


def mid_size(vae: bool) -> Made:
    """114 million parameters in the proportions of Wan2.1, random; with the published autoencoder's 127 million."""
    torch.manual_seed(0)
    torch.set_default_dtype(HALF)
    try:
        model = WanTransformer3DModel(
            num_attention_heads=8, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
            freq_dim=256, ffn_dim=4096, num_layers=6,
        )  # fmt: skip
        decoder = AutoencoderKLWan() if vae else None
    finally:
        torch.set_default_dtype(FULL)
    config = HostConfig(
        causal=True, chunk_frames=3, timesteps=(1000,), guidance_scale=1.0, height=64 if vae else 192,
        width=64 if vae else 256, text_tokens=64, training_frames=21,
    )  # fmt: skip
    sizes = None if decoder is None else WanVae.of(decoder.config, numbers(decoder))
    host = CausalWan(cast(model, HALF), config, vae=decoder and cast(decoder, HALF), name="mid")
    shape = WanShape.of("mid", model.config, asdict(config), itemsize=2, vae=sizes)
    return host, shape, {"prompt_embeds": drawn(1, 64, 4096)}


@pytest.mark.parametrize("pixels", [False, True], ids=["latents", "pixels"])
def test_a_plan_is_within_five_percent_on_a_model_of_a_hundred_million_parameters(pixels: bool):
    """Both of everything and of what is there beside the weights, which are most of it."""
    host, shape, given = mid_size(pixels)
    assert 100e6 < numbers(host.transformer) < 200e6
    policy = "window:frames=6,sink=3"
    request = PlanRequest(model="mid", shape=shape, policy=parse(policy), chunks=2, decode=pixels)
    vram, measured = memory(request)["vram"], measure(host, policy, pixels, "resident", 2, given)
    assert vram["weights"] == pytest.approx(measured.weights, rel=1e-3)
    assert vram["total"] == pytest.approx(measured.peak, rel=WITHIN), (vram, measured)
    assert vram["total"] - vram["weights"] == pytest.approx(measured.peak - measured.weights, rel=WITHIN)

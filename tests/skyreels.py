"""Tiny SkyReels-V2 models for tests: the goldens' network, and random ones in the stock class."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from diffusers import SkyReelsV2Transformer3DModel
from torch import Tensor

from longtake.hosts.base import HostConfig
from longtake.hosts.skyreels import SkyReels

from .tiny import GOLDENS, golden

CONFIG = HostConfig(
    host="skyreels", causal=True, chunk_frames=5, shift=8.0, guidance_scale=6.0, fps=24, sampler="staggered",
    steps=6, lag=2, training_frames=25, overlap=5, text_tokens=7, height=32, width=32,
)  # fmt: skip


def skyreels_golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return golden("skyreels_tiny_block_causal")


def golden_host(tensors: dict[str, Tensor], meta: dict[str, Any]) -> SkyReels:
    """The golden's network under its own weights, run as the published fork runs it."""
    config, sizes = meta["config"], meta["config"]["m"]
    model = SkyReelsV2Transformer3DModel(
        patch_size=tuple(config["patch_size"]), num_attention_heads=sizes["num_heads"],
        attention_head_dim=sizes["dim"] // sizes["num_heads"], in_channels=config["ch"], out_channels=config["ch"],
        text_dim=sizes["text_dim"], freq_dim=sizes["freq_dim"], ffn_dim=sizes["ffn_dim"],
        num_layers=sizes["num_layers"], inject_sample_info=config["inject_sample_info"],
    )  # fmt: skip
    model.load_state_dict({ours: tensors[f"weights/{theirs}"] for theirs, ours in meta["diffusers_key_map"].items()})
    settings = replace(
        CONFIG, chunk_frames=config["BS"], shift=config["shift"], steps=config["steps"], lag=config["ar"],
        training_frames=config["NB"] * config["BS"], overlap=None, commit="adopt", condition_noise=0.0,
        guidance_scale=config["guidance_used_for_trajectory"], height=8 * config["H"], width=8 * config["W"],
    )  # fmt: skip
    return SkyReels(model.eval(), settings, name="golden")


def tiny_transformer(
    seed: int = 0, fps: bool = True, layers: int = 2, text_dim: int = 10
) -> SkyReelsV2Transformer3DModel:
    """A random transformer in which no parameter has the value it is initialised with."""
    torch.manual_seed(seed)
    model = SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=text_dim, freq_dim=16,
        ffn_dim=32, num_layers=layers, inject_sample_info=fps,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval().requires_grad_(False)


def tiny_skyreels(seed: int = 0, fps: bool = True, vae: Any = None, **config: Any) -> SkyReels:
    return SkyReels(tiny_transformer(seed, fps), replace(CONFIG, **config), vae=vae, name="tiny-sky")


def timestep_matrix() -> dict[str, Any]:
    return json.loads((GOLDENS / "skyreels_timestep_matrix.json").read_text())

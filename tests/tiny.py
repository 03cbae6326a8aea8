"""Tiny models for tests: random weights in the real classes, and the goldens' networks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor

from longtake.hosts.base import HostConfig
from longtake.hosts.convert import diffusers_name
from longtake.hosts.wan import CausalWan

GOLDENS = Path(__file__).parent / "goldens"


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        meta = {k: json.loads(v) if v[:1] in "[{" else v for k, v in (file.metadata() or {}).items()}
        return {k: file.get_tensor(k) for k in file.keys()}, meta  # noqa: SIM118


class Replay:
    """A golden's stored noise in the order a rollout draws it: chunk noise, then what is added after each step."""

    def __init__(self, noise: Tensor, fresh: Tensor, chunk: int) -> None:
        self.order: list[Tensor] = []  # [B, C, f, h, w]
        for i, steps in enumerate(fresh):
            self.order.append(noise[:, i * chunk : (i + 1) * chunk].transpose(1, 2))
            self.order += [step[None].transpose(1, 2) for step in steps]

    def draw(self, *_: int) -> Tensor:
        return self.order.pop(0)


def self_forcing_host(tensors: dict[str, Tensor], config: dict) -> CausalWan:
    """The golden's network in the stock class, under its own weights."""
    model = WanTransformer3DModel(
        num_attention_heads=config["num_heads"], attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=config["in_dim"], out_channels=config["out_dim"], text_dim=config["text_dim"],
        freq_dim=config["freq_dim"], ffn_dim=config["ffn_dim"], num_layers=config["num_layers"], eps=config["eps"],
    )  # fmt: skip
    weights = {diffusers_name(k.removeprefix("weights/")): v for k, v in tensors.items() if k.startswith("weights/")}
    model.load_state_dict(weights)
    h, w = config["latent_hw"]
    settings = HostConfig(
        causal=True, chunk_frames=config["chunk_frames"], timesteps=tuple(config["denoising_step_list"]),
        shift=config["timestep_shift"], height=8 * h, width=8 * w, text_tokens=config["text_len"],
    )  # fmt: skip
    return CausalWan(model.eval(), settings, name="golden")


def tiny_wan(
    layers: int = 3, heads: int = 2, head_dim: int = 12, grid: tuple[int, int] = (2, 3), chunk_frames: int = 3,
    seed: int = 0, vae: bool = False, guidance: float = 1.0, timesteps: Sequence[float] = (1000, 500),
    dtype: torch.dtype = torch.float32, **config: object,
) -> CausalWan:  # fmt: skip
    """A random causal Wan host; `vae` gives it a tiny VAE."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=4, text_dim=10,
        freq_dim=16, ffn_dim=32, num_layers=layers,
    )  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    decoder = None
    if vae:
        decoder = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
        decoder.eval().requires_grad_(False)
    settings = HostConfig(
        causal=True, chunk_frames=chunk_frames, timesteps=tuple(timesteps), guidance_scale=guidance,
        height=16 * grid[0], width=16 * grid[1], text_tokens=5, training_frames=4 * chunk_frames, **config,
    )  # fmt: skip
    return CausalWan(model.eval().to(dtype), settings, vae=decoder, name="tiny")


def text(batch: int = 1, seed: int = 1) -> Tensor:
    """Non-zero prompt embeddings for `tiny_wan`."""
    return torch.randn(batch, 5, 10, generator=torch.Generator().manual_seed(seed))

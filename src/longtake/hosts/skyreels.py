"""SkyReels-V2 diffusion forcing on the stock diffusers class, one chunk of latent frames at a time.

The network is Wan's with a timestep per latent frame and, in the 1.3B model, a frame-rate embedding. Its own pipeline
forwards the whole window at every step, with a dense block-causal mask. Here a forward is of one chunk: the module's
parts are run in the module's order, self-attention goes through a LayerView, and there is no mask.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LongtakeError
from ..history import LayerView
from .base import HostConfig, TextState
from .reusable import latent_feature, timestep_feature
from .wan import CausalWan

# Without a shift, a chunk's noise starts at this level; with one, the first timestep is 999 of 1000.
FIRST_LEVEL = 0.999
REPOSITORY = "Skywork/SkyReels-V2-DF-"
SMALL_LAYERS = 30  # of the 1.3B model; the 14B one has 40
FPS_ROWS = {16: 0}  # the frame-rate embedding has two rows: 16 frames a second, and anything else


def diffusion_forcing(source: str | Path) -> bool:
    """Whether a Hub id, or the model_index.json of a folder, is that of a SkyReels-V2 diffusion-forcing pipeline."""
    if isinstance(source, str):
        return source.startswith(REPOSITORY) and source.endswith("-Diffusers")
    try:
        index = json.loads((source / "model_index.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and str(index.get("_class_name")).startswith("SkyReelsV2DiffusionForcing")


def settings(name: str, transformer: Mapping[str, Any]) -> HostConfig:
    """How a published model is run: chunks of 5 latent frames, windows of 97 pixel frames (121 for 720P) that overlap
    by 17, shift 8, guidance 6. `transformer` is its configuration."""
    large = "720p" in name.lower()
    height, width = (720, 1280) if large else (544, 960)
    return HostConfig(
        host="skyreels", causal=True, chunk_frames=5, shift=8.0, guidance_scale=6.0, fps=24, height=height, width=width,
        training_frames=31 if large else 25, sampler="staggered", steps=50, lag=5, overlap=5, condition_noise=20.0,
        reuse="skyreels" if transformer.get("num_layers", 30) <= SMALL_LAYERS else "skyreels-14b",
    )  # fmt: skip


class SkyReels(CausalWan):
    """A `SkyReelsV2Transformer3DModel`, its VAE and its text encoder.

    `transformer` keeps working as before: attention falls back to its own processors outside a forward of this host.
    Raises LongtakeError for an image-to-video transformer, whose image tokens have no place in diffusion forcing.
    """

    solver = "unipc"

    def timetable(self, steps: int | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """SkyReels-V2's own table: whole timesteps, noise levels σ = s·b / (1 + (s − 1)·b) from b = 0.999 down. (A
        diffusers scheduler left to itself ends at 146 instead of 140 of 1000.)"""
        steps = steps or self.config.steps or 50
        if steps < 1:
            raise LongtakeError(f"{steps} steps: a chunk needs at least 1")
        levels = shifted(np.linspace(FIRST_LEVEL, 0, steps + 1)[:-1], self.config.shift)
        return tuple(float(int(1000 * level)) for level in levels), (*levels, 0.0)

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView]) -> Tensor:
        return self._run(latents, timestep, text, layers, None)[0]

    @torch.no_grad()
    def forward_residual(
        self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView], residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        velocity, before, after = self._run(latents, timestep, text, layers, residual)
        return velocity, after - before if residual is None else residual

    def _run(
        self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView], residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The velocity, and the tokens [B, N, d] before and after the block stack; with a `residual`, no block runs."""
        if self._released():  # the chunk would be generated without its past
            raise LongtakeError(f"{self.name}: this host was released; make a new one with longtake.load")
        model, (batch, _, frames, height, width) = self.transformer, latents.shape
        with self.bound(text, layers), awake(model):
            before = model.patch_embedding(latents.to(self.device, self.dtype)).flatten(2).transpose(1, 2)
            times, modulation = self._times(timestep)
            after = before if residual is None else before + residual
            for block in model.blocks if residual is None else ():
                after = block(after, None, modulation, None, None)
            shift, scale = (model.scale_shift_table + times.unsqueeze(1)).chunk(2, 1)  # [1, 1, d]
            out = model.proj_out((model.norm_out(after.float()) * (1 + scale) + shift).type_as(after))
        _, rows, columns = model.config.patch_size
        grid = out.view(batch, frames, height // rows, width // columns, rows, columns, -1)
        velocity = grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)
        return velocity, before, after

    @torch.no_grad()
    def feature(self, metric: str, latents: Tensor | None, timestep: float) -> Tensor:
        if metric == "latent" and latents is not None:
            return latent_feature(self.transformer.patch_embedding, latents)
        if metric != "timestep":
            return super().feature(metric, latents, timestep)
        projected = timestep_feature(self.transformer.condition_embedder, timestep)
        fps = self._fps_modulation(torch.float32)
        return projected if fps is None else projected + fps.flatten(1)

    def _times(self, timestep: float) -> tuple[Tensor, Tensor]:
        """Timestep embedding [1, d] of the head and modulation [1, 6, d] of the blocks: one for all tokens, since the
        frames of a chunk share their timestep."""
        embedder = self.transformer.condition_embedder
        sinusoid = embedder.timesteps_proj(torch.tensor([timestep], device=self.device))
        first = embedder.time_embedder.linear_1.weight.dtype  # diffusers keeps it in fp32
        times = embedder.time_embedder(sinusoid.to(first)).to(self.dtype)
        modulation = embedder.time_proj(embedder.act_fn(times)).unflatten(1, (6, -1))
        fps = self._fps_modulation(modulation.dtype)
        return times, modulation if fps is None else modulation + fps

    def _fps_modulation(self, dtype: torch.dtype) -> Tensor | None:
        """What the frame rate adds to the modulation, [1, 6, d]."""
        if not self.transformer.config.inject_sample_info:
            return None
        row = torch.tensor([FPS_ROWS.get(round(self.config.fps), 1)], device=self.device)
        return self.transformer.fps_projection(self.transformer.fps_embedding(row)).unflatten(1, (6, -1)).to(dtype)


def shifted(base: Sequence[float] | np.ndarray, shift: float) -> list[float]:
    """Noise levels moved towards noise: σ = s·b / (1 + (s − 1)·b)."""
    return [float(shift * b / (1 + (shift - 1) * b)) for b in base]


@contextmanager
def awake(module: Any) -> Iterator[None]:
    """While it is open, a module that is offloaded (`pipe.enable_model_cpu_offload()`) is on its device."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)

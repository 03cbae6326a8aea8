"""MAGI-1 as a host: chunks of 24 frames at staggered noise levels, Euler from t = 0 (noise) to 1 (data).

A step of the base model is three passes: the chunk with its history and its text, with its history and the learned null
caption, and alone. The first two see K/V of their own kind of the chunks in flight; finished chunks leave what a pass
over their clean latents with the null caption computes. The distilled model takes one pass and the size of its step;
once the oldest chunk is nearly clean, a second pass that sees it alone is blended in.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import LongtakeError
from ...flops import FlopShape
from ...geometry import Geometry
from ...history import LayerView
from ..base import Host, HostConfig, Pass, TextState
from ..prompts import PromptReader
from .model import MagiTransformer3DModel, chunk_positions
from .schedule import MagiSettings, times
from .text import MagiText, SpecialTokens, Texts
from .vae import MagiDecoder, MagiVAE


@dataclass
class Reading(TextState):
    """What a pass of a chunk reads: per layer, K and V [1, T, Hk, D] of every take (or one for all), and whether the
    pass counts as one without text."""

    kv: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    null: bool = False

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.kv for pair in layer for t in pair)


class MagiHost(PromptReader, Host):
    """A `MagiTransformer3DModel` (4.5B base or distilled), its VAE, its T5 encoder and its special tokens.

    All but the transformer may be None: without a text encoder prompts are given as embeddings, without a VAE a session
    yields latents only. `settings.special_tokens` need `special`.
    """

    solver = "euler"
    begins_chunks = True
    name = "magi"

    def __init__(
        self, transformer: MagiTransformer3DModel, settings: MagiSettings, config: HostConfig | None = None, *,
        vae: MagiVAE | None = None, text_encoder: Any = None, tokenizer: Any = None,
        special: SpecialTokens | None = None, name: str = "magi", after_encoding: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.settings = name, settings
        self.config = config or host_config(settings)
        self.transformer, self.vae = transformer, vae
        self.text_encoder, self.tokenizer, self.after_encoding = text_encoder, tokenizer, after_encoding
        model = transformer.config
        self.layers, self.kv_heads, self.head_dim = model.num_layers, model.num_query_groups, model.kv_channels
        self.rotary = transformer.rotary()
        self.flop_shape = FlopShape.of_magi(
            self.layers, model.hidden_size, model.ffn_hidden_size, self.kv_heads * self.head_dim,
            model.in_channels * model.patch_size**2,
        )  # fmt: skip
        self.dtype, self.device = transformer.working_dtype, transformer.rope.bands.device
        self.special = special
        self.texts = Texts(transformer, special, settings.null_tokens)
        self.clean_timestep = settings.clean_t
        # the base model's passes with text see other K/V of a finished chunk in the row after its last step than later
        self.lingering = 1 if settings.cfg_number == 3 else 0

    def with_steps(self, steps: int | None) -> MagiHost:
        """This host, sharing everything, with so many denoising steps: the distilled model is told their size."""
        if steps is None or steps == self.settings.num_steps:
            return self
        other = copy.copy(self)
        other.settings = replace(self.settings, num_steps=steps)
        return other

    def geometry(self, height: int | None = None, width: int | None = None) -> Geometry:
        model = self.transformer.config
        return MagiGeometry(
            self.config.height if height is None else height, self.config.width if width is None else width,
            model.in_channels, self.config.chunk_frames, self.config.fps,
            (4, 8, 8) if self.vae is None else self.vae.stride, (1, model.patch_size, model.patch_size),
        )  # fmt: skip

    # --- text -------------------------------------------------------------------------------------------------------

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        shape = f"[prompts, tokens, {self.transformer.config.caption_channels}], zeros for padding"
        return self.read(prompts, padding="longest", limit=self.texts.limit, dtype=torch.float32, instead=shape)

    def text_state(self, embeds: Tensor) -> MagiText:
        if embeds.shape[-1] != self.transformer.config.caption_channels:
            raise LongtakeError(
                f"prompt embeddings of shape {tuple(embeds.shape)}: {self.name} takes [prompts, tokens, "
                f"{self.transformer.config.caption_channels}], zeros for padding"
            )
        if self.settings.special_tokens and self.special is None:
            raise LongtakeError(
                f"{self.name} was trained with special tokens before every prompt and has none: put special_tokens.npz "
                'of the MAGI-1 repository (example/assets) into its folder, or "special_tokens": [] into "magi" of '
                "longtake.json to go without"
            )
        return self.texts.prompt(embeds.to(self.device))

    def chunk_texts(self, texts: dict[str, TextState], chunk: int, chunks: int | None) -> dict[str, TextState]:
        """The prompt behind the special tokens of this chunk, and the null caption: of passes without text, and of
        passes over finished or given latents, which count as ones with text."""
        prompt = texts["cond"]
        assert isinstance(prompt, MagiText)
        remaining = None if chunks is None else chunks - 1 - chunk
        null, embeds = self.texts.null(), prompt.embeds
        return {
            "cond": Reading(embeds, [], [], kv=self.texts.of_chunk(prompt, remaining)),
            "null": Reading(embeds, [], [], kv=null, null=True),
            "clean": Reading(embeds, [], [], kv=null),
        }

    # --- a step -----------------------------------------------------------------------------------------------------

    def timetable(self, steps: int | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        levels = self.with_steps(steps).settings.times()
        return levels[:-1], levels

    def streams(self, guidance: float) -> tuple[str, ...]:
        """Its passes take turns with one K/V. Raises LongtakeError for a guidance scale other than 1: what its files
        say of guidance holds in any case."""
        if guidance != 1:
            raise LongtakeError(
                f"guidance {guidance:g}: {self.name} has scales of its own, by noise level, or needs none (distilled): "
                "leave it away"
            )
        return ("cond",)

    def passes(self, timestep: float, guidance: float, *, first: bool) -> tuple[Pass, ...]:
        if self.settings.cfg_number == 3:
            return (Pass("cond"), Pass("null", text="null"), Pass("alone", text="null", history=False, write=False))
        if first and self.settings.nearly_clean_at(timestep):
            return (Pass("cond"), Pass("alone", history=False, write=False))
        return (Pass("cond"),)

    def clean_passes(self, guidance: float) -> tuple[Pass, ...]:
        """The forwards that write the K/V of finished latents. Of the base model's two, the last one's stay; the
        first one's are seen by the passes with text that run beside it."""
        cond = Pass("cond", text="clean")
        return (cond, Pass("null", text="null")) if self.settings.cfg_number == 3 else (cond,)

    def guide(self, velocities: dict[str, Tensor], timestep: float, guidance: float) -> Tensor:
        if "null" in velocities:
            p, tau = self.settings.guidance(timestep)
            return (1 - p) * velocities["alone"] + (p - tau) * velocities["null"] + tau * velocities["cond"]
        if "alone" in velocities:
            weight = self.settings.nearly_clean_weight
            return weight * velocities["cond"] + (1 - weight) * velocities["alone"]
        return velocities["cond"]

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView]) -> Tensor:
        """Velocity dx/dt [B, C, f, h, w] of a chunk at time `timestep` in 0 (noise) … 1 (data)."""
        text = self._reading(text)
        with self.lock:
            return self.transformer(latents.to(self.device), self._condition(timestep, text), text.kv, layers)

    @torch.no_grad()
    def forward_residual(
        self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView], residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        model, text = self.transformer, self._reading(text)
        with self.lock:
            before = model.tokens(latents.to(self.device)).to(model.working_dtype)
            if residual is not None:  # the head asks for no timestep: nothing else of the pass enters
                return model.head(before + residual, latents.shape), residual
            after = model.through(before, self._condition(timestep, text), text.kv, layers)
            return model.head(after, latents.shape), after - before

    def _reading(self, text: TextState) -> Reading:
        reading = text if isinstance(text, Reading) else self.chunk_texts({"cond": text}, 0, None)["cond"]
        assert isinstance(reading, Reading)
        return reading

    def _condition(self, timestep: float, text: Reading) -> Tensor:
        return self.transformer.condition(timestep, self._step_size(timestep), text.null)

    @torch.no_grad()
    def feature(self, metric: str, latents: Tensor | None, timestep: float) -> Tensor:
        if metric != "latent" or latents is None:
            raise LongtakeError(f"{self.name} has no feature {metric!r} to reuse by: use metric=latent")
        weight = self.transformer.x_embedder.weight.float()
        scaled = latents.to(weight) * self.transformer.config.x_rescale_factor
        return F.conv3d(scaled, weight, stride=self.transformer.x_embedder.stride)

    def text_tokens(self, text: TextState) -> int:
        """The longest reading of the takes in lockstep."""
        return max(k.shape[1] for k, _ in text.kv[0]) if isinstance(text, Reading) else super().text_tokens(text)

    def _step_size(self, timestep: float) -> float | None:
        """What a distilled model is told of a step at this time; a clean pass is told what a stage's first step is."""
        levels = self.settings.times()
        nearest = min(range(self.settings.num_steps), key=lambda i: abs(levels[i] - timestep))
        return self.settings.step_size(0 if timestep == self.settings.clean_t else nearest)

    def positions(self, geometry: Geometry, frame: int, span: int) -> tuple[Tensor, Tensor]:
        base = chunk_positions(frame, span, *geometry.grid)
        step = torch.zeros_like(base)
        step[:, 0] = 1
        return base, step

    # --- pixels -----------------------------------------------------------------------------------------------------

    def decoder(self) -> MagiDecoder:
        return MagiDecoder(self._vae(), self.settings.scale_factor)

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] of given frames [B, 3, T, H, W] in −1 … 1: T is 1, or a multiple of 4."""
        vae = self._vae()
        with self.lock:
            latents = vae.encode(video.to(vae.decoder.proj_in.weight))
        return latents.float().to(self.device) * self.settings.scale_factor

    @property
    def network(self) -> Any:
        return self.transformer

    def memory(self) -> dict[str, int]:
        parts = {"transformer": self.transformer, "vae": self.vae, "text_encoder": self.text_encoder}
        held = {name: sum(p.nbytes for p in part.parameters()) for name, part in parts.items() if part is not None}
        return held | {"text": self.texts.nbytes}

    def _vae(self) -> MagiVAE:
        if self.vae is None:
            raise LongtakeError(
                f"{self.name} was loaded without a VAE: ask the session for latents only (decode=False)"
            )
        return self.vae


@dataclass(frozen=True)
class MagiGeometry(Geometry):
    """MAGI-1's VAE is not causal: every latent frame, the first included, is `stride[0]` pixel frames."""

    def pixel_frames(self, latent_frames: int) -> int:
        return latent_frames * self.stride[0]

    def latent_frames(self, pixel_frames: int) -> int:
        return max(0, -(-pixel_frames // self.stride[0]))


def host_config(settings: MagiSettings, run: dict[str, Any] | None = None) -> HostConfig:
    """What a session needs to know of a model run with these settings; `run` is the run-time part of a published
    configuration."""
    run = run or {}
    chunk = run.get("chunk_width", 6)
    ranges = settings.noise2clean_kvrange
    return HostConfig(
        host="magi", causal=True, sampler="staggered", chunk_frames=chunk, steps=settings.num_steps,
        lag=settings.stage_steps, timesteps=(), shift=settings.shift, fps=run.get("fps", 24),
        height=run.get("video_size_h", 720), width=run.get("video_size_w", 720), text_tokens=800,
        training_frames=chunk * (max(ranges) if ranges else settings.window_size + 1),
        window=chunk * max(ranges) if ranges else None, sink=0, kv_ranges="/".join(map(str, ranges)),
    )  # fmt: skip


__all__ = ["MagiHost", "MagiSettings", "Reading", "host_config", "times"]

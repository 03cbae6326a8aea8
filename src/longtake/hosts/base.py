"""What a session asks of a model: the contract of a host, and the settings that stand beside its weights."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..compressors import Compressor, MeanPool, StreamingEncoder
from ..errors import LongtakeError
from ..flops import Flops, FlopShape
from ..geometry import Geometry
from ..history import LayerView
from ..history.view import Positions
from ..rope import RotaryTable
from .digest import weights_digest

CONFIG_NAME = "longtake.json"


@dataclass(frozen=True)
class HostConfig:
    """How a checkpoint is run: everything no weight file says. Stored as `longtake.json` beside the weights."""

    host: str = "wan"
    causal: bool = False
    chunk_frames: int = 3  # latent frames generated together
    timesteps: tuple[float, ...] = (1000, 750, 500, 250)  # nominal, before `shift`
    shift: float = 5.0  # flow-matching shift: σ = s·u / (1 + (s−1)·u), t = 1000·σ
    guidance_scale: float = 1.0  # 1: no guidance, one stream
    fps: float = 16
    height: int = 480
    width: int = 832
    text_tokens: int = 512  # the prompt is zero-padded to this length, and the padding is attended to
    training_frames: int = 21  # latent frames of a training clip
    window: int | None = None  # latent frames attended at inference, the chunk in flight included
    sink: int | None = None
    # or "staggered": several chunks in flight, each noisier than the one before; or "masked": codes instead of noise
    sampler: str = "chunked"
    steps: int | None = None  # denoising steps per chunk, where `timesteps` are not listed
    lag: int = 5  # staggered: steps by which a chunk is behind the one before it (diffusers: `ar_step`)
    # staggered: a take is made in windows of `training_frames`, each of which repeats so many latent frames of the one
    # before; None: one window without an end
    overlap: int | None = None
    condition_noise: float = 0.0  # thousandths of noise in given frames, and their timestep (`addnoise_condition`)
    kv_ranges: str = ""  # staggered: chunks seen, itself included, by progress of its denoising: see `KVRange`
    commit: str = "clean"  # how a staggered chunk's K/V become the past: a "clean" pass, or "adopt" the last computed
    history_mask: float = 0.7  # masked: part of a finished frame that is masked when it is committed
    temperature: float = 1.0  # masked: of the noise on confidences
    compat: str = "fixed"  # masked: or "upstream", the published program token for token
    decay: float | None = None  # fall of attention per latent frame of distance, as `longtake analyze decay` finds it
    reuse: str = ""  # name of its reuse thresholds; empty: those of `host`
    prompts: tuple[str, ...] = ()  # examples
    about: str = ""
    world: str = ""  # procedural world it was trained on, whose truth is known: "lanes"

    @classmethod
    def read(cls, folder: Path) -> HostConfig:
        """Settings of a model folder. Raises LongtakeError if the file is there but unreadable."""
        path = folder / CONFIG_NAME
        try:
            return cls.of(json.loads(path.read_text()))
        except (OSError, ValueError, AttributeError) as error:  # the last one: a list or a number instead of settings
            raise LongtakeError(f"{path}: not a readable model description ({error})") from error

    @classmethod
    def of(cls, values: dict[str, Any]) -> HostConfig:
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {k: v for k, v in values.items() if k in known and v is not None}
        for key in ("timesteps", "prompts"):
            if key in given:
                given[key] = tuple(given[key])
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


class Decoder(Protocol):
    """Latents to frames, a piece at a time; owns its state."""

    def push(self, latents: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] → uint8 frames [B, T, H, W, 3]."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None: ...

    @property
    def nbytes(self) -> int: ...


@dataclass
class TextState:
    """What a prompt leaves behind: its embedding [B, T, d] and, per layer, cross-attention K/V [B, T, H, D]."""

    embeds: Tensor
    k: list[Tensor]
    v: list[Tensor]
    start: int = 0  # where its first token stands, if it is part of the sequence

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes + sum(t.nbytes for t in (*self.k, *self.v))


@dataclass(frozen=True)
class Pass:
    """One forward of a chunk's step: the K/V it uses, the prompt it is given, what it sees and leaves behind."""

    name: str  # its velocity goes by this name in `Host.guide`
    stream: str = "cond"  # whose K/V
    text: str = "cond"  # which prompt
    history: bool = True  # whether it sees anything but its own chunk
    write: bool = True  # whether later chunks see its K/V, where a sampler writes at every step


class Host(ABC):
    """An AR video model with its weights. Sessions share it; it keeps nothing of them between two calls."""

    name: str
    config: HostConfig
    layers: int
    kv_heads: int
    head_dim: int
    rotary: RotaryTable
    dtype: torch.dtype  # of activations and K/V
    device: torch.device
    compressor: Compressor = MeanPool()  # of chunks, for policies that keep compressed forms

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a model carries per-call state while a forward runs

    @abstractmethod
    def geometry(self, height: int | None = None, width: int | None = None) -> Geometry: ...

    @abstractmethod
    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [B, T, d] of prompts."""

    def encode_for(self, prompts: Sequence[str], geometry: Geometry, frames: int | None) -> Tensor:
        """The same for a take of this size, of so many latent frames if its end is known."""
        return self.encode_prompt(prompts)

    def unconditional(self, embeds: Tensor) -> Tensor:
        """What the stream without text is given, where these are the embeddings of the other."""
        return self.encode_prompt([""])

    def check_embeds(self, embeds: Any, name: str) -> None:
        """Raise LongtakeError if these cannot be embeddings of prompts."""
        given = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        if not isinstance(embeds, Tensor) or embeds.dim() != 3 or 0 in embeds.shape:
            raise LongtakeError(f"{name}_embeds {given}: give a tensor [B, {self.config.text_tokens}, d]")

    def prompts_encoded(self) -> None:  # noqa: B027 (most hosts have nothing to do)
        """The session needs no more prompts encoded for now: the text encoder may leave the device."""

    @abstractmethod
    def text_state(self, embeds: Tensor) -> TextState: ...

    @abstractmethod
    def positions(self, geometry: Geometry, frame: int, span: int) -> tuple[Tensor, Tensor]:
        """Position of every token of the latent frames [frame, frame + span), and its step per frame of shift:
        both [span · tokens_per_frame, axes] in fp64, frame-major."""

    def stream_positions(
        self, geometry: Geometry, frame: int, span: int, texts: Mapping[str, TextState]
    ) -> Positions | Mapping[str, Positions]:
        """The same for every guidance stream by name, where they depend on its text."""
        return self.positions(geometry, frame, span)

    def prefix(self, text: TextState) -> Positions | None:
        """Where a prompt's tokens stand, if they are part of the sequence: `text.k` and `text.v`, before rotation, then
        begin the history. None: prompts are looked at apart."""
        return None

    @abstractmethod
    def forward(self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView]) -> Tensor:
        """Velocity [B, C, f, h, w] of a chunk at `timestep` in 0 … 1000, its attention going through `layers`."""

    def embed(self, latents: Tensor) -> Tensor:
        """Tokens [B, n, d] that latents [B, C, f, h, w] become in the model's patch embedding."""
        raise LongtakeError(f"{self.name} has no compressed history: use a policy without one")

    def encoder(self) -> StreamingEncoder:
        """The model's video encoder, a piece at a time."""
        raise LongtakeError(f"{self.name} has no compressed history: use a policy without one")

    def carry(self, tokens: Tensor, timestep: float, text: TextState, layers: list[LayerView]) -> Tensor:
        """Tokens [B, n, d] from the patch embedding through every block, as `forward` does with those of a chunk;
        returns what the last block makes of them."""
        raise LongtakeError(f"{self.name} has no compressed history: use a policy without one")

    def project(self, tokens: Tensor, layers: list[LayerView]) -> Tensor:
        """Tokens [B, n, d] straight to the keys and values of every layer; returns the values [B, n, H, D] of the
        last."""
        raise LongtakeError(f"{self.name} has no compressed history: use a policy without one")

    # --- how a step is put together, for samplers ---------------------------------------------------------------

    clean_timestep: float = 0.0  # of a pass over finished latents
    solver: str = "renoise"  # how a staggered chunk takes a step: "renoise", "unipc" or "euler"
    begins_chunks: bool = False  # given frames that fill no chunk: they begin one (or are a short one of their own)
    lingering: int = 0  # finished chunks that stay in flight for a row, to be read once more (staggered, clean commit)

    def timetable(self, steps: int | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Timesteps as the model takes them, and the noise levels a chunk passes through, one more of them."""
        raise LongtakeError(f"{self.name} runs one chunk at a time: it has no staggered timetable")

    def streams(self, guidance: float) -> tuple[str, ...]:
        """The guidance streams of a take, each with K/V and a prompt of its own."""
        return ("cond",) if guidance == 1 else ("cond", "uncond")

    def passes(self, timestep: float, guidance: float, *, first: bool) -> tuple[Pass, ...]:
        """The forwards of one step at `timestep`, in order; `first` says that nothing in flight is before the chunk."""
        cond = Pass("cond")
        return (cond,) if guidance == 1 else (cond, Pass("uncond", stream="uncond", text="uncond"))

    def guide(self, velocities: dict[str, Tensor], timestep: float, guidance: float) -> Tensor:
        """One velocity of those of the passes."""
        if "uncond" not in velocities:
            return velocities["cond"]
        uncond = velocities["uncond"].float()
        return uncond + guidance * (velocities["cond"].float() - uncond)

    def clean_passes(self, guidance: float) -> tuple[Pass, ...]:
        """The forwards that write the K/V of finished latents."""
        return self.passes(self.clean_timestep, guidance, first=True)

    def chunk_texts(self, texts: dict[str, TextState], chunk: int, chunks: int | None) -> dict[str, TextState]:
        """The prompts as chunk number `chunk`, of `chunks`, is given them."""
        return texts

    def feature(self, metric: str, latents: Tensor | None, timestep: float) -> Tensor:
        """What a reuse policy compares steps by, in fp32, [B or 1, …]: metric "latent", the patch embedding of noisy
        latents [B, C, f, h, w]; or "timestep", the timestep projection, which needs no latents."""
        raise LongtakeError(f"{self.name} has no feature {metric!r} to reuse by: use --reuse none")

    def forward_residual(
        self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView], residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and what the block stack added to its input [B, N, d]. With the `residual` of an earlier step that
        is added instead, no block runs and `layers` stay as they are."""
        raise LongtakeError(f"{self.name} cannot reuse the residual of its blocks: use carry=velocity")

    flop_shape: FlopShape | None = None  # the sizes that the cost of a forward depends on, if they are known

    def flops(self, latents: Tensor, text: TextState, layers: list[LayerView]) -> Flops:
        """What a forward of a chunk costs, embedding of the timestep apart; zeros without a `flop_shape`."""
        if self.flop_shape is None or not layers:
            return Flops()
        tokens, keys = layers[0].k_live.shape[1], layers[0].k.shape[1]
        return self.flop_shape.forward(tokens, keys, self.text_tokens(text)) * latents.shape[0]

    def flops_outside(self, tokens: int, batch: int) -> Flops:
        """What embedding and head of a chunk cost: all that runs where a residual of the block stack is reused."""
        return Flops() if self.flop_shape is None else self.flop_shape.outside(tokens) * batch

    def text_tokens(self, text: TextState) -> int:
        """Text tokens that cross-attention sees."""
        return text.k[0].shape[1] if text.k else 0

    @property
    def reuse_preset(self) -> str:
        """Under which name reuse thresholds are kept for this model (`longtake.reuse.PRESETS`)."""
        return self.config.reuse or self.config.host

    codes: int = 0  # how many there are, where a host draws codes instead of denoising latents

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., codes] of hidden states [..., d] that `forward` gave."""
        raise LongtakeError(f"{self.name} draws no codes: leave the sampler to the model")

    @abstractmethod
    def decoder(self) -> Decoder: ...

    @abstractmethod
    def encode_video(self, video: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] of given frames [B, 3, T, H, W] in [−1, 1], for `Session.extend`. Which T there can
        be is the model's: 1, 5, 9, … where the first latent frame is one frame."""

    def encode_image(self, image: Tensor) -> Tensor:
        """First-frame latents [B, C, 1, h, w] of images [B, 3, H, W] in [−1, 1]."""
        return self.encode_video(image[:, :, None])

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """What every forward goes through: text encoder and autoencoder are apart."""

    def weights_digest(self) -> str:
        """What the model's weights are known by in files that belong to it."""
        return weights_digest(self.network)

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Bytes of weights held on the device, by component."""

"""The models that are timed: the planner's shapes with random weights, and the takes they are planned for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import LongtakeError
from ...hosts.base import Host, HostConfig
from ...planner.lumos import SHAPES as LUMOS
from ...planner.lumos import LumosShape
from ...planner.magi import SHAPES as MAGI
from ...planner.magi import MagiShape
from ...planner.registry import family_of
from ...planner.request import ModelShape, PlanRequest
from ...planner.skyreels import SHAPES as SKYREELS
from ...planner.skyreels import SkyReelsShape
from ...planner.wan import SHAPES as WAN
from ...planner.wan import WanShape
from ...policies import parse
from ..bench_shapes import Shape
from ..lumos_shapes import LumosBench
from ..random_weights import drawn

TIMESTEP = {"lumos": 0.0, "magi": 0.25, "skyreels": 500.0, "wan": 500.0}


@dataclass(frozen=True)
class Model:
    """One model, the policies whose takes are summed, and the take a session makes of it."""

    shape: ModelShape
    policies: tuple[str, ...]
    frames: int  # pixel frames that are planned for
    chunks: int  # of the take that is run, if there is time
    takes: tuple[str, ...]  # policies under which it is run

    def requests(self) -> dict[str, PlanRequest]:
        """The planner's questions, by policy."""
        named = {"model": self.shape.name, "shape": self.shape, "frames": self.frames}
        return {spec: PlanRequest(**named, policy=parse(spec)) for spec in self.policies}  # type: ignore[arg-type]

    @property
    def family(self) -> str:
        return family_of(next(iter(self.requests().values())))[0]

    def host(self, device: torch.device, dtype: torch.dtype, seed: int) -> Host:
        """The model with weights drawn with `seed`; no text encoder, no decoder."""
        return BUILDERS[self.family](self.shape, device, dtype, seed)


def _wan(shape: WanShape, device: torch.device, dtype: torch.dtype, seed: int) -> Host:
    sizes = Shape(
        shape.name, device.type, shape.about, shape.heads, shape.head_dim, shape.layers, shape.ffn, shape.text_width,
        shape.text_tokens, shape.height, shape.width, channels=shape.channels, freq_dim=shape.times,
        chunk_frames=shape.chunk_frames,
    )  # fmt: skip
    return sizes.host(device, dtype, seed)


def _skyreels(shape: SkyReelsShape, device: torch.device, dtype: torch.dtype, seed: int) -> Host:
    from diffusers import SkyReelsV2Transformer3DModel

    from ...hosts.skyreels import SkyReels, settings

    make = lambda: SkyReelsV2Transformer3DModel(
        num_attention_heads=shape.heads, attention_head_dim=shape.head_dim, in_channels=shape.channels,
        out_channels=shape.channels, text_dim=shape.text_width, freq_dim=shape.times, ffn_dim=shape.ffn,
        num_layers=shape.layers, inject_sample_info=shape.rates,
    )  # fmt: skip
    config = replace(
        settings(shape.name, {"num_layers": shape.layers}), height=shape.height, width=shape.width,
        text_tokens=shape.text_tokens, chunk_frames=shape.chunk_frames, steps=shape.steps, lag=shape.lag,
    )  # fmt: skip
    return SkyReels(drawn(make, device, dtype, seed), config, name=shape.name)


def _magi(shape: MagiShape, device: torch.device, dtype: torch.dtype, seed: int) -> Host:
    from ...hosts.magi.host import MagiHost, MagiSettings, host_config
    from ...hosts.magi.model import MagiTransformer3DModel

    make = lambda: MagiTransformer3DModel(
        num_layers=shape.layers, hidden_size=shape.hidden, ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads, num_query_groups=shape.kv_heads, kv_channels=shape.head_dim,
        in_channels=shape.channels, out_channels=shape.channels, caption_channels=shape.text_width,
        caption_max_length=shape.longest_text,
    )  # fmt: skip
    ranges = tuple(int(n) for n in shape.ranges.split("/"))
    told = MagiSettings(
        num_steps=shape.steps, window_size=shape.window, distill=shape.passes == 1, cfg_number=shape.passes,
        noise2clean_kvrange=ranges, special_tokens=(),
    )  # fmt: skip
    config: HostConfig = replace(
        host_config(told), chunk_frames=shape.chunk_frames, height=shape.height, width=shape.width, fps=shape.fps,
        window=shape.chunk_frames * max(ranges), training_frames=shape.chunk_frames * max(ranges),
    )  # fmt: skip
    return MagiHost(drawn(make, device, dtype, seed), told, config, name=shape.name)


def _lumos(shape: LumosShape, device: torch.device, dtype: torch.dtype, seed: int) -> Host:
    return LumosBench(shape, device.type, str(dtype), shape.steps).host(device, dtype, shape.steps, seed)


BUILDERS: dict[str, Callable[..., Host]] = {"lumos": _lumos, "magi": _magi, "skyreels": _skyreels, "wan": _wan}


def prompt_of(model: Model, host: Host, tokens: int, seed: int = 0) -> Tensor:
    """What a session of the model is given for a prompt: embeddings [1, tokens, width], or Lumos-1's ids."""
    if isinstance(model.shape, LumosShape):
        return LumosBench(model.shape, "", "", model.shape.steps).prompt(host, seed)  # type: ignore[arg-type]
    width = getattr(model.shape, "text_width", 0)
    if not width:
        raise LongtakeError(f"{model.shape.name}: no width of its text is known")
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)).to(host.device)


PUBLISHED = (
    Model(LUMOS["lumos-1-3b"], ("full", "packcache"), 48, 4, ("packcache",)),
    Model(
        WAN["wan-1.3b"],
        ("window:frames=21,sink=3", "packforcing:sink=2,top_k=6"),
        405,
        10,
        ("window:frames=21,sink=3",),
    ),
    Model(SKYREELS["skyreels-v2-1.3b"], ("full",), 177, 2, ("full",)),
    Model(MAGI["magi-4.5b"], ("kv-range:ranges=5/4/3/2", "flowcache:chunks=6"), 240, 1, ("kv-range:ranges=5/4/3/2",)),
)

MICRO = (
    Model(
        LumosShape(
            name="micro-lumos", about="to try it", width=64, height=32, fps=12, layers=2, hidden=64, ffn=96, heads=2,
            kv_heads=1, head_dim=32, vocabulary=192, visual_codes=64, text_tokens=12, itemsize=4, steps=2,
        ),
        ("full",), 13, 2, ("full",),
    ),
    Model(
        WanShape(
            name="micro-wan", about="to try it", width=48, height=32, fps=16, layers=2, hidden=24, ffn=48, head_dim=12,
            channels=4, text_tokens=4, text_width=8, times=16, itemsize=4, vae=None,
        ),
        ("window:frames=9,sink=3",), 45, 3, ("window:frames=9,sink=3",),
    ),
    Model(
        SkyReelsShape(
            name="micro-skyreels", about="to try it", width=48, height=32, fps=24, layers=2, hidden=24, ffn=48,
            head_dim=12, channels=4, text_tokens=4, text_width=8, times=16, itemsize=4, vae=None, steps=10, rates=True,
        ),
        ("full",), 57, 2, ("full",),
    ),
    Model(
        MagiShape(
            name="micro-magi", about="to try it", width=48, height=32, fps=24, layers=2, hidden=96, ffn=112, heads=6,
            kv_heads=2, head_dim=16, channels=4, text_width=20, longest_text=56, text_tokens=5, itemsize=4, steps=8,
            vae=None,
        ),
        ("kv-range:ranges=5/4/3/2",), 144, 1, ("kv-range:ranges=5/4/3/2",),
    ),
)  # fmt: skip

SHAPES = {"published": PUBLISHED, "micro": MICRO}

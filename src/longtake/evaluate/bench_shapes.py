"""Named shapes: the sizes a benchmark runs at, as data. Weights are random: time and memory ask only for sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..flops import FlopShape
from ..hosts.base import HostConfig
from ..hosts.wan import CausalWan
from .random_weights import drawn


@dataclass(frozen=True)
class Shape:
    """A named set of sizes; all that a figure depends on beside machine and software."""

    name: str
    device: str  # the kind of device it is meant for
    about: str
    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_dim: int
    text_tokens: int
    height: int  # pixels, 16 to a token
    width: int
    dtype: str = "float32"
    channels: int = 16
    freq_dim: int = 256
    chunk_frames: int = 3
    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    window: int = 21  # latent frames, the chunk in flight included
    sink: int = 3
    early: int = 20  # number of the early chunk; the window must have been full for a while
    curve_chunks: int = 60

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_frames * (self.height // 16) * (self.width // 16)

    @property
    def flops(self) -> FlopShape:
        """What a forward costs."""
        return FlopShape.of_wan(self.layers, self.heads * self.head_dim, self.ffn_dim, 4 * self.channels)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "timesteps": list(self.timesteps)}

    def host(self, device: torch.device, dtype: torch.dtype, seed: int) -> CausalWan:
        """A host of this shape, its weights drawn with `seed`."""
        from diffusers import WanTransformer3DModel

        make = lambda: WanTransformer3DModel(
            num_attention_heads=self.heads, attention_head_dim=self.head_dim, in_channels=self.channels,
            out_channels=self.channels, text_dim=self.text_dim, freq_dim=self.freq_dim, ffn_dim=self.ffn_dim,
            num_layers=self.layers,
        )  # fmt: skip
        config = HostConfig(
            causal=True, chunk_frames=self.chunk_frames, timesteps=self.timesteps, height=self.height,
            width=self.width, text_tokens=self.text_tokens, training_frames=self.window,
        )  # fmt: skip
        return CausalWan(drawn(make, device, dtype, seed), config, name=self.name)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "cpu-small", "cpu", "an eight-layer Wan on 128×128 pixels: about half a second per chunk on two cores",
            heads=6, head_dim=64, layers=8, ffn_dim=1536, text_dim=64, text_tokens=64, height=128, width=128,
        ),
        Shape(
            "cpu-micro", "cpu", "seconds for a whole run: to try the benchmark, not to measure",
            heads=2, head_dim=12, layers=2, ffn_dim=48, text_dim=8, text_tokens=4, height=32, width=32, channels=4,
            freq_dim=16, timesteps=(1000, 500), window=9, early=6, curve_chunks=8,
        ),
        Shape(
            "gpu-wan-1.3b", "cuda", "Wan2.1 1.3B at 832×480",
            heads=12, head_dim=128, layers=30, ffn_dim=8960, text_dim=4096, text_tokens=512, height=480, width=832,
            dtype="bfloat16", curve_chunks=24,
        ),
    )
}  # fmt: skip

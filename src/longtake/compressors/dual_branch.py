"""PackForcing's compressor (§3.3): h̃ = h_HR + h_LR, both in patch-embedding space.

The high-resolution branch sees the latents through five strided 3-D convolutions with SiLU between them:

    C → 32 (2,1,1) → 128 (1,2,2) → 512 (1,2,2) → 2048 (1,2,2) → d (1,1,1)        channels (stride)

Kernel and padding are not published; here 3 × 3 × 3 with padding 1 (33.4 M parameters, 16.9 GFLOP a chunk at 832×480),
the last a pointwise projection. That projection starts at zero: an untrained compressor is its low-resolution branch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from ..errors import LongtakeError
from ..geometry import Geometry
from .base import Compressor, Embedder, TakeState, check_settings
from .low_resolution import LowResolution
from .mean_pool import MeanPool

CHANNELS = (32, 128, 512, 2048)  # of a model of width 1536
STRIDES = ((2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
LOWS = ("pixels", "latents")


class DualBranch(ModelMixin, ConfigMixin, Compressor):
    """The trained compressor; saved and loaded as a diffusers model folder.

    Args:
        latent_channels: C of the model's latents.
        width: d, the model's width.
        channels: of the four inner convolutions.
        kernel: side of their kernels, odd; None makes it the stride, without padding (7.6 M parameters).
        low: what the low-resolution branch pools: "pixels", as published, or "latents", which needs no decoded frames.
        carry, where, streaming: see `Compressor` and `LowResolution`.
        trained_for: `{"model": name, "weights": hosts.digest.weights_digest}`; None fits any model of its width.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, latent_channels: int = 16, width: int = 1536, channels: Sequence[int] = CHANNELS,
        kernel: int | None = 3, low: str = "pixels", carry: str = "blocks", where: str = "midpoint",
        streaming: bool = True, trained_for: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_settings(carry, where)
        if low not in LOWS:
            raise LongtakeError(f"low {low!r}: use one of {', '.join(LOWS)}")
        if len(channels) != len(STRIDES) or (kernel is not None and (kernel < 1 or kernel % 2 == 0)):
            raise LongtakeError(f"channels {list(channels)}, kernel {kernel}: give {len(STRIDES)} and an odd number")
        self.carry, self.where = carry, where
        self.low: Compressor = LowResolution(carry, where, streaming) if low == "pixels" else MeanPool(carry, where)
        self.wants_pixels = self.low.wants_pixels
        sizes = (latent_channels, *channels)
        self.high = nn.ModuleList(
            nn.Conv3d(a, b, stride if kernel is None else kernel, stride, 0 if kernel is None else kernel // 2)
            for a, b, stride in zip(sizes, sizes[1:], STRIDES, strict=False)
        )
        self.proj_out = nn.Conv3d(sizes[-1], width, 1)
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def sized(cls, latent_channels: int, width: int, **settings: Any) -> DualBranch:
        """A compressor for a model of any width, its inner channels in the published proportion, at least 16."""
        channels = tuple(max(16, n * width // 1536) for n in CHANNELS)
        return cls(latent_channels=latent_channels, width=width, channels=channels, **settings)

    def check(self, host: Any) -> None:
        """Raise LongtakeError for a model of other sizes than this one's, or of other weights than it was trained
        for."""
        settings = getattr(getattr(host, "transformer", None), "config", None)
        if not isinstance(settings, Mapping) or "attention_head_dim" not in settings:
            raise LongtakeError(f"a trained compressor is for causal Wan models: {host.name} is none")
        theirs = settings["in_channels"], settings["num_attention_heads"] * settings["attention_head_dim"]
        ours = self.config["latent_channels"], self.config["width"]
        if ours != theirs:
            raise LongtakeError(
                f"{self._called()} is for models of {ours[0]} latent channels and width {ours[1]}: {host.name} has "
                f"{theirs[0]} and {theirs[1]}; train one for it, or leave it away"
            )
        made_for = self.config["trained_for"]
        if made_for and (found := host.weights_digest()) != made_for["weights"]:
            raise LongtakeError(
                f"{self._called()} was trained for another model: {made_for['model']} (weights {made_for['weights']}), "
                f"not {host.name} (weights {found}); train one for it, or leave it away"
            )

    def compress(
        self, latents: Tensor, pixels: Tensor | None, state: TakeState, model: Embedder, geometry: Geometry
    ) -> tuple[Tensor, TakeState]:
        low, state = self.low.compress(latents, pixels, state, model, geometry)
        return low + self.refine(latents, self.grid(geometry, latents.shape[2])).to(low), state

    def refine(self, latents: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """h_HR [B, n, d] of latents [B, C, F, h, w] on `grid`, frame-major.

        A cell beyond the grid is cut off, which keeps every cell over the tokens it stands for (60 rows give 8 cells,
        7 are used); odd frames are averaged, so that none is left out."""
        x = latents.to(self.proj_out.weight)
        for conv in self.high:
            x = functional.silu(conv(x))
        x = self.proj_out(x)[..., : grid[1], : grid[2]]
        if x.shape[2] != grid[0]:
            x = functional.adaptive_avg_pool3d(x, grid)
        return x.flatten(2).transpose(1, 2)

    def _called(self) -> str:
        folder = self.config.get("_name_or_path")
        return f"compressor {folder}" if folder else "this compressor"

    def describe(self) -> dict[str, Any]:
        """Settings and a fingerprint of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        settings = {"low": self.config.low, "streaming": self.config.streaming, "kernel": self.config.kernel}
        return {**super().describe(), **settings, "weights": digest.hexdigest()[:16]}

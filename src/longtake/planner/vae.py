"""Video decoders by their sizes: what a streaming decode keeps from frame to frame, and the most that is alive while it
decodes. Counted as in `peaks`: tensors that operations hand out, no scratch inside a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

FP32 = 4
PAST = 2  # frames that a causal convolution remembers of its input


@dataclass(frozen=True)
class WanVae:
    """Wan2.1's autoencoder, `AutoencoderKLWan`; the defaults are the published one's."""

    base: int = 96
    latent: int = 16
    factors: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    faster: tuple[bool, ...] = (True, True, False)  # which upsamplings double the frames, deepest first
    parameters: int = 126_892_531
    stride: tuple[int, int, int] = (4, 8, 8)
    folded: int = 1  # pixels that become channels before anything else, each way

    @classmethod
    def of(cls, config: Mapping[str, Any], parameters: int) -> WanVae:
        """From the configuration of a diffusers `AutoencoderKLWan`."""
        stride = config["scale_factor_spatial"]
        return cls(
            config.get("decoder_base_dim") or config["base_dim"], config["z_dim"], tuple(config["dim_mult"]),
            config["num_res_blocks"], tuple(reversed(config["temperal_downsample"])), parameters,
            (config["scale_factor_temporal"], stride, stride), config.get("patch_size") or 1,
        )  # fmt: skip

    def decoder_state(self, height: int, width: int, s: int) -> int:
        """Bytes that a streaming decode of `height` × `width` pixels keeps: two frames of every convolution's input."""
        return round(s * PAST * sum(channels * area for channels, area in self._remembered(height, width)))

    def encoder_state(self, height: int, width: int, s: int) -> int:
        """The same of a streaming encode: one frame where time is halved."""
        dims = [self.base * f for f in (1, *self.factors)]
        area = height * width / self.folded**2
        kept = PAST * 3.0 * height * width
        for level, (inner, out) in enumerate(pairwise(dims)):
            kept += PAST * area * (inner + (2 * self.blocks - 1) * out)
            if level < len(self.factors) - 1:
                area /= 4
                if self.faster[len(self.faster) - 1 - level]:
                    kept += out * area
        return round(s * (kept + PAST * area * dims[-1] * 5))

    def _remembered(self, height: int, width: int) -> Iterator[tuple[int, float]]:
        """Channels and area of every input that the decoder's convolutions remember."""
        area = height * width / (self.stride[1] * self.stride[2])
        top = self.base * self.factors[-1]
        yield self.latent, area
        yield from [(top, area)] * 4  # two residual blocks in the middle, two convolutions each
        for level, (inner, out) in enumerate(self._levels()):
            yield inner, area
            yield from [(out, area)] * (2 * self.blocks + 1)
            if level < len(self.faster):
                if self.faster[level]:
                    yield out, area
                area *= 4
        yield self._levels()[-1][1], area

    def _levels(self) -> list[tuple[int, int]]:
        """Channels in and out of each level, deepest first; upsampling halves them."""
        dims = [self.base * f for f in (self.factors[-1], *reversed(self.factors))]
        return [(a if i == 0 else a // 2, b) for i, (a, b) in enumerate(pairwise(dims))]

    def decode_peak(self, frames: int, height: int, width: int, s: int) -> int:
        """Bytes alive at most while a chunk of `frames` latent frames is decoded, one after the other, beside what is
        kept: in the residual blocks of each level, or where it is enlarged, which is done in fp32."""
        chunk = frames
        h, w, frames, most = height // self.stride[1], width // self.stride[2], 1, 0.0
        wide = FP32 / s
        for level, (inner, out) in enumerate(self._levels()):
            unit = frames * h * w
            came, held = inner * unit, out * unit
            longer, padded = (frames + PAST) / frames, (h + 2) * (w + 2) / (h * w)
            copies = min(PAST, frames) / frames + longer * (1 + padded)  # what is remembered, joined, padded
            norm = 2 * wide if s != FP32 else 3
            most = max(most, came + held * (1 + 1 + copies), came + held * (2 + norm))
            if level < len(self.faster):
                frames *= 2 if self.faster[level] else 1
                moved = out * frames * h * w
                enlarged = 4 * moved
                grown = (1 + 4) * wide * moved if s != FP32 else enlarged
                turned = enlarged * (1 + wide) if s != FP32 else enlarged + enlarged / 2
                most = max(most, came + held + moved + max(grown, turned))
                h, w = 2 * h, 2 * w
        pixels = 3 * frames * height * width  # of the frame before, as numbers and clamped; of all before, as bytes
        return round(s * (most + 2 * pixels) + (chunk - 1) * pixels)


@dataclass(frozen=True)
class MagiVae:
    """MAGI-1's autoencoder: a vision transformer over tiles of 12 frames and 256 pixels."""

    width: int = 1024
    inner: int = 4  # of its MLP, in widths
    latent: int = 16
    parameters: int = 613_755_239
    stride: tuple[int, int, int] = (4, 8, 8)
    tile: tuple[int, int] = (12, 256)  # frames and pixels
    overlap: float = 0.25

    def decode_peak(self, frames: int, height: int, width: int, s: int) -> int:
        """Bytes alive at most while a chunk of `frames` latent frames is decoded: a tile in the transformer's
        attention, and the tiles before it; or the chunk's pixels becoming bytes."""
        deep, side = max(1, self.tile[0] // self.stride[0]), self.tile[1] // self.stride[1]
        cells = [height // self.stride[1], width // self.stride[2]]
        step = side - int(side * self.overlap)
        covered = [sum(min(side, n - start) for start in range(0, n, step)) for n in cells]
        last = [min(side, n - (n - 1) // step * step) for n in cells]
        per_cell = 3 * self.stride[0] * self.stride[1] * self.stride[2]
        together = min(deep, frames)
        tokens = 1 + together * min(side, cells[0]) * min(side, cells[1])
        before = together * (covered[0] * covered[1] - last[0] * last[1]) * per_cell * s  # tiles decoded already
        chunk = frames * cells[0] * cells[1] * per_cell
        # a tile's tokens, their places and three times three projections; or its MLP
        within = tokens * self.width * s * max(12, 4 + 2 * self.inner)
        return max(before + within, before + 2 * chunk * s, chunk * s + 2 * chunk * FP32)


WAN_VAE, MAGI_VAE = WanVae(), MagiVae()  # as published

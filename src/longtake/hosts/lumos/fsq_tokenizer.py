"""A small video tokenizer of our own: causal convolutions around a finite scalar quantiser, 4 × 8 × 8 pixels a code.

Decoding streams: each temporal convolution keeps the last two frames of its input, and nothing else of the past is
needed. Frames are normalised one by one, so no statistic looks ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ...errors import LongtakeError
from .fsq import FSQ
from .tokenizer import to_uint8

FOLD = 2  # pixels folded into channels, each way; two halvings follow, of time too
PAST = 2  # frames of its input that a temporal convolution looks back

Cache = dict[str, Tensor]  # by the name of the convolution: [B, C, PAST, h, w]


class CausalConv(nn.Module):
    """3-D convolution that sees, in time, a frame and the two before it; before the first there are zeros."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=(0, 1, 1))
        self.name = ""  # set by the tokenizer: where the past lies in a cache

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        if cache is None:
            return self.conv(F.pad(x, (0, 0, 0, 0, PAST, 0)))
        past = cache.get(self.name)
        x = torch.cat((x.new_zeros(*x.shape[:2], PAST, *x.shape[3:]) if past is None else past, x), 2)
        cache[self.name] = x[:, :, -PAST:].clone()
        return self.conv(x)


class FrameNorm(nn.Module):
    """RMS norm over channels, at every place by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.gain * x.shape[1] ** 0.5)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = FrameNorm(channels), FrameNorm(channels)
        self.conv1, self.conv2 = CausalConv(channels, channels), CausalConv(channels, channels)
        for p in self.conv2.parameters():
            nn.init.zeros_(p)  # the deep net begins almost linear

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), cache)
        return x + self.conv2(F.silu(self.norm2(y)), cache)


class Up(nn.Module):
    """Twice the frames and twice the height and width; the first frame of a video stays one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.time = CausalConv(inputs, 2 * inputs)
        self.space = CausalConv(inputs, outputs)

    def forward(self, x: Tensor, cache: Cache | None = None, first: bool = True) -> Tensor:
        y = self.time(x, cache).unflatten(1, (2, -1))  # [B, 2, C, f, h, w]
        y = y.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # [B, C, 2f, h, w]
        y = y[:, :, 1:] if first else y
        return self.space(y.repeat_interleave(2, -1).repeat_interleave(2, -2), cache)


class Encoder(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, outputs: int) -> None:
        super().__init__()
        self.enter = CausalConv(3 * FOLD**2, widths[0])
        self.stages = nn.ModuleList()
        for a, b in pairwise(widths):
            self.stages.extend([*(Residual(a) for _ in range(blocks)), CausalConv(a, b, stride=(2, 2, 2))])
        self.stages.extend(Residual(widths[-1]) for _ in range(blocks))
        self.norm, self.leave = FrameNorm(widths[-1]), CausalConv(widths[-1], outputs)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 1 + 4k, H, W] → [B, channels, 1 + k, h, w]."""
        frames = pixels.shape[2]
        x = F.pixel_unshuffle(pixels.transpose(1, 2).flatten(0, 1), FOLD)  # [B · T, 12, H / 2, W / 2]
        x = self.enter(x.unflatten(0, (-1, frames)).transpose(1, 2))
        for stage in self.stages:
            x = stage(x)
        return self.leave(F.silu(self.norm(x)))


class FrameDecoder(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, inputs: int) -> None:
        super().__init__()
        widths = widths[::-1]
        self.enter = CausalConv(inputs, widths[0])
        self.stages = nn.ModuleList(Residual(widths[0]) for _ in range(blocks))
        for a, b in pairwise(widths):
            self.stages.extend([Up(a, b), *(Residual(b) for _ in range(blocks))])
        self.norm, self.leave = FrameNorm(widths[-1]), CausalConv(widths[-1], 3 * FOLD**2)

    def forward(self, values: Tensor, cache: Cache | None = None, first: bool = True) -> Tensor:
        """Values [B, channels, f, h, w] → pixels [B, 3, T, H, W]; with a cache, of the next frames of a take."""
        x = self.enter(values, cache)
        for stage in self.stages:
            x = stage(x, cache, first) if isinstance(stage, Up) else stage(x, cache)
        x = self.leave(F.silu(self.norm(x)), cache)
        frames = x.shape[2]
        x = F.pixel_shuffle(x.transpose(1, 2).flatten(0, 1), FOLD)
        return x.unflatten(0, (-1, frames)).transpose(1, 2)


class FSQTokenizer(ModelMixin, ConfigMixin):
    """Pixels ↔ codes. `widths` are the channels at the three resolutions, `levels` those of the quantiser."""

    config_name = "config.json"
    stride = (4, 8, 8)

    @register_to_config
    def __init__(
        self, levels: Sequence[int] = (8, 5, 5, 5), widths: Sequence[int] = (24, 48, 96), blocks: int = 1
    ) -> None:
        super().__init__()
        if len(widths) != 3:
            raise LongtakeError(f"widths {list(widths)}: give three, at 2, 4 and 8 pixels a cell")
        self.fsq = FSQ(levels)
        self.encoder_net = Encoder(widths, blocks, len(levels))
        self.decoder_net = FrameDecoder(widths, blocks, len(levels))
        for name, module in self.named_modules():
            if isinstance(module, CausalConv):
                module.name = name

    @property
    def codes(self) -> int:
        return self.fsq.codes

    def quantised(self, video: Tensor) -> Tensor:
        """Float [B, 3, 1 + 4k, H, W] in [−1, 1] → values [B, channels, 1 + k, h, w], differentiable."""
        z = self.encoder_net(video.to(self.device, self.dtype))
        return self.fsq.quantise(z.movedim(1, -1)).movedim(-1, 1)

    def pixels(self, values: Tensor) -> Tensor:
        """Values of a whole clip → pixels [B, 3, 1 + 4(f − 1), H, W], not clamped, differentiable."""
        return self.decoder_net(values)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        frames, height, width = video.shape[2:]
        if (frames - 1) % 4 or height % 8 or width % 8:
            raise LongtakeError(
                f"video of {frames} frames, {height}x{width}: give 1, 5, 9, … frames, sides in multiples of 8"
            )
        return self.fsq.nearest(self.quantised(video).movedim(1, -1)).unsqueeze(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, 1, f, h, w] of a whole clip → float frames [B, 3, 1 + 4(f − 1), H, W] in [−1, 1]."""
        return self.pixels(self.as_values(codes)).float().clamp(-1, 1)

    def as_values(self, codes: Tensor) -> Tensor:
        """Codes [B, 1, f, h, w] → values [B, channels, f, h, w]."""
        return self.fsq.values(codes[:, 0].to(self.device)).movedim(-1, 1).to(self.dtype)

    def decoder(self) -> FSQDecoder:
        return FSQDecoder(self)

    def memory(self) -> int:
        return sum(p.nbytes for p in self.parameters())


class FSQDecoder:
    """Decodes one take frame by frame, so that any split into pieces gives the same bits."""

    def __init__(self, tokenizer: FSQTokenizer) -> None:
        self.tokenizer = tokenizer
        self.latent_frames = 0
        self.cache: Cache = {}

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """Codes [B, 1, f, h, w] → uint8 frames [B, T, H, W, 3]; the first latent frame gives 1, each later one 4."""
        frames = []
        for codes in latents.split(1, 2):
            values = self.tokenizer.as_values(codes)
            pixels = self.tokenizer.decoder_net(values, self.cache, first=self.latent_frames == 0)
            frames.append(to_uint8(pixels))
            self.latent_frames += 1
        return torch.cat(frames, 1)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return dict(self.cache), {"version": 1, "latent_frames": self.latent_frames}

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        if meta.get("version") != 1:
            raise LongtakeError(f"decoder snapshot has version {meta.get('version')!r}; this one continues 1 only")
        self.cache = {name: x.to(self.tokenizer.device) for name, x in tensors.items()}
        self.latent_frames = int(meta["latent_frames"])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.cache.values())

"""Streaming encode: pixel frames go in as they are decoded, their latents come out. The twin of `StreamingDecoder`.

Wan's encoder takes the first frame of a video alone and four at a time from then on, and carries the last two input
frames of every temporal convolution. These features are a value here (`TakeState`), handed in and out: the caches that
the VAE keeps for its own `encode` and `decode`, which one `clear_cache` wipes together, are never touched.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify
from torch import Tensor

from ..decoding import awake, mean_std
from ..errors import LongtakeError
from .base import TakeState

GROUP = 4  # frames the encoder takes at a time, after a first one of its own


class StreamingEncoder:
    """Encodes a take piece by piece with an `AutoencoderKLWan`; equals one `vae.encode` of all pieces together."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.slots = sum(isinstance(m, WanCausalConv3d) for m in vae.encoder.modules())

    @torch.no_grad()
    def encode(self, video: Tensor, state: TakeState) -> tuple[Tensor, TakeState]:
        """The next frames of a take to normalised latents [B, C, f, h, w], the posterior's mode, and the state after.

        video: [B, 3, T, H, W] in [-1, 1]; T = 4k + 1 for a new take (gives k + 1 latents), 4k after that (gives k).
        Raises LongtakeError for another number of frames, which the VAE would crop silently."""
        first = state.frames == 0
        rest = (video.shape[2] - first) % GROUP
        if rest or video.shape[2] == 0:
            takes = "1, 5, 9, …" if first else "4, 8, 12, …"
            raise LongtakeError(f"{video.shape[2]} frames to encode: this piece of a take has {takes} frames")
        device, dtype = awake(self.vae)
        x = video.to(device, dtype)
        if self.vae.config.patch_size is not None:
            x = patchify(x, patch_size=self.vae.config.patch_size)
        # the encoder rewrites the slots of the list it is given; tensors already in it are replaced, never changed
        cache: list[Tensor | None] = list(state.slots) or [None] * self.slots
        pieces = [x[:, :, :1], *x[:, :, 1:].split(GROUP, 2)] if first else list(x.split(GROUP, 2))
        parts = [self.vae.encoder(piece, feat_cache=cache, feat_idx=[0]) for piece in pieces if piece.shape[2]]
        latents = self.vae.quant_conv(torch.cat(parts, 2)).chunk(2, 1)[0]
        mean, std = mean_std(self.vae, latents.device)
        latents = ((latents.to(mean.dtype) - mean) / std).to(dtype)
        return latents, TakeState(tuple(cache), state.frames + video.shape[2])

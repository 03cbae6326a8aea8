"""Streaming decode: latent frames go in as they are made, their pixel frames come out, and nothing is decoded twice.

Wan's VAE is causal in time: each temporal convolution needs the last two frames of its own input and nothing else of
the past. A `StreamingDecoder` owns those frames, so any number of decoders can share one VAE. They are handed to the
VAE's decoder as an argument; the cache that the VAE keeps for its own `encode` and `decode` is never touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from longtake.errors import LongtakeError

AutoencoderKLWan = Any  # of diffusers; its attributes come from base classes that type checkers cannot see into
# The temporal upsampler writes this into its slot at the first latent frame; at the second it means "no past yet".
_NO_PAST = "Rep"
_SNAPSHOT_VERSION = 1
# Pixel frames that the stock encoder takes at a time, after a first one of its own; a remainder is dropped silently.
_ENCODER_GROUP = 4


class StreamingDecoder:
    """Decodes one take piece by piece with a shared `AutoencoderKLWan`; equals one `vae.decode` of all pieces together.

    The first latent frame gives 1 pixel frame, each later one 4 (for the published strides). `vae.enable_slicing()` has
    no effect here; tiling is refused, because each tile would need a cache of its own.

    Raises LongtakeError if `vae` is not a Wan VAE. After an exception inside the VAE (out of memory, Ctrl-C) the cache
    is half-written and the decoder refuses to go on until `reset` or `load_state_dict`: keeping the old cache until
    the new one is whole would double its bytes.
    """

    def __init__(self, vae: AutoencoderKLWan):
        slots = sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules()) if hasattr(vae, "decoder") else 0
        if slots == 0 or not hasattr(vae, "post_quant_conv"):
            raise LongtakeError(
                f"StreamingDecoder needs a diffusers AutoencoderKLWan, got {type(vae).__name__}; "
                "load one with AutoencoderKLWan.from_pretrained"
            )
        self.vae = vae
        self._slots = slots
        self.reset()

    def reset(self) -> None:
        """Forget the take: the next latent frame is a first frame again."""
        self.latent_frames = 0  # latent frames decoded so far
        self._cache: list[Tensor | str | None] = [None] * self._slots
        self._shape: tuple[int, ...] | None = None  # (B, C, h, w) of this take
        self._torn = False

    @property
    def nbytes(self) -> int:
        """Bytes of the feature cache held now: 0 before the first frame, constant from the third on."""
        return sum(slot.nbytes for slot in self._cache if isinstance(slot, Tensor))

    def push(self, latents: Tensor) -> Tensor:
        """Decode to uint8 frames [B, T, H, W, 3], on the VAE's device; `latents` as in `decode`."""
        # Each piece is converted at once, so that floats of one latent frame are held, not of the whole chunk.
        return torch.cat([_to_uint8(piece) for piece in self._pieces(latents)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames of the take.

        latents: [B, C, f, h, w], normalised as the model makes them, any f >= 1; B, C, h, w the same at every call.
        Returns [B, 3, T, H, W] in [-1, 1], in the VAE's dtype and on its device.
        Raises LongtakeError for another shape, a tiled VAE, or a cache left half-written by an exception.
        """
        return torch.cat(list(self._pieces(latents)), dim=2)

    @torch.no_grad()
    def _pieces(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the pixel frames of one latent frame after the other, each [B, 3, 1 or 4, H, W]."""
        self._check(latents)
        device, dtype = awake(self.vae)
        mean, std = mean_std(self.vae, device)
        x = self.vae.post_quant_conv((latents.to(device, mean.dtype) * std + mean).to(dtype))
        self._torn = True
        for i in range(x.shape[2]):
            # The decoder rewrites the slots of the list it is given; tensors already in it are replaced, never changed.
            pixels = self.vae.decoder(
                x[:, :, i : i + 1], feat_cache=self._cache, feat_idx=[0], first_chunk=self.latent_frames == 0
            )
            if self.vae.config.patch_size is not None:
                pixels = unpatchify(pixels, patch_size=self.vae.config.patch_size)
            self.latent_frames += 1
            yield pixels.clamp(-1.0, 1.0)
        self._shape = _take_shape(latents)
        self._torn = False

    def _check(self, latents: Tensor) -> None:
        self._check_whole()
        channels = self.vae.config.z_dim
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise LongtakeError(
                f"latents have shape {tuple(latents.shape)}; the decoder takes [B, {channels}, frames >= 1, h, w]"
            )
        if self._shape is not None and _take_shape(latents) != self._shape:
            raise LongtakeError(
                f"latents are (B, C, h, w) = {_take_shape(latents)}, but this take began with {self._shape}; "
                "use one StreamingDecoder per take"
            )
        if self.vae.use_tiling:
            scale = self.vae.spatial_compression_ratio
            tile = (self.vae.tile_sample_min_height // scale, self.vae.tile_sample_min_width // scale)
            if latents.shape[3] > tile[0] or latents.shape[4] > tile[1]:
                raise LongtakeError(
                    f"the VAE is set to decode {latents.shape[3]}x{latents.shape[4]} latents in tiles of "
                    f"{tile[0]}x{tile[1]}, which cannot be streamed; call vae.disable_tiling()"
                )

    def _check_whole(self) -> None:
        if self._torn:
            raise LongtakeError(
                "the last decode was interrupted and left the decoder's cache half-written; "
                "load_state_dict a snapshot, or reset() to begin a new take"
            )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The decoder's whole state as (tensors for safetensors, metadata for JSON); `load_state_dict` takes both back.

        Tensors stay on their device and are shared where possible: the decoder never writes into them again.
        """
        self._check_whole()
        tensors: dict[str, Tensor] = {}
        slots: list[list[int] | str | None] = []
        for i, slot in enumerate(self._cache):
            if isinstance(slot, Tensor):
                tensors[f"slot.{i:03d}"] = slot.contiguous()
                # Strides can steer which convolution kernel runs: kept, so that a restored take runs the same ones.
                slots.append(list(slot.stride()))
            else:
                slots.append(slot)
        meta = {
            "version": _SNAPSHOT_VERSION,
            "latent_frames": self.latent_frames,
            "shape": None if self._shape is None else list(self._shape),
            "dtype": str(self.vae.dtype),
            "slots": slots,
        }
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit. Raises LongtakeError if it does not fit this VAE."""
        expected = {"version": _SNAPSHOT_VERSION, "dtype": str(self.vae.dtype)}
        for key, value in expected.items():
            if meta.get(key) != value:
                raise LongtakeError(f"decoder snapshot has {key} {meta.get(key)!r}; this VAE continues {value!r} only")
        slots = list(meta.get("slots", ()))
        if len(slots) != self._slots:
            raise LongtakeError(f"decoder snapshot has {len(slots)} cache slots, this VAE has {self._slots}")
        names = {f"slot.{i:03d}" for i, slot in enumerate(slots) if isinstance(slot, (list, tuple))}
        unknown = [slot for slot in slots if not (slot is None or slot == _NO_PAST or isinstance(slot, (list, tuple)))]
        if names != set(tensors) or unknown:
            raise LongtakeError("decoder snapshot's tensors do not match its metadata; take the snapshot again")
        device, _ = awake(self.vae)
        cache = [
            _with_stride(tensors[f"slot.{i:03d}"], slot, device) if isinstance(slot, (list, tuple)) else slot
            for i, slot in enumerate(slots)
        ]
        self.reset()
        self._cache = cache
        self.latent_frames = int(meta["latent_frames"])
        self._shape = None if meta["shape"] is None else tuple(meta["shape"])


@torch.no_grad()
def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Pixels to normalised latents: the posterior's mode, so the same video always gives the same latents.

    video: [B, 3, T, H, W], floating point in [-1, 1], T = 4k + 1. Returns [B, C, k + 1, h, w] in the VAE's dtype.
    Raises LongtakeError for a shape or dtype the VAE would misread or silently crop. No StreamingDecoder is affected.
    """
    if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape or not video.is_floating_point():
        raise LongtakeError(
            f"video is {video.dtype} {tuple(video.shape)}; the encoder takes floating point [B, 3, T, H, W] in [-1, 1]"
        )
    frames, height, width = video.shape[2:]
    rest = (frames - 1) % _ENCODER_GROUP
    if rest:
        raise LongtakeError(
            f"video has {frames} frames; the VAE takes 1, 5, 9, ...: pass the first {frames - rest}, "
            f"or add {_ENCODER_GROUP - rest}"
        )
    factor = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)  # pixels per latent, each side
    if height % factor or width % factor:
        raise LongtakeError(
            f"video is {height}x{width}; height and width must be multiples of {factor}: "
            f"crop it to {height // factor * factor}x{width // factor * factor}"
        )
    device, dtype = awake(vae)
    latents = vae.encode(video.to(device, dtype)).latent_dist.mode()
    mean, std = mean_std(vae, latents.device)
    return ((latents.to(mean.dtype) - mean) / std).to(dtype)


def half_on_cpu(device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
    """Half precision for an autoencoder where a grey level or two do not matter: on a CPU that has it, in about a third
    of the time. Elsewhere nothing."""
    if torch.device(device).type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


@apply_forward_hook
def awake(vae: AutoencoderKLWan) -> tuple[torch.device, torch.dtype]:
    """Where and in what the VAE computes; the decorator first wakes a VAE parked by `enable_model_cpu_offload`."""
    return vae.device, vae.dtype


def mean_std(vae: AutoencoderKLWan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latent statistics of the VAE's config, [1, C, 1, 1, 1] each, in fp32 or better: bf16 would cost 8 bits here."""
    dtype = torch.promote_types(vae.dtype, torch.float32)
    mean, std = (
        torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def _take_shape(latents: Tensor) -> tuple[int, ...]:
    """(B, C, h, w): what must not change within a take."""
    return (*latents.shape[:2], *latents.shape[3:])


def _to_uint8(pixels: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] to uint8 [B, T, H, W, 3], rounded to nearest."""
    return pixels.permute(0, 2, 3, 4, 1).float().mul(0.5).add(0.5).mul(255.0).round().to(torch.uint8).contiguous()


def _with_stride(tensor: Tensor, stride: list[int] | tuple[int, ...], device: torch.device) -> Tensor:
    """A copy of `tensor` on `device`, laid out in memory with `stride`."""
    return torch.empty_strided(tensor.shape, tuple(stride), dtype=tensor.dtype, device=device).copy_(tensor)

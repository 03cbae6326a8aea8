"""What causal Wan2.1 and SkyReels-V2 have in common: one transformer, one autoencoder, one text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from ..flops import FlopShape
from ..geometry import Geometry
from ..plan import HistoryShape
from . import peaks
from .anatomy import Anatomy
from .request import ModelShape
from .vae import WAN_VAE, WanVae

UMT5_PARAMETERS = 5_680_910_336  # of the encoder of UMT5-XXL
EMBEDDED_TIMES = 256  # channels of the sinusoidal time embedding
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class WanSizes(ModelShape):
    """Sizes of a transformer of the Wan2.1 kind, and of what stands around it."""

    layers: int
    hidden: int
    ffn: int
    head_dim: int = 128
    channels: int = 16  # latent
    patch: tuple[int, int, int] = (1, 2, 2)
    text_tokens: int = 512  # padded, and attended to
    text_width: int = 4096
    times: int = EMBEDDED_TIMES
    rates: bool = False  # whether the frame rate is embedded too
    streams: int = 1  # guidance branches
    chunk_frames: int = 3
    steps: int = 4
    vae: WanVae | None = WAN_VAE
    compressor_parameters: int = 0  # of a trained compressor
    encoder_parameters: int = UMT5_PARAMETERS
    encoder_itemsize: int = 2

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def flop_shape(self) -> FlopShape:
        return FlopShape.of_wan(self.layers, self.hidden, self.ffn, self._patched)

    @property
    def _patched(self) -> int:
        """Values that a token is embedded from."""
        return self.channels * self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def weights(self) -> int:
        """Bytes of the transformer: time embedding, modulation tables and cross-attention norms are kept in fp32."""
        d, m, wide = self.hidden, self.ffn, 2 * self.hidden
        block = 8 * d * d + 8 * d + 4 * d + 2 * d * m + m + d  # two attentions, their QK norms, MLP
        outer = self._patched * d + d + d * self._patched + self._patched  # patch embedding, head
        text = self.text_width * d + d + d * d + d
        outer += text + 6 * d * d + 6 * d
        full = (wide + 6 * d) * self.layers + wide + self.times * d + d + d * d + d
        rates = 2 * d + (d * d + d) + (d * 6 * d + 6 * d) if self.rates else 0
        return self.itemsize * (self.layers * block + outer + rates) + FP32 * full

    def geometry(self, height: int, width: int, chunk: int | None = None) -> Geometry:
        stride = (4, 8, 8) if self.vae is None else self.vae.stride
        return Geometry(height, width, self.channels, chunk or self.chunk_frames, self.fps, stride, self.patch)

    def unit(self) -> int:
        """Pixels that a side is a multiple of."""
        return self.patch[1] * (8 if self.vae is None else self.vae.stride[1])

    def history(self, geometry: Geometry, frames: int | None, **known: Any) -> HistoryShape:
        """What a policy is told of a take; compressed blocks are those of PackForcing, 2 × 4 × 4 tokens in one."""
        rows, columns = geometry.grid
        small = max(1, geometry.chunk_frames // 2) * max(1, rows // 4) * max(1, columns // 4)
        return replace(
            HistoryShape(
                self.layers, self.heads, self.head_dim, self.itemsize, geometry.tokens_per_frame,
                geometry.chunk_frames, streams=self.streams, frames=frames, compressed_tokens=small,
                training_frames=self.training_frames, decay=self.decay,
            ), **known,
        )  # fmt: skip

    def anatomy_of(
        self, geometry: Geometry, sizes: HistoryShape, *, latents: int = 0, idle_rope: bool, held_first: bool
    ) -> Anatomy:
        """`latents` bytes are held between chunks; `idle_rope` and `held_first` are the host's ways: the stock class
        makes rotary tables that nobody reads, and the embedded patches are held on to."""
        s, n, d = self.itemsize, sizes.chunk_tokens, self.hidden
        h, w = geometry.latent_size
        rope = 2 * n * self.head_dim * FP32 if idle_rope else 0
        text = s * self.text_tokens * (self.text_width + 2 * self.layers * d)
        vae = self.vae
        width = 18 * d + 2 * self.ffn  # values that a token's matrix products and attentions read and write
        return Anatomy(
            sizes=sizes, chunk_latents=FP32 * self.channels * geometry.chunk_frames * h * w,
            weights={"transformer": self.weights, **({} if vae is None else {"vae": s * vae.parameters})},
            encoder=self.encoder_itemsize * self.encoder_parameters, text=text * self.streams,
            decoder=None if vae is None else vae.decoder_state(geometry.height, geometry.width, s),
            decode=None if vae is None else vae.decode_peak(geometry.chunk_frames, geometry.height, geometry.width, s),
            compressor=self._compressor(geometry), latents=latents,
            forward=peaks.wan_forward(n, d, self.ffn, s, rope=rope, first=n * d * s if held_first else 0),
            pairs=self.head_dim // 2, query=d, flop_shape=self.flop_shape,
            streamed=s * self.layers * self.flop_shape.weights, token_traffic=s * self.layers * width,
        )  # fmt: skip

    def _compressor(self, geometry: Geometry) -> int:
        """Weights of a compressor, and what the low-resolution branch carries on: a streaming encode of pictures of a
        quarter of the sides."""
        weights = self.itemsize * self.compressor_parameters
        if self.vae is None:
            return weights
        sides = []
        for side, cells, stride, patch in zip(
            (geometry.height, geometry.width), geometry.grid, geometry.stride[1:], geometry.patch[1:], strict=True
        ):
            sides.append(max(max(1, cells // 4) * patch * stride, side // 4 // stride * stride))
        return weights + self.vae.encoder_state(sides[0], sides[1], self.itemsize)

    @classmethod
    def of(
        cls, name: str, transformer: Mapping[str, Any], run: Mapping[str, Any], *, itemsize: int,
        vae: WanVae | None = None, encoder_parameters: int = 0, **known: Any,
    ) -> Self:  # fmt: skip
        """Of a model in diffusers format: `transformer` is its configuration, `run` how it is run (longtake.json)."""
        dim = transformer["attention_head_dim"]
        return cls(
            name=name, about=run.get("about", ""), width=run["width"], height=run["height"], fps=run["fps"],
            itemsize=itemsize, layers=transformer["num_layers"], hidden=transformer["num_attention_heads"] * dim,
            ffn=transformer["ffn_dim"], head_dim=dim, channels=transformer["in_channels"],
            patch=tuple(transformer["patch_size"]), text_tokens=run["text_tokens"],
            text_width=transformer["text_dim"], times=transformer["freq_dim"],
            rates=bool(transformer.get("inject_sample_info")), streams=1 if run["guidance_scale"] == 1 else 2,
            chunk_frames=run["chunk_frames"], steps=run.get("steps") or len(run["timesteps"]), vae=vae,
            encoder_parameters=encoder_parameters, encoder_itemsize=itemsize,
            training_frames=run["training_frames"], **known,
        )  # fmt: skip

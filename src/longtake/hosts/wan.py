"""Causal Wan2.1: Self-Forcing and its descendants on the stock diffusers classes, through attention processors.

Self-attention goes through a LayerView, which owns positions, K/V and the attention call. Cross-attention K/V are
computed once per prompt. A processor with nothing bound falls back to the stock one, so the pipeline the weights came
from keeps working as before, and `release` puts the original processors back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..attention import attend
from ..compressors import Compressor, LowResolution, MeanPool, StreamingEncoder
from ..decoding import StreamingDecoder, encode
from ..errors import LongtakeError
from ..flops import FlopShape
from ..geometry import Geometry
from ..history import LayerView
from ..rope import wan_table
from .base import Host, HostConfig, TextState
from .prompts import PromptReader
from .reusable import forward_residual, latent_feature, timestep_feature


class _Processor:
    """What the two processors share: the attributes diffusers sets, and the stock processor to fall back to."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self._attention_backend = getattr(stock, "_attention_backend", None)
        self._parallel_config = getattr(stock, "_parallel_config", None)


class CausalSelfAttention(_Processor):
    """`attn1`: projections and QK norm here; rotation, history and attention in the view."""

    view: LayerView | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: Any = None,
    ) -> Tensor:  # fmt: skip
        if self.view is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        q, k, v = _project(attn, hidden_states)
        out = self.view.attend(q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(hidden_states)))


class TextCrossAttention(_Processor):
    """`attn2`: queries against the prompt's K/V, computed once."""

    kv: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: Any = None,
    ) -> Tensor:  # fmt: skip
        if self.kv is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        out = attend(q, *self.kv, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(hidden_states)))


class CausalWan(PromptReader, Host):
    """A `WanTransformer3DModel` with causal weights, its VAE and its text encoder.

    `text_encoder` may be None when prompts are given as embeddings only. Raises LongtakeError for an image-to-video
    transformer, whose extra image tokens have no place in a causal rollout.
    """

    def __init__(
        self, transformer: Any, config: HostConfig, *, vae: Any = None, text_encoder: Any = None, tokenizer: Any = None,
        name: str = "wan", after_encoding: str | None = None, compressor: Compressor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        wan = transformer.config
        if wan.in_channels != wan.out_channels or wan.added_kv_proj_dim is not None:
            raise LongtakeError(
                f"{name}: an image-to-video transformer ({wan.in_channels} channels in, {wan.out_channels} out); "
                "causal rollouts need a text-to-video one, a first image is given by `image=`"
            )
        self.name, self.config = name, config
        self.transformer, self.vae, self.text_encoder, self.tokenizer = transformer, vae, text_encoder, tokenizer
        # training-free unless the model brings its own: pooled pixels, encoded again, or latents where there is no VAE
        self.compressor = compressor or (MeanPool() if vae is None else LowResolution())
        self.after_encoding = after_encoding  # None: the encoder stays wherever its owner put it
        self.layers, self.kv_heads, self.head_dim = wan.num_layers, wan.num_attention_heads, wan.attention_head_dim
        self.rotary = wan_table(self.head_dim)
        width, patch = self.kv_heads * self.head_dim, math.prod(wan.patch_size)
        self.flop_shape = FlopShape.of_wan(
            self.layers, width, wan.ffn_dim, wan.in_channels * patch, wan.out_channels * patch
        )
        # the fp32 islands (norms, time embedder) are diffusers' own choice; the patch embedding has the working type
        self.dtype = transformer.patch_embedding.weight.dtype
        self.device = transformer.patch_embedding.weight.device
        self._originals = [(b.attn1.processor, b.attn2.processor) for b in transformer.blocks]
        self._self = [CausalSelfAttention(p) for p, _ in self._originals]
        self._cross = [TextCrossAttention(p) for _, p in self._originals]
        for block, ours, text in zip(transformer.blocks, self._self, self._cross, strict=True):
            block.attn1.set_processor(ours)
            block.attn2.set_processor(text)
        self._no_text = torch.zeros(1, 1, wan.text_dim, dtype=self.dtype, device=self.device)

    def release(self) -> None:
        """Put the transformer's own processors back; the host is of no use afterwards."""
        if self._released():
            return  # whoever holds the transformer now keeps it
        for block, (first, second) in zip(self.transformer.blocks, self._originals, strict=True):
            block.attn1.set_processor(first)
            block.attn2.set_processor(second)

    def _released(self) -> bool:
        return self.transformer.blocks[0].attn1.processor is not self._self[0]

    def geometry(self, height: int | None = None, width: int | None = None) -> Geometry:
        stride = (4, 8, 8)
        if self.vae is not None:
            stride = (self.vae.config.scale_factor_temporal, *([self.vae.config.scale_factor_spatial] * 2))
        return Geometry(
            self.config.height if height is None else height, self.config.width if width is None else width,
            self.transformer.config.in_channels, self.config.chunk_frames, self.config.fps, stride,
            tuple(self.transformer.config.patch_size),
        )  # fmt: skip

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        shape = f"[prompts, {self.config.text_tokens}, {self.transformer.config.text_dim}]"
        limit = self.config.text_tokens  # padding is zero, and attended to
        return self.read(prompts, padding="max_length", limit=limit, dtype=self.dtype, instead=shape)

    @torch.no_grad()
    def text_state(self, embeds: Tensor) -> TextState:
        if embeds.shape[-1] != self.transformer.config.text_dim:
            raise LongtakeError(
                f"prompt embeddings of shape {tuple(embeds.shape)}: {self.name} takes "
                f"[prompts, {self.config.text_tokens}, {self.transformer.config.text_dim}]"
            )
        # a copy: where a tensor lies in memory steers how some kernels round, and a restored one lies elsewhere
        embeds = embeds.to(self.device, self.dtype).clone(memory_format=torch.contiguous_format)
        text = self.transformer.condition_embedder.text_embedder(embeds)
        k, v = [], []
        for block in self.transformer.blocks:
            attn = block.attn2
            if getattr(attn, "fused_projections", False):
                key, value = attn.to_kv(text).chunk(2, -1)
            else:
                key, value = attn.to_k(text), attn.to_v(text)
            k.append(attn.norm_k(key).unflatten(2, (attn.heads, -1)))
            v.append(value.unflatten(2, (attn.heads, -1)))
        return TextState(embeds, k, v)

    def positions(self, geometry: Geometry, frame: int, span: int) -> tuple[Tensor, Tensor]:
        rows, columns = geometry.grid
        axes = [
            torch.arange(start, start + n, dtype=torch.float64) for start, n in ((frame, span), (0, rows), (0, columns))
        ]
        base = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        step = torch.zeros_like(base)
        step[:, 0] = 1
        return base, step

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView]) -> Tensor:
        if self._released():  # the chunk would be generated without its past
            raise LongtakeError(f"{self.name}: this host was released; make a new one with longtake.load")
        with self.bound(text, layers):
            return self.velocity(latents, timestep)

    @torch.no_grad()
    def embed(self, latents: Tensor) -> Tensor:
        return self.transformer.patch_embedding(latents.to(self.device, self.dtype)).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def carry(self, tokens: Tensor, timestep: float, text: TextState, layers: list[LayerView]) -> Tensor:
        with self.bound(text, layers):
            return self.through(tokens, timestep)

    def project(self, tokens: Tensor, layers: list[Any]) -> Tensor:
        tokens = tokens.to(self.device, self.dtype)
        for block, view in zip(self.transformer.blocks, layers, strict=True):
            _, k, v = _project(block.attn1, tokens)
            view.put(k, v)
        return v

    # Within `bound`, and in whatever gradient mode the caller is in: what training calls.

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """`forward` with layers and text bound already."""
        batch = latents.shape[0]
        return self.transformer(
            hidden_states=latents.to(self.device, self.dtype),
            timestep=torch.full((batch,), timestep, dtype=torch.float32, device=self.device),
            encoder_hidden_states=self._no_text.expand(batch, -1, -1),
            return_dict=False,
        )[0]

    def through(self, tokens: Tensor, timestep: float) -> Tensor:
        """`carry` with layers and text bound already."""
        batch = tokens.shape[0]
        times = torch.full((batch,), timestep, dtype=torch.float32, device=self.device)
        _, modulation, no_text, _ = self.transformer.condition_embedder(times, self._no_text.expand(batch, -1, -1))
        modulation = modulation.unflatten(1, (6, -1))
        hidden = tokens.to(self.device, self.dtype).contiguous()
        for block in self.transformer.blocks:
            hidden = block(hidden, no_text, modulation, None)  # positions are the views' affair
        return hidden

    @contextmanager
    def bound(self, text: TextState, layers: list[Any]) -> Iterator[None]:
        """While it is open, attention goes through `layers` and looks at `text`."""
        with self.lock:
            try:
                for i, view in enumerate(layers):
                    self._self[i].view = view
                    self._cross[i].kv = (text.k[i], text.v[i])
                yield
            finally:
                for own, cross in zip(self._self, self._cross, strict=True):
                    own.view, cross.kv = None, None

    @torch.no_grad()
    def feature(self, metric: str, latents: Tensor | None, timestep: float) -> Tensor:
        if metric == "latent" and latents is not None:
            return latent_feature(self.transformer.patch_embedding, latents)
        return timestep_feature(self.transformer.condition_embedder, timestep)

    @torch.no_grad()
    def forward_residual(
        self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView], residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        with self.lock:
            return forward_residual(self.transformer, lambda: self.forward(latents, timestep, text, layers), residual)

    def decoder(self) -> StreamingDecoder:
        return StreamingDecoder(self._vae())

    def encoder(self) -> StreamingEncoder:
        return StreamingEncoder(self._vae())

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        with self.lock:
            return encode(self._vae(), video).to(self.device)

    @property
    def network(self) -> Any:
        return self.transformer

    def memory(self) -> dict[str, int]:
        parts = {"transformer": self.transformer, "vae": self.vae, "text_encoder": self.text_encoder}
        return {name: sum(p.nbytes for p in part.parameters()) for name, part in parts.items() if part is not None}

    def _vae(self) -> Any:
        if self.vae is None:
            raise LongtakeError(
                f"{self.name} was loaded without a VAE: ask the session for latents only (decode=False)"
            )
        return self.vae


def _project(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, N, H, D] of self-attention, after QK norm and before rotation."""
    if getattr(attn, "fused_projections", False):
        q, k, v = attn.to_qkv(hidden_states).chunk(3, -1)
    else:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
    return q, k, v

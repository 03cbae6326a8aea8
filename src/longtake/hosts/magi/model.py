"""MAGI-1's video transformer under the published parameter names, with the past behind a seam.

One block: a shared LayerNorm feeds self- and cross-attention side by side; their outputs alternate in eight slices
before one projection; a gate capped by tanh multiplies each branch's output, a LayerNorm follows it, then the residual.
There is no shift or scale modulation: the time enters through the gates alone. Self-attention goes through a
`LayerView`, which owns rotation, K/V and the attention call.

Shapes: B takes, C latent channels, F latent frames, N = F·h·w tokens, E hidden size, Hq query heads, Hk KV heads, D
head dim, T text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ...attention import attend
from ...history import LayerView
from ...rope import RotaryTable

WAVES = 256  # channels of the sinusoidal time embedding
TIME_SCALE = 1000  # times in 0 … 1 (and step sizes) are embedded a thousand times larger
MAX_PERIOD = 10000
REFERENCE_AREA = 16 * 16  # token grids are stretched to this area, so that one set of bands serves every resolution


class CenteredLayerNorm(nn.LayerNorm):
    """LayerNorm in fp32 whose stored weight is γ − 1; the result has the input's dtype."""

    def __init__(self, size: int, eps: float, one_plus: bool = True) -> None:
        super().__init__(size, eps=eps)
        self.one_plus = one_plus
        if one_plus:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + 1 if self.one_plus else self.weight.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, self.bias.float(), self.eps).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """Times [n] in 0 … 1, or step sizes, to [n, E/4]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WAVES, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        half = WAVES // 2
        rate = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t.float()[:, None] * rate * TIME_SCALE
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(next(self.mlp.parameters()).dtype))


class CaptionEmbedder(nn.Module):
    """Text to cross-attention tokens, and the learned null caption: its rows are the text of passes without text, its
    last two the conditioning vectors of passes without and with text."""

    def __init__(self, channels: int, length: int, size: int, condition: int) -> None:
        super().__init__()
        self.y_proj_xattn = nn.Sequential(nn.Linear(channels, size), nn.SiLU())
        self.y_proj_adaln = nn.Sequential(nn.Linear(channels, condition))
        self.null_caption_embedding = nn.Parameter(torch.zeros(length, channels))

    def text(self, embeds: Tensor) -> Tensor:
        """[..., T, channels] → [..., T, E]."""
        return self.y_proj_xattn(embeds.to(self.null_caption_embedding))

    def condition(self, null: bool) -> Tensor:
        """[E/4]."""
        return self.y_proj_adaln(self.null_caption_embedding[-1 if null else -2])


class Gates(nn.Module):
    """The condition vector [n, E/4] to what multiplies the attention's and the MLP's output: two of [n, E]."""

    def __init__(self, condition: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(condition, 2 * size))

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.proj(F.silu(condition).to(next(self.proj.parameters()).dtype))
        attention, mlp = cap(gates).chunk(2, -1)
        return attention, mlp


def cap(gates: Tensor) -> Tensor:
    """Gates softly capped to −1 … 1."""
    return torch.tanh(gates.float()).to(gates.dtype)


class NormedProjections(nn.Module):
    """The block's pre-norm and the projections of its output: queries for self- and cross-attention, keys, values."""

    def __init__(self, size: int, query: int, kv: int, eps: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(size, eps=eps)
        self.q, self.qx = nn.Linear(size, query, bias=False), nn.Linear(size, query, bias=False)
        self.k, self.v = nn.Linear(size, kv, bias=False), nn.Linear(size, kv, bias=False)


class Attention(nn.Module):
    """Self- and cross-attention of the same normalised input, interleaved and projected."""

    SLICES = 8  # in which the two outputs alternate: the layout the weights were trained in

    def __init__(self, size: int, heads: int, kv_heads: int, dim: int, text: int, eps: float, one_plus: bool) -> None:
        super().__init__()
        self.dim = dim
        self.linear_qkv = NormedProjections(size, heads * dim, kv_heads * dim, eps)
        self.linear_kv_xattn = nn.Linear(text, 2 * kv_heads * dim, bias=False)
        self.linear_proj = nn.Linear(2 * heads * dim, size, bias=False)
        self.q_layernorm = CenteredLayerNorm(dim, eps, one_plus)
        self.k_layernorm = CenteredLayerNorm(dim, eps, one_plus)
        self.q_layernorm_xattn = CenteredLayerNorm(dim, eps, one_plus)
        self.k_layernorm_xattn = CenteredLayerNorm(dim, eps, one_plus)

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [..., T, E] → K and V [..., T, Hk, D]; they depend on nothing else."""
        kv = self.linear_kv_xattn(text.to(self.linear_kv_xattn.weight.dtype))
        k, v = kv.unflatten(-1, (-1, 2 * self.dim)).chunk(2, -1)  # per head K | V
        return self.k_layernorm_xattn(k), v

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised input [B, N, E] → un-rotated q [B, N, Hq, D], k and v [B, N, Hk, D]."""
        make = self.linear_qkv
        q, k, v = (layer(x).unflatten(-1, (-1, self.dim)) for layer in (make.q, make.k, make.v))
        return self.q_layernorm(q), self.k_layernorm(k), v

    def cross_queries(self, x: Tensor) -> Tensor:
        return self.q_layernorm_xattn(self.linear_qkv.qx(x).unflatten(-1, (-1, self.dim)))

    def heads(self, hidden: Tensor, view: LayerView, text: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Outputs [B, N, Hq·D] of self- and of cross-attention; `text` has K and V [1, T, Hk, D] of every take."""
        x = self.linear_qkv.layer_norm(hidden)
        own = view.attend(*self.qkv(x)).flatten(2)
        queries = self.cross_queries(x)
        if len(text) == 1:
            return own, _cross(queries, *text[0])
        # takes have prompts of different length: each its own call, nothing is padded
        return own, torch.cat([_cross(q, *kv) for q, kv in zip(queries.split(1), text, strict=True)])

    def forward(self, hidden: Tensor, view: LayerView, text: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        parts = [part.unflatten(-1, (self.SLICES, -1)) for part in self.heads(hidden, view, text)]
        return self.linear_proj(torch.stack(parts, 3).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, size: int, inner: int, eps: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(size, eps=eps)
        self.linear_fc1 = nn.Linear(size, inner, bias=False)
        self.linear_fc2 = nn.Linear(inner, size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(self.layer_norm(hidden))))


class Block(nn.Module):
    def __init__(self, c: ConfigMixin) -> None:
        super().__init__()
        size, eps, one_plus = c.hidden_size, c.layernorm_epsilon, c.apply_layernorm_1p
        self.ada_modulate_layer = Gates(int(size * c.cond_hidden_ratio), size)
        self.self_attention = Attention(
            size, c.num_attention_heads, c.num_query_groups, c.kv_channels, int(size * c.xattn_cond_hidden_ratio), eps,
            one_plus,
        )  # fmt: skip
        self.self_attn_post_norm = CenteredLayerNorm(size, eps, one_plus)
        self.mlp = FeedForward(size, c.ffn_hidden_size, eps)
        self.mlp_post_norm = CenteredLayerNorm(size, eps, one_plus)

    def forward(
        self, hidden: Tensor, condition: Tensor, view: LayerView, text: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """hidden [B, N, E], condition [1, E/4] → [B, N, E]."""
        attention_gate, mlp_gate = self.ada_modulate_layer(condition)
        hidden = self._join(hidden, self.self_attention(hidden, view, text), attention_gate, self.self_attn_post_norm)
        return self._join(hidden, self.mlp(hidden), mlp_gate, self.mlp_post_norm)

    @staticmethod
    def _join(hidden: Tensor, branch: Tensor, gate: Tensor, norm: nn.Module) -> Tensor:
        return (norm(branch.float() * gate.float()) + hidden.float()).to(hidden.dtype)


class Stack(nn.Module):
    """Holds the blocks under the published names."""

    def __init__(self, c: ConfigMixin) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.final_layernorm = CenteredLayerNorm(c.hidden_size, c.layernorm_epsilon, c.apply_layernorm_1p)

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)  # type: ignore[arg-type]


class Bands(nn.Module):
    """Learned rotary frequencies, one ladder for all three axes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.bands = nn.Parameter(MAX_PERIOD ** (-torch.arange(count, dtype=torch.float32) / count))


class FinalLinear(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, out, bias=False)


class MagiTransformer3DModel(ModelMixin, ConfigMixin):
    """MAGI-1's diffusion transformer; the defaults are the 4.5B model, the names of config and parameters the published
    ones. The 24B variant (gated feed-forward, doubled latent channels) is not supported."""

    _keep_in_fp32_modules = [  # noqa: RUF012 (diffusers' name and type)
        "x_embedder", "t_embedder", "y_embedder", "q_layernorm", "k_layernorm", "q_layernorm_xattn",
        "k_layernorm_xattn", "self_attn_post_norm", "mlp_post_norm", "final_layernorm", "final_linear", "rope",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self, num_layers: int = 34, hidden_size: int = 3072, ffn_hidden_size: int = 12288,
        num_attention_heads: int = 24, num_query_groups: int = 8, kv_channels: int = 128,
        layernorm_epsilon: float = 1e-6, apply_layernorm_1p: bool = True, x_rescale_factor: float = 1.0,
        patch_size: int = 2, in_channels: int = 16, out_channels: int = 16, cond_hidden_ratio: float = 0.25,
        caption_channels: int = 4096, caption_max_length: int = 800, xattn_cond_hidden_ratio: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        condition = int(hidden_size * cond_hidden_ratio)
        self.x_embedder = nn.Conv3d(
            in_channels, hidden_size, (1, patch_size, patch_size), (1, patch_size, patch_size), bias=False
        )
        self.t_embedder = TimestepEmbedder(condition)
        self.y_embedder = CaptionEmbedder(
            caption_channels, caption_max_length, int(hidden_size * xattn_cond_hidden_ratio), condition
        )
        self.rope = Bands(kv_channels // 8)
        self.videodit_blocks = Stack(self.config)
        self.final_linear = FinalLinear(hidden_size, patch_size**2 * out_channels)

    @property
    def working_dtype(self) -> torch.dtype:
        """Of activations and K/V: embedders and norms stay in fp32."""
        return self.videodit_blocks.blocks[0].self_attention.linear_qkv.q.weight.dtype

    def rotary(self) -> RotaryTable:
        """The learned bands once per axis (t, h, w): they turn 3/4 of a head's channels."""
        bands = self.rope.bands.detach().double().tolist()
        return RotaryTable(tuple(axis for axis in range(3) for _ in bands), tuple(bands * 3), "half")

    def tokens(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] → patch embeddings [B, N, E] in fp32: FlowCache's reuse feature."""
        latents = latents.to(self.x_embedder.weight) * self.config.x_rescale_factor
        return self.x_embedder(latents).flatten(2).transpose(1, 2)

    def condition(self, t: float, step_size: float | None, null: bool) -> Tensor:
        """Condition vector [1, E/4] of a pass at time `t`; distilled models also take the step size."""
        times = [t] if step_size is None else [t, step_size]
        embedded = self.t_embedder(torch.tensor(times, dtype=torch.float32, device=self.rope.bands.device))
        return embedded.sum(0, keepdim=True) + self.y_embedder.condition(null)

    def text_kv(self, embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cross-attention K and V [..., T, Hk, D] of every layer, of text embeddings [..., T, channels]."""
        text = self.y_embedder.text(embeds)
        return [layer.self_attention.text_kv(text) for layer in self.videodit_blocks.blocks]

    def forward(
        self, latents: Tensor, condition: Tensor, text: Sequence[Sequence[tuple[Tensor, Tensor]]],
        views: Sequence[LayerView],
    ) -> Tensor:  # fmt: skip
        """Velocity dx/dt, towards the data, shaped like `latents` [B, C, F, H, W], in fp32.

        `text` has per layer K and V [1, T, Hk, D] of every take, or one for all; `views` one view per layer.
        """
        hidden = self.through(self.tokens(latents).to(self.working_dtype), condition, text, views)
        return self.head(hidden, latents.shape)

    def through(
        self, hidden: Tensor, condition: Tensor, text: Sequence[Sequence[tuple[Tensor, Tensor]]],
        views: Sequence[LayerView],
    ) -> Tensor:  # fmt: skip
        """Tokens [B, N, E] through every block; arguments as for `forward`."""
        for layer, view, kv in zip(self.videodit_blocks.blocks, views, text, strict=True):
            hidden = layer(hidden, condition, view, kv)
        return hidden

    def head(self, hidden: Tensor, shape: Sequence[int]) -> Tensor:
        """Velocity of the latents' `shape`, of the last block's tokens [B, N, E]."""
        return self.pixels(self.final_linear.linear(self.videodit_blocks.final_layernorm(hidden.float())), shape)

    def pixels(self, out: Tensor, shape: Sequence[int]) -> Tensor:
        """Output tokens [B, N, p·p·C] → [B, C, F, H, W] of the latents' `shape`."""
        batch, _, frames, height, width = shape
        p, channels = self.config.patch_size, self.config.out_channels
        grid = out.view(batch, frames, height // p, width // p, p, p, channels)
        return grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, channels, frames, height, width)


def chunk_positions(first_frame: int, frames: int, rows: int, columns: int) -> Tensor:
    """Positions [N, 3] (t, h, w) in fp64 of a chunk's tokens, frame-major.

    t counts latent frames from the start of the video. h and w are centred at 0 and stretched as if the grid had the
    area of 16·16 tokens: with s = sqrt(256 / (rows·columns)), an axis of n tokens spans ±(n·s − 1)/2.
    """
    stretch = math.sqrt(REFERENCE_AREA / (rows * columns))
    t = torch.arange(first_frame, first_frame + frames, dtype=torch.float64)
    h, w = (_centred(n, n * stretch) for n in (rows, columns))
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij"), -1).flatten(0, 2)


def _cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cross-attention output [B, N, Hq·D]; nothing where there is no text at all."""
    if not k.shape[1]:
        return q.new_zeros(*q.shape[:2], q.shape[2] * q.shape[3])
    kv = (t.expand(q.shape[0], -1, -1, -1) for t in (k, v))
    return attend(q, *kv).flatten(2)


def _centred(count: int, extent: float) -> Tensor:
    steps = torch.arange(count, dtype=torch.float64) - (count - 1) / 2
    return steps * ((extent - 1) / max(count - 1, 1))

"""The Lumos-1 transformer under its published weight names: a Llama block with a LayerNorm on every head of
queries and keys.

The model knows neither positions nor storage. Self-attention of layer i calls `layers[i].attend(q, k, v)` with q and k
normalised but not rotated; whoever gave the layers rotates, stores and attends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import LongtakeError

NORM_EPS = 1e-5  # of the LayerNorm over a head
# The sentence around a caption that the published models were trained to read.
PROMPT_TEMPLATE = (
    "Generate a video with a resolution of {width}x{height}, consisting of {frames} frames at {fps} frames per second, "
    "according to the following prompt:\n {prompt}"
)


class AttentionLayer(Protocol):
    """The seam of one layer; `history.LayerView` is one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        """q [B, N, Hq, D], k and v [B, N, Hk, D], before rotation → [B, N, Hq, D]."""


class LumosConfig(PretrainedConfig):
    """`config.json` of a checkpoint. Sizes default to those of the 3B model.

    `vocabulary` overrides ids of `Vocabulary`, for models that do not have the published 129,536; `prompt_template`
    stands around captions. Raises LongtakeError for a variant this model does not compute.
    """

    model_type = "chameleon"  # what published files say

    def __init__(
        self, vocab_size: int = 129_536, hidden_size: int = 3072, intermediate_size: int = 8192,
        num_hidden_layers: int = 28, num_attention_heads: int = 24, num_key_value_heads: int | None = 8,
        head_dim: int | None = None, rms_norm_eps: float = 1e-5, rope_theta: float = 10_000.0,
        rope_parameters: dict[str, Any] | None = None, rope_scaling: dict[str, Any] | None = None,
        model_parallel_size: int = 1, swin_norm: bool = False, vocabulary: dict[str, int] | None = None,
        prompt_template: str = PROMPT_TEMPLATE, **rest: Any,
    ) -> None:  # fmt: skip
        rope = {**(rope_scaling or {}), **(rope_parameters or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        for what, bad in (
            (f"rope type {kind!r}", kind != "default"),
            ("swin_norm", swin_norm),
            (f"model_parallel_size {model_parallel_size}", model_parallel_size != 1),
        ):
            if bad:
                raise LongtakeError(f"config.json: {what} is not supported: give a Lumos-1 checkpoint as published")
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rms_norm_eps, self.rope_theta = rms_norm_eps, float(rope.get("rope_theta", rope_theta))
        self.vocabulary, self.prompt_template = vocabulary, prompt_template
        for name in ("vq_config", "vocabulary_map", "tie_word_embeddings"):  # of parts that Lumos-1 has not
            rest.pop(name, None)
        super().__init__(tie_word_embeddings=False, **rest)


class HeadNorm(nn.Module):
    """LayerNorm over a head's channels, gain and bias shared by all heads; stored as [1, D]."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, head_dim))
        self.bias = nn.Parameter(torch.zeros(1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight[0], self.bias[0], NORM_EPS)


class Attention(nn.Module):
    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=False)
        self.q_norm, self.k_norm = HeadNorm(d), HeadNorm(d)

    def forward(self, x: Tensor, layer: AttentionLayer, causal: bool) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = layer.attend(self.q_norm(q), self.k_norm(k), v, causal=causal)  # [B, N, Hq, D]
        return self.o_proj(out.flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        c, f = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(c, f, bias=False), nn.Linear(c, f, bias=False)
        self.down_proj = nn.Linear(f, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, layer: AttentionLayer, causal: bool) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layer, causal)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class LumosForVideoGeneration(PreTrainedModel):
    """Ids in, hidden states out; `logits` makes scores of the vocabulary columns that are wanted."""

    config_class = LumosConfig
    base_model_prefix = ""
    _no_split_modules = ("Block",)
    _keys_to_ignore_on_load_unexpected = (r"vqmodel\.",)  # an image tokenizer that early checkpoints carry along

    def __init__(self, config: LumosConfig) -> None:
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, ids: Tensor, layers: Sequence[AttentionLayer], *, causal: bool = False) -> Tensor:
        """ids [B, N] → normalised hidden states [B, N, C]. `causal`: a token does not see the later ones."""
        x = self.model.embed_tokens(ids)
        for block, layer in zip(self.model.layers, layers, strict=True):
            x = block(x, layer, causal)
        return self.model.norm(x)

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """hidden [..., C] → [..., V], or the wanted vocabulary columns only."""
        return F.linear(hidden, self.lm_head.weight[columns])

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.RMSNorm | HeadNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, HeadNorm):
                nn.init.zeros_(module.bias)

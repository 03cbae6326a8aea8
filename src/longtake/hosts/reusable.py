"""What reuse policies need of a diffusers transformer of Wan's kind (Wan, SkyReels-V2): features, and the block stack's
residual. Features are computed in fp32 whatever the model runs in: neighbouring steps differ by 0.2 … 10 %, bf16 rounds
by 0.4 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def latent_feature(embedding: nn.Conv3d, latents: Tensor) -> Tensor:
    """Patch embedding of latents [B, C, f, h, w]: [B, d, f, h', w'], fp32."""
    weight, bias = embedding.weight.float(), None if embedding.bias is None else embedding.bias.float()
    return F.conv3d(latents.to(weight), weight, bias, embedding.stride)


def timestep_feature(embedder: Any, timestep: float) -> Tensor:
    """Timestep projection [1, 6·d] of a `condition_embedder` at a timestep in 0 … 1000, fp32: one vector, since all
    tokens of a chunk share it."""
    first, second = embedder.time_embedder.linear_1, embedder.time_embedder.linear_2
    half = first.in_features // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    angle = timestep * frequency
    sinusoid = torch.cat([angle.cos(), angle.sin()])[None].to(first.weight.device, torch.float32)
    hidden = _linear(second, F.silu(_linear(first, sinusoid)))
    return _linear(embedder.time_proj, F.silu(hidden))


def forward_residual(transformer: Any, call: Callable[[], Tensor], residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """`call()`, which runs the transformer, and what its blocks added to the embedded tokens [B, N, d]; with a
    `residual` of an earlier call this is added instead, and no block runs. Hold the host's lock."""
    blocks = transformer.blocks
    stack = _Stack(blocks, residual)
    transformer._modules["blocks"] = stack
    try:
        out = call()
    finally:
        transformer._modules["blocks"] = blocks
    assert stack.residual is not None
    return out, stack.residual


class _Stack(nn.Module):
    """The blocks, which are one for whoever walks through them."""

    blocks: nn.ModuleList

    def __init__(self, blocks: nn.ModuleList, residual: Tensor | None) -> None:
        super().__init__()
        self.__dict__["blocks"] = blocks  # not a child: the weights stay where they are
        self.residual, self.reuses = residual, residual is not None

    def __iter__(self) -> Iterator[nn.Module]:
        yield self

    def __getitem__(self, number: int) -> nn.Module:
        return self.blocks[number]

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, hidden: Tensor, *conditions: Any) -> Tensor:
        if self.residual is not None and self.reuses:
            return hidden + self.residual
        out = hidden
        for block in self.blocks:
            out = block(out, *conditions)
        self.residual = out - hidden
        return out


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())

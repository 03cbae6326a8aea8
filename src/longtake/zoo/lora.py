"""Low-rank adapters on the self-attention of a causal Wan transformer: W + B·A, with B zero at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


class LowRank(nn.Module):
    """A frozen linear layer and its adapter, of the same scale: `down` is A [r, in], `up` is B [out, r]."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self._base = [base]  # out of sight of `state_dict`: it is the transformer's
        device, spread = base.weight.device, base.in_features**-0.5
        self.down = nn.Parameter(torch.randn(rank, base.in_features, device=device) * spread)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.off = False  # for a teacher that shares the weights

    def forward(self, x: Tensor) -> Tensor:
        out = self._base[0](x)
        return out if self.off else out + (x.float() @ self.down.T @ self.up.T).to(out)


class Adapter(nn.Module):
    """The adapters of one transformer, put in their places."""

    def __init__(self, transformer: Any, rank: int) -> None:
        super().__init__()
        self.placed: dict[str, LowRank] = {}
        for i, block in enumerate(transformer.blocks):
            for name in LAYERS:
                parent, _, leaf = f"attn1.{name}".rpartition(".")
                owner = block.get_submodule(parent)
                layer = LowRank(owner.get_submodule(leaf), rank)
                owner.register_module(leaf, layer)
                self.placed[f"blocks.{i}.attn1.{name}"] = layer
        self.layers = nn.ModuleList(self.placed.values())

    def switch(self, on: bool) -> None:
        """Turn every adapter on or off."""
        for layer in self.placed.values():
            layer.off = not on

    def save(self, path: Path) -> None:
        """Write peft's names, as `longtake convert --lora` reads them."""
        tensors = {}
        for name, layer in self.placed.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = layer.down.detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = layer.up.detach().cpu().contiguous()
        save_file(tensors, path)

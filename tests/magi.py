"""MAGI-1 in the size of the goldens: the published network with their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.hosts.magi.model import MagiTransformer3DModel


def golden_model(tensors: dict[str, Tensor], config: dict) -> MagiTransformer3DModel:
    """The golden's network under its own names. No weight is missing, none is left over."""
    sizes = {k: v for k, v in config["model"].items()}
    sizes["layernorm_epsilon"], sizes["apply_layernorm_1p"] = config["layernorm_epsilon"], config["apply_layernorm_1p"]
    model = MagiTransformer3DModel(**sizes, cond_hidden_ratio=config["cond_hidden_ratio"])
    model.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    return model.eval().requires_grad_(False)


def tiny_model(layers: int = 2, seed: int = 0) -> MagiTransformer3DModel:
    """Random weights in the published layout, none as it is initialised."""
    torch.manual_seed(seed)
    model = MagiTransformer3DModel(
        num_layers=layers, hidden_size=96, ffn_hidden_size=112, num_attention_heads=6, num_query_groups=2,
        kv_channels=16, in_channels=4, out_channels=4, caption_channels=20, caption_max_length=56,
    )  # fmt: skip
    for name, p in model.named_parameters():
        if name != "rope.bands":
            torch.nn.init.normal_(p, std=0.2)
    return model.eval().requires_grad_(False)

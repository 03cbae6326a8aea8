"""MAGI-1 in the size of the goldens: the published network with their weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.hosts.magi.model import MagiTransformer3DModel
from longtake.hosts.magi.vae import MagiVAE


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


def tiny_vae(seed: int = 1) -> MagiVAE:
    """Random weights in the published layout: patches of 4·8·8, 4 latent channels."""
    torch.manual_seed(seed)
    vae = MagiVAE(ddconfig={
        "video_size": 16, "video_length": 8, "patch_size": 8, "patch_length": 4, "in_chans": 3, "z_chans": 4,
        "double_z": True, "embed_dim": 256, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "qkv_bias": True,
        "with_cls_token": True, "norm_code": False, "ln_in_attn": True, "conv_last_layer": True,
    })  # fmt: skip
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return vae.eval().requires_grad_(False)


def special_tokens(path: Path, channels: int = 20) -> Path:
    """A file of special tokens as published: 100 of them beside a caption and a logo one."""
    rng = np.random.default_rng(7)
    tokens = {"caption_token": 1, "logo_token": 1, "other_tokens": 100}
    np.savez(path, **{name: rng.standard_normal((n, channels)).astype(np.float32) for name, n in tokens.items()})
    return path


def published_config(model: MagiTransformer3DModel, **changes: dict) -> dict:
    """The authors' configuration file of a model in its three parts; `changes` by part."""
    sizes = {k: v for k, v in model.config.items() if not k.startswith("_")}
    whole = {
        "model_config": {
            **sizes, "model_name": "videodit_ardf", "half_channel_vae": False, "params_dtype": "torch.bfloat16",
            "t_patch_size": 1, "cond_gating_ratio": 1.0, "gated_linear_unit": False,
        },
        "runtime_config": {
            "cfg_number": 3, "cfg_t_range": [0.0, 0.0217, 0.1, 0.3, 0.999],
            "prev_chunk_scales": [1.5, 1.5, 1.5, 1.0, 1.0], "text_scales": [7.5, 7.5, 7.5, 0.0, 0.0],
            "noise2clean_kvrange": [5, 4, 3, 2], "clean_chunk_kvrange": 1, "clean_t": 0.9999, "seed": 1234,
            "num_frames": 96, "video_size_h": 32, "video_size_w": 48, "num_steps": 8, "window_size": 4, "fps": 8,
            "chunk_width": 2, "scale_factor": 0.18215, "temporal_downsample_factor": 4,
        },
        "engine_config": {
            "distill": False, "fp8_quant": False, "distill_nearly_clean_chunk_threshold": 0.3,
            "shortcut_mode": "8,16,16",
        },
    }  # fmt: skip
    return {part: {**values, **changes.get(part, {})} for part, values in whole.items()}


def write_published(folder: Path, *, distill: bool = False, shards: int = 2, vae: bool = True) -> Path:
    """`ckpt/magi/4.5B_*` as published, tiny, with VAE and special tokens; returns the folder to load."""
    model = tiny_model()
    home = folder / "ckpt" / "magi" / ("4.5B_distill" if distill else "4.5B_base")
    weights = home / ("inference_weight.distill" if distill else "inference_weight")
    weights.mkdir(parents=True)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    keys = sorted(state)
    if shards == 1:
        save_file(state, weights / "model.safetensors")
    else:
        place = {k: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, k in enumerate(keys)}
        for name in set(place.values()):
            save_file({k: state[k] for k in keys if place[k] == name}, weights / name)
        (weights / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    run = {"cfg_number": 1} if distill else {}
    config = published_config(model, runtime_config=run, engine_config={"distill": distill})
    (home / "4.5B_config.json").write_text(json.dumps(config))
    special_tokens(home / "special_tokens.npz")
    if vae:
        part = folder / "ckpt" / "vae"
        part.mkdir()
        config = {"_class_name": "ViTVAE", "ddconfig": dict(tiny_vae().config.ddconfig), "model_type": "vit"}
        (part / "config.json").write_text(json.dumps(config))
        save_file(tiny_vae().state_dict(), part / "diffusion_pytorch_model.safetensors")
    return home

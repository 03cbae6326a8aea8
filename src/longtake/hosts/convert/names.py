"""Names of weights: what wrappers add to them, and original Wan → diffusers."""

import re

_WRAPPERS = {"model", "module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}

# Module names, original Wan → diffusers. The affine norm is `norm3` there and `norm2` here.
_GLOBAL_MODULES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "fps_embedding": "fps_embedding",  # SkyReels-V2 alone
    "fps_projection.0": "fps_projection.net.0.proj",
    "fps_projection.2": "fps_projection.net.2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK_MODULES = {
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in (_ATTENTION | _IMAGE_ATTENTION).items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def diffusers_name(name: str) -> str | None:
    """The `WanTransformer3DModel` name of an original Wan weight (wrapper prefixes stripped); None if it has none."""
    if name == "head.modulation":
        return "scale_shift_table"
    prefix, modules, rest = "", _GLOBAL_MODULES, name
    if block := re.fullmatch(r"(blocks\.\d+\.)(.+)", name):
        prefix, modules, rest = block[1], _BLOCK_MODULES, block[2]
        if rest == "modulation":
            return prefix + "scale_shift_table"
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{modules[module]}.{leaf}" if module in modules and leaf in ("weight", "bias") else None


def bare(name: str) -> str:
    """`name` without the components that FSDP, compile, checkpointing and wrapper classes put anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

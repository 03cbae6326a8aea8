"""Tiny real files: a Wan model folder in diffusers format, and checkpoints with the layout of each published one."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from longtake.zoo import tiny_text, tiny_vae, train_tiny_wan
from longtake.zoo import tiny_transformer as lanes_transformer

TINY_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
}


def tiny_transformer(seed: int = 0, **config) -> WanTransformer3DModel:
    """A random `WanTransformer3DModel` in which no parameter has the value it is initialised with."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**(TINY_WAN | config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def write_lanes_model(folder: Path, layers: int) -> Path:
    """A model of the world of lanes with random weights, of fewer layers than the trained ones."""
    torch.manual_seed(0)
    tokens, transformer = tiny_text.tokenizer(), lanes_transformer.build(tiny_vae.Z_DIM)
    transformer.blocks = transformer.blocks[:layers]
    transformer.register_to_config(num_layers=layers)
    train_tiny_wan.export(folder, "short", tiny_vae.build(), transformer, tiny_text.build(len(tokens)), tokens, {})
    return folder


def write_base(folder: Path, **config) -> Path:
    """A complete Wan pipeline folder of stock classes, with weights that are nobody's source."""
    torch.manual_seed(1)
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "kite": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text = UMT5Config(vocab_size=8, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(text),
        transformer=tiny_transformer(seed=99, **config),
        vae=AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(folder)
    return folder


def upstream_state(model: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    """The model's weights under the original repository's names."""
    return {upstream_name(name): tensor.clone() for name, tensor in model.state_dict().items()}


def upstream_name(name: str) -> str:
    """diffusers → original name, by ordered replacement; written independently of the converter's tables."""
    if name == "scale_shift_table":
        return "head.modulation"
    for new, old in (
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("proj_out", "head.head"),
        ("scale_shift_table", "modulation"),
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
        (".to_out.0", ".o"),
        (".to_q", ".q"),
        (".to_k", ".k"),
        (".to_v", ".v"),
        (".norm2.", ".norm3."),
        (".ffn.net.0.proj", ".ffn.0"),
        (".ffn.net.2", ".ffn.2"),
    ):
        name = name.replace(new, old)
    return name


def prefixed(state: dict[str, torch.Tensor], prefix: str = "model.") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def fsdp(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as FSDP, activation checkpointing and compile leave them, also in the middle of a name."""
    out = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[2:2] = ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
        out["model._fsdp_wrapped_module._orig_mod." + ".".join(parts)] = tensor
    return out


def longlive_lora(model: WanTransformer3DModel, rank: int = 4) -> dict[str, torch.Tensor]:
    """A peft adapter on the linear layers of the blocks, named as LongLive's `generator_lora` is."""
    generator = torch.Generator().manual_seed(5)
    adapter = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks.") and tensor.ndim == 2 and name.endswith(".weight"):
            layer = "base_model.model." + upstream_name(name).removesuffix(".weight")
            adapter[f"{layer}.lora_A.weight"] = torch.randn(rank, tensor.shape[1], generator=generator)
            adapter[f"{layer}.lora_B.weight"] = torch.randn(tensor.shape[0], rank, generator=generator)
    return adapter

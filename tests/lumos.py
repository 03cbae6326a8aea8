"""The goldens' Lumos-1 network in our class, its chance by written rules, and what its passes were fed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from longtake.hosts.base import HostConfig
from longtake.hosts.lumos import Lumos, LumosConfig, LumosForVideoGeneration, LumosGeometry
from longtake.hosts.lumos.fsq_tokenizer import FSQTokenizer
from longtake.hosts.lumos.sequence import frame_ids

from .tiny import GOLDENS

LOOP = json.loads((GOLDENS / "lumos_tiny_generate.json").read_text())
CONFIG = LOOP["config"]
RULE = LOOP["weight_rule"]
GEOMETRY = LumosGeometry(CONFIG["height"], CONFIG["width"], 1, 1, CONFIG["fps"], patch=(1, 1, 1))
HEADER = [9004, 8804 + CONFIG["seconds"], 8804 + CONFIG["fps"]]
PROMPT = [*CONFIG["text_ids"], *HEADER]
N = GEOMETRY.tokens_per_frame


def forward_golden() -> dict[str, Tensor]:
    with safe_open(GOLDENS / "lumos_tiny_forward.safetensors", "pt") as f:
        assert (json.loads(f.metadata()["config"]), json.loads(f.metadata()["weight_rule"])) == (CONFIG, RULE)
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)


def golden_weights() -> dict[str, Tensor]:
    """Sines of a tensor's rank by name and of the flat index."""
    weights = {}
    for j, (name, shape) in enumerate(sorted(RULE["shapes"].items())):
        i = torch.arange(1, math.prod(shape) + 1)
        s = torch.sin(((i * i) % RULE["modulus"]).double() * RULE["a"] + (j + 1) * RULE["b"])
        if "norm" in name and name.endswith("weight"):
            s = 1 + RULE["norm_scale"] * s
        else:
            s = s * RULE["bias_scale" if name.endswith("bias") else "matrix_scale"]
        weights[name] = s.float().view(shape)
    return weights


def golden_model() -> LumosForVideoGeneration:
    sizes = {k: CONFIG[k] for k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "rope_theta",
    )}  # fmt: skip
    model = LumosForVideoGeneration(LumosConfig(**sizes))
    model.load_state_dict(golden_weights())
    return model.eval().requires_grad_(False)


def settings(**changes: Any) -> HostConfig:
    given = {
        "host": "lumos", "sampler": "masked", "chunk_frames": 1, "steps": CONFIG["steps"], "fps": CONFIG["fps"],
        "guidance_scale": CONFIG["guidance"], "height": CONFIG["height"], "width": CONFIG["width"],
        "history_mask": CONFIG["history_mask_ratio"], "compat": "upstream", "training_frames": 3, "causal": True,
    }  # fmt: skip
    return HostConfig(**{**given, **changes})


def given_codes() -> Tensor:
    """Codes [1, 1, 1, h, w] of the visible frame."""
    factor, offset = CONFIG["frame_rule"]
    return ((torch.arange(GEOMETRY.codes) * factor + offset) % 64).view(1, 1, 1, *GEOMETRY.latent_size)


class GivenCodes:
    """A video tokenizer that knows one image."""

    codes, stride = 64, (4, 8, 8)

    def encode(self, video: Tensor) -> Tensor:
        return given_codes().expand(video.shape[0], -1, -1, -1, -1)

    def memory(self) -> int:
        return 0


IMAGE = torch.zeros(3, CONFIG["height"], CONFIG["width"])


class Argmax:
    """The likeliest code, and no noise in the ranking."""

    def codes(self, chunk: int, step: int, rows: Tensor, logp: Tensor) -> Tensor:
        return logp.argmax(-1)

    def gumbel(self, chunk: int, step: int, rows: Tensor) -> Tensor:
        return torch.zeros(rows.shape)


class PseudoRandom:
    """The golden's written noise rule."""

    rule = LOOP["pseudo_random"]["noise_rule"]

    def _sine(self, i: Tensor, phase: float) -> Tensor:
        return torch.sin(((i * i) % self.rule["modulus"]).double() * self.rule["a"] + phase)

    def codes(self, chunk: int, step: int, rows: Tensor, logp: Tensor) -> Tensor:
        n, codes = GEOMETRY.codes, logp.shape[-1]
        i = 1 + ((chunk * CONFIG["steps"] + step) * n + rows[..., None]) * codes + torch.arange(codes)
        return (logp + self.rule["choice_scale"] * self._sine(i, self.rule["b"])).argmax(-1)

    def gumbel(self, chunk: int, step: int, rows: Tensor) -> Tensor:
        i = 1 + (chunk * CONFIG["steps"] + step) * GEOMETRY.codes + rows
        return self.rule["rank_scale"] * self._sine(i, 2 * self.rule["b"])


CHANCE = {"argmax": Argmax, "pseudo_random": PseudoRandom}


@dataclass
class Fed:
    """Everything a host's passes over frames were fed, in order."""

    host: Lumos
    content: list[Tensor] = field(default_factory=list)  # [B, 1, 1, rows, columns]
    keys: list[Tensor] = field(default_factory=list)  # layer 0's, as attention saw them: [B, history + live, Hk, D]

    def __post_init__(self) -> None:
        forward = self.host.forward

        def spy(latents: Tensor, t: float, text: Any, layers: list[Any]) -> Tensor:
            out = forward(latents, t, text, layers)
            self.content.append(latents.clone())
            self.keys.append(layers[0].k.clone())
            return out

        self.host.forward = spy  # type: ignore[method-assign]

    def ids(self) -> list[Tensor]:
        """[N] of every pass."""
        return [frame_ids(x, GEOMETRY, self.host.words)[0] for x in self.content]


# --- a model folder of our own, small enough to write and to run ----------------------------------------------------

WORDS = {
    "bos": 0, "frame_end": 1, "frame_begin": 2, "separator": 3, "newline": 4, "mask": 5, "video_begin": 6,
    "integer": 8, "largest": 39, "visual": 128,
}  # fmt: skip
TEXT = {"red": 48, "kite": 49, "ball": 50, "<unk>": 51}  # everything else is <unk>


def tiny_model(seed: int = 0, **changes: Any) -> LumosForVideoGeneration:
    sizes = {
        "vocab_size": 192, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocabulary": WORDS,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LumosForVideoGeneration(LumosConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model.eval().requires_grad_(False)


def tiny_codec(seed: int = 1) -> FSQTokenizer:
    """64 codes; no weight is where it was initialised."""
    torch.manual_seed(seed)
    codec = FSQTokenizer(levels=(4, 4, 4), widths=(8, 8, 8))
    with torch.no_grad():
        for p in codec.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return codec.eval().requires_grad_(False)


def tiny_words() -> Any:
    words = Tokenizer(models.WordLevel({**TEXT}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def tiny_settings(**changes: Any) -> HostConfig:
    return settings(**{
        "height": 32, "width": 64, "steps": 4, "fps": 8, "training_frames": 5, "compat": "fixed", "text_tokens": 64,
        **changes,
    })  # fmt: skip


def tiny_lumos(codec: bool = True, **changes: Any) -> Lumos:
    parts = {"codec": tiny_codec()} if codec else {}
    return Lumos(tiny_model(), tiny_settings(**changes), tokenizer=tiny_words(), name="tiny", **parts)


def write_folder(folder: Path, *, settings: bool = True, codec: bool = True) -> Path:
    """As Lumos-1 is published: config.json, weights in shards, and beside them what our own models carry."""
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    tiny_words().save_pretrained(folder)
    if settings:
        (folder / "longtake.json").write_text(json.dumps(tiny_settings().as_dict()))
    if codec:
        tiny_codec().save_pretrained(folder / "video_tokenizer")
    return folder

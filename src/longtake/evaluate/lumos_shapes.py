"""Lumos-1 architectures with random weights, at named sizes: time and memory ask only for sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hosts.base import HostConfig
from ..hosts.lumos import Lumos, LumosConfig, LumosForVideoGeneration
from ..planner.lumos import SHAPES as PUBLISHED
from ..planner.lumos import CostModel, LumosShape
from .random_weights import drawn

WORDS = {
    "bos": 0, "frame_end": 1, "frame_begin": 2, "separator": 3, "newline": 4, "mask": 5, "video_begin": 6,
    "integer": 8, "largest": 119, "visual": 128,
}  # fmt: skip


@dataclass(frozen=True)
class LumosBench:
    """A shape, the kind of device it is meant for, and how it is run there."""

    shape: LumosShape
    device: str
    dtype: str
    steps: int
    words: tuple[tuple[str, int], ...] = tuple(WORDS.items())

    @property
    def cost(self) -> CostModel:
        return CostModel(self.shape, self.shape.width, self.shape.height, self.steps)

    def attention_to_linear(self, latent_frames: int = 13) -> float:
        """FLOPs of attention over those of all matrix products, in a forward of the last of so many latent frames."""
        linear, attention = self.cost.forward_flops(self.cost.full_keys(latent_frames - 1))
        return attention / linear

    def host(self, device: torch.device, dtype: torch.dtype, steps: int, seed: int) -> Lumos:
        """A host of this shape, its weights and its first image drawn with `seed`."""
        s = self.shape
        own: dict[str, Any] = {} if s.visual_codes == PUBLISHED["lumos-1-3b"].visual_codes else dict(self.words)
        sizes = LumosConfig(
            vocab_size=s.vocabulary, hidden_size=s.hidden, intermediate_size=s.ffn, num_hidden_layers=s.layers,
            num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, vocabulary=own or None,
        )  # fmt: skip
        model = drawn(lambda: LumosForVideoGeneration(sizes), device, dtype, seed)
        config = HostConfig(
            host="lumos", causal=True, sampler="masked", chunk_frames=1, steps=steps, fps=s.fps, guidance_scale=15.0,
            height=s.height, width=s.width, text_tokens=s.text_tokens, training_frames=7,
        )  # fmt: skip
        codec = DrawnCodes(s.visual_codes, s.height // s.patch, s.width // s.patch, seed)
        return Lumos(model, config, codec=codec, name=s.name)  # type: ignore[arg-type]

    def prompt(self, host: Lumos, seed: int) -> Tensor:
        """Ids [1, text_tokens]: drawn words between BOS and separator, then the header of a two-second video."""
        words = host.words
        low, high = (9, words.visual) if self.shape.visual_codes < 64_000 else (words.mask + 400, words.visual)
        generator = torch.Generator().manual_seed(seed)
        spoken = torch.randint(low, high, (self.shape.text_tokens - 5,), generator=generator).tolist()
        header = [words.video_begin, words.integer + 2, words.integer + round(self.shape.fps)]
        return torch.tensor([[words.bos, *spoken, words.separator, *header]])


@dataclass(frozen=True)
class DrawnCodes:
    """Stands where a video tokenizer would: whatever the image, these codes. It decodes nothing."""

    codes: int
    rows: int
    columns: int
    seed: int
    stride: tuple[int, int, int] = (4, 8, 8)

    def encode(self, video: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, self.codes, (1, 1, 1, self.rows, self.columns), generator=generator)

    def memory(self) -> int:
        return 0


SHAPES = {
    bench.shape.name: bench
    for bench in (
        # every size an eighth of the 3B model's and of its frame, so attention : linear is the same at equal lengths
        LumosBench(
            LumosShape(
                name="lumos-cpu", about="an eighth of Lumos-1 3B in every direction", width=192, height=160, fps=12,
                layers=8, hidden=384, ffn=1024, heads=3, kv_heads=1, head_dim=128, vocabulary=4208, visual_codes=4080,
                text_tokens=34, itemsize=4,
            ),
            "cpu", "float32", 5,
        ),
        LumosBench(
            LumosShape(
                name="lumos-micro", about="seconds for a whole run: to try the benchmark, not to measure", width=64,
                height=32, fps=12, layers=2, hidden=64, ffn=96, heads=2, kv_heads=1, head_dim=32, vocabulary=192,
                visual_codes=64, text_tokens=12, itemsize=4,
            ),
            "cpu", "float32", 2,
        ),
        LumosBench(PUBLISHED["lumos-1-1b"], "cuda", "bfloat16", 50),
        LumosBench(PUBLISHED["lumos-1-3b"], "cuda", "bfloat16", 50),
    )
}  # fmt: skip

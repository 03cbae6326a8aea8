"""Lumos-1 (arXiv 2507.08801): tokens, bytes and FLOPs of masked decoding, frame by frame.

A latent frame is `(height/8)·(width/8 + 1)` content tokens (each row of codes is closed by a newline) and four
structural ones. Decoding it takes `steps` forwards of the frame against everything kept, in two guidance streams, and
one more forward to write its K/V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import LongtakeError
from .request import ModelShape, PlanRequest


@dataclass(frozen=True, kw_only=True)
class LumosShape(ModelShape):
    """Sizes of a Lumos-1 checkpoint and of its sequence layout."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 129_536
    visual_codes: int = 64_000
    patch: int = 8  # pixels per code
    frame_stride: int = 4  # pixel frames per latent frame after the first
    structural_tokens: int = 4  # frame begin, height, width, frame end
    text_tokens: int = 278  # prompt, separator and video header: what the release's prompts take, about
    steps: int = 50
    streams: int = 2  # with guidance

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers, one stream."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize

    @property
    def linear_parameters(self) -> int:
        """Weights of the blocks' matrices: query and output, key and value, three of the MLP."""
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def parameters(self) -> int:
        """All matrices; the head is not tied to the embedding."""
        return self.linear_parameters + 2 * self.vocabulary * self.hidden

    def content_tokens(self, width: int, height: int) -> int:
        return height // self.patch * (width // self.patch + 1)

    def tokens_per_frame(self, width: int, height: int) -> int:
        return self.content_tokens(width, height) + self.structural_tokens

    def latent_frames(self, pixel_frames: int) -> int:
        return math.ceil((pixel_frames - 1) / self.frame_stride) + 1

    def linear_flops(self, tokens: int) -> int:
        """One forward of `tokens` through everything but attention, the head over the whole vocabulary included."""
        return 2 * tokens * (self.linear_parameters + self.hidden * self.vocabulary)

    def attention_flops(self, queries: int, keys: int) -> int:
        return 4 * queries * keys * self.heads * self.head_dim * self.layers


SHAPES = {
    shape.name: shape
    for shape in (
        LumosShape(
            name="lumos-1-1b", about="Lumos-1 1B", width=672, height=384, fps=12,
            layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, head_dim=64,
        ),
        LumosShape(
            name="lumos-1-3b", about="Lumos-1 3B, the model PackCache was measured on", width=672, height=384, fps=12,
            layers=28, hidden=3072, ffn=8192, heads=24, kv_heads=8, head_dim=128,
        ),
    )
}  # fmt: skip


def plan(request: PlanRequest) -> dict[str, Any]:
    """Costs of an image-to-video take: the first latent frame is given, the others are generated one by one."""
    shape = SHAPES[request.model]
    if request.chunk not in (None, 1):
        raise LongtakeError(f"--chunk {request.chunk}: {shape.name} generates one latent frame at a time")
    width, height = request.pixels(shape, 32)  # the size tokens count units of 32 pixels
    asked = request.pixel_frames(shape.fps)
    frames = shape.latent_frames(asked) if asked is not None else (request.chunks or 0) + 1
    tokens = shape.tokens_per_frame(width, height)
    full = shape.text_tokens + frames * tokens
    return {
        "width": width, "height": height, "fps": shape.fps, "latent_frames": frames, "tokens_per_frame": tokens,
        "text_tokens": shape.text_tokens, "full_tokens": full,
        "full_history_bytes": shape.streams * full * shape.token_bytes,
    }  # fmt: skip

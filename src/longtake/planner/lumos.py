"""Lumos-1 (arXiv 2507.08801): tokens, bytes and FLOPs of masked decoding, frame by frame.

A latent frame is `(height/8)·(width/8 + 1)` content tokens (each row of codes is closed by a newline) and four
structural ones. Decoding it takes `steps` forwards of the frame against everything kept, in two guidance streams, and
one more forward to write its K/V.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LongtakeError
from ..flops import FlopShape
from ..plan import HistoryShape
from ..policies import FullHistory
from . import peaks
from .anatomy import Anatomy, Forward
from .request import ModelShape, PlanRequest
from .walk import Layout, Step, walk

HEADER = 3  # tokens of a prompt without text
UNIT = 32  # pixels that a side is a multiple of: what the size tokens count


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
    structural: tuple[int, ...] = (0, 1, 2, -1)  # of a frame: begin, height, width, end
    text_tokens: int = 278  # prompt, separator and video header: what the release's prompts take, about
    steps: int = 50
    streams: int = 2  # with guidance
    longest_side: int = 198 * UNIT  # pixels: the largest size token
    own: str = "window:frames=7,sink=1"

    @property
    def flop_shape(self) -> FlopShape:
        """Of a forward without the head, which is charged to every token at the published vocabulary."""
        weights = self.linear_parameters // self.layers
        return FlopShape(self.layers, self.heads * self.head_dim, weights, self.hidden * self.vocabulary)

    def history(self, frame_tokens: int, **known: Any) -> HistoryShape:
        """What a policy is told of a take, anchors and its end apart."""
        return HistoryShape(
            self.layers, self.kv_heads, self.head_dim, self.itemsize, frame_tokens, 1, streams=self.streams,
            structural_tokens=len(self.structural), training_frames=self.training_frames, decay=self.decay, **known,
        )  # fmt: skip

    @classmethod
    def of(
        cls, name: str, model: Mapping[str, Any], run: Mapping[str, Any], *, itemsize: int, codes: int, text_tokens: int
    ) -> LumosShape:
        """Of a folder: `model` is its config.json, `run` how it is run (longtake.json), `codes` how many visual ones
        there are."""
        return cls(
            name=name, about=run.get("about", ""), width=run["width"], height=run["height"], fps=run["fps"],
            itemsize=itemsize, layers=model["num_hidden_layers"], hidden=model["hidden_size"],
            ffn=model["intermediate_size"], heads=model["num_attention_heads"], kv_heads=model["num_key_value_heads"],
            head_dim=model["head_dim"], vocabulary=model["vocab_size"], visual_codes=codes, text_tokens=text_tokens,
            training_frames=run["training_frames"], steps=run["steps"] or len(run["timesteps"]),
            streams=1 if run["guidance_scale"] == 1 else 2,
            longest_side=(model.get("vocabulary") or {}).get("largest", 198) * UNIT,
        )  # fmt: skip

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
        """All of them; the head is not tied to the embedding, and each layer has QK norms with gain and bias."""
        norms = self.layers * (2 * self.hidden + 4 * self.head_dim) + self.hidden
        return self.linear_parameters + norms + 2 * self.vocabulary * self.hidden

    def content_tokens(self, width: int, height: int) -> int:
        return height // self.patch * (width // self.patch + 1)

    def tokens_per_frame(self, width: int, height: int) -> int:
        return self.content_tokens(width, height) + len(self.structural)

    def latent_frames(self, pixel_frames: int) -> int:
        return math.ceil((pixel_frames - 1) / self.frame_stride) + 1

    def linear_flops(self, tokens: int) -> int:
        """One forward of `tokens` through everything but attention, the head over the whole vocabulary included."""
        return 2 * tokens * (self.linear_parameters + self.hidden * self.vocabulary)

    def attention_flops(self, queries: int, keys: int) -> int:
        return 4 * queries * keys * self.heads * self.head_dim * self.layers


# How much slower an attention FLOP is: not at all, good kernels, the published A40 (1.43) and H200 (7) ratios.
INEFFICIENCIES = (1.0, 1.2, 1.43, 3.0, 7.0)

SHAPES = {
    shape.name: shape
    for shape in (
        LumosShape(
            name="lumos-1-1b", about="Lumos-1 1B", width=672, height=384, fps=12, sizes=((448, 256), (768, 480)),
            layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, head_dim=64, training_frames=7,
        ),
        LumosShape(
            name="lumos-1-3b", about="Lumos-1 3B, the model PackCache was measured on", width=672, height=384, fps=12,
            sizes=((448, 256), (768, 480)),
            layers=28, hidden=3072, ffn=8192, heads=24, kv_heads=8, head_dim=128, training_frames=7,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class CostModel:
    """Masked decoding of a `shape` at one size: what a latent frame costs by the keys it attends to.

    `e` ≥ 1 says how much slower an attention FLOP is than one of a matrix product, on that device and implementation;
    1 counts FLOPs. Every frame is charged `steps` forwards and the one that writes it, in each stream; both streams are
    charged the conditional one's text. Frame 0 is given (image to video).
    """

    shape: LumosShape
    width: int
    height: int
    steps: int

    @property
    def frame_tokens(self) -> int:
        return self.shape.tokens_per_frame(self.width, self.height)

    def full_keys(self, frame: int) -> int:
        """Keys latent frame `frame` attends to under full history, its own among them."""
        return self.shape.text_tokens + (frame + 1) * self.frame_tokens

    def budget_keys(self, frame: int, budget: float) -> float:
        """The same under anchors and a history of `budget` frames, structural tokens neglected."""
        return self.shape.text_tokens + (2 + min(frame - 1, budget)) * self.frame_tokens

    def frame_flops(self, keys: float, e: float = 1.0) -> float:
        linear, attention = self.forward_flops(keys)
        return self.shape.streams * (self.steps + 1) * (linear + e * attention)

    def forward_flops(self, keys: float) -> tuple[float, float]:
        """One forward of one stream: all matrix products, and attention to `keys`."""
        n = self.frame_tokens
        return self.shape.linear_flops(n), n * self.shape.attention_flops(1, 1) * keys

    def speedup(self, keys: Sequence[float], e: float = 1.0) -> tuple[float, float]:
        """Full history over a method whose frames 1, 2, … attend to `keys`: of all frames, and of the last."""
        full = [self.frame_flops(self.full_keys(f + 1), e) for f in range(len(keys))]
        own = [self.frame_flops(k, e) for k in keys]
        return sum(full) / sum(own), full[-1] / own[-1]

    def budget_speedup(self, latent_frames: int, budget: float, e: float = 1.0) -> tuple[float, float]:
        """`speedup` of anchors and a history of `budget` frames; `latent_frames` counts the given one."""
        return self.speedup([self.budget_keys(f, budget) for f in range(1, latent_frames)], e)

    def inefficiency(self, latent_frames: int, budget: float, last_ratio: float) -> float | None:
        """The e at which the last of `latent_frames` is `last_ratio` times as fast; None if no e explains it."""
        linear, full = self.forward_flops(self.full_keys(latent_frames - 1))
        _, own = self.forward_flops(self.budget_keys(latent_frames - 1, budget))
        rest = full - last_ratio * own
        return linear * (last_ratio - 1) / rest if rest > 0 else None

    def mask_bytes(self, keys: int, element: int = 17) -> int:
        """A dense mask over all pairs of tokens: 17 bytes an element while the authors' code builds it, 4 after."""
        return element * keys**2


def plan(request: PlanRequest) -> dict[str, Any]:
    """Costs of an image-to-video take: the first latent frame is given, the others are generated one by one.

    `prefix_tokens` is what the last frame finds in the cache under the policy, `history_bytes` the K/V of that in all
    streams; `full_tokens` and `full_history_bytes` are those of everything, the last frame included. `flops` and
    `full_flops` are the whole take's.
    """
    shape, model, frames = _take(request)
    width, height, steps, tokens = model.width, model.height, model.steps, model.frame_tokens
    policy = request.policy or FullHistory()
    taken = _steps(request)
    keys = [step.seen + tokens for step in taken]
    full = [model.full_keys(step.frame) for step in taken]
    linear, attention = model.forward_flops(full[-1])
    speedups = {f"{e:g}": [round(x, 3) for x in model.speedup(keys, e)] for e in INEFFICIENCIES}
    return {
        "task": "image to video", "width": width, "height": height, "fps": shape.fps, "steps": steps,
        "streams": shape.streams, "policy": policy.name, "pixel_frames": 1 + shape.frame_stride * (frames - 1),
        "latent_frames": frames, "tokens_per_frame": tokens, "content_tokens": shape.content_tokens(width, height),
        "text_tokens": shape.text_tokens, "full_tokens": full[-1], "prefix_tokens": taken[-1].seen,
        "token_bytes": shape.token_bytes, "history_bytes": shape.streams * taken[-1].held * shape.token_bytes,
        "frame_bytes": shape.streams * tokens * shape.token_bytes,
        "full_history_bytes": shape.streams * full[-1] * shape.token_bytes,
        "weight_bytes": shape.itemsize * shape.parameters, "authors_mask_bytes": model.mask_bytes(full[-1]),
        "flops": sum(model.frame_flops(k) for k in keys), "full_flops": sum(model.frame_flops(k) for k in full),
        "attention_to_linear_flops": attention / linear,
        "speedups": speedups,
        "frames": [
            {"frame": step.frame, "prefix_tokens": step.seen, "flops": model.frame_flops(k), "full_tokens": f,
             "full_flops": model.frame_flops(f)}
            for step, k, f in zip(taken, keys, full, strict=True)
        ],
    }  # fmt: skip


def anatomy(request: PlanRequest) -> Anatomy:
    """What a session of this request is made of, a given image included."""
    shape, model, _ = _take(request)
    s, n = shape.itemsize, model.frame_tokens
    sizes = _sizes(request)
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    cells = code_cells(shape, model)
    hidden = cells * shape.hidden * (s if shape.streams == 1 else 4)  # what codes were last drawn from
    traffic = 2 * (shape.hidden + query) + 2 * (shape.hidden + kv) + 3 * (shape.hidden + shape.ffn) + 2 * query
    return Anatomy(
        sizes=sizes, chunk_latents=8 * cells, weights={"transformer": s * shape.parameters},
        text=8 * (shape.text_tokens + (shape.streams - 1) * HEADER), decoder=None, decode=None,
        forward=peaks.lumos_forward(n, shape.hidden, shape.ffn, s, query=query, kv=kv, beside=hidden),
        draw=peaks.code_logits(cells, shape.visual_codes, shape.hidden, s) + hidden, pairs=shape.head_dim // 2,
        query=query, pairing="half", flop_shape=shape.flop_shape,
        streamed=s * (shape.linear_parameters + shape.hidden * shape.visual_codes),
        token_traffic=s * shape.layers * traffic,
        uncounted=("the video tokenizer: its weights, state and decode",),
    )  # fmt: skip


def _sizes(request: PlanRequest) -> HistoryShape:
    """What a session of this request tells its policy; it allows for a first image beside its chunks, and text and
    image are anchors."""
    shape, model, frames = _take(request)
    ends, n = None if request.endless else frames, model.frame_tokens
    return shape.history(n, frames=ends, anchor_tokens=shape.text_tokens + n, **request.held)


def code_cells(shape: LumosShape, model: CostModel) -> int:
    """Codes of a frame."""
    return (model.height // shape.patch) * (model.width // shape.patch)


def forwards(request: PlanRequest) -> Iterator[Forward]:
    """Every forward of the take; no pass has text to look at apart."""
    shape, model, _ = _take(request)
    for number, step in enumerate(_steps(request)):
        keys = step.seen + model.frame_tokens
        yield Forward(number, model.frame_tokens, keys, 0, (model.steps + 1) * shape.streams)


def _take(request: PlanRequest) -> tuple[LumosShape, CostModel, int]:
    """The model, its cost at the size asked for, and the latent frames of the take, the given one included."""
    shape = request.shape or SHAPES[request.model]
    assert isinstance(shape, LumosShape)
    if request.chunk not in (None, 1):
        raise LongtakeError(f"--chunk {request.chunk}: {shape.name} generates one latent frame at a time")
    width, height = request.pixels(shape, UNIT)
    if max(width, height) > shape.longest_side:
        raise LongtakeError(
            f"size {width}x{height}: {shape.name} has words for sides of up to {shape.longest_side} pixels"
        )
    asked = request.pixel_frames(shape.fps)
    frames = shape.latent_frames(asked) if asked is not None else (request.chunks or 0) + 1
    if frames < 2:
        raise LongtakeError("1 frame is the given one: ask for at least 2, there must be something to generate")
    return shape, CostModel(shape, width, height, request.steps or shape.steps), frames


def _steps(request: PlanRequest) -> list[Step]:
    """The frames that are generated, one by one."""
    shape, model, frames = _take(request)
    tokens = model.frame_tokens
    grid = (model.height // shape.patch, model.width // shape.patch + 1)
    layout = Layout(tokens, grid, tuple(i % tokens for i in shape.structural), shape.text_tokens)
    policy = (request.policy or FullHistory()).settle(_sizes(request))
    return list(walk(policy, layout, [1] * (frames - 1), given=1))

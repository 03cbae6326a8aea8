"""MAGI-1: tokens, bytes and FLOPs of a staggered take, as the sampler runs it and as FlowCache's table counts it.

A chunk is 24 frames, 6 latent ones; `window` chunks are in flight, each `steps / window` steps behind the one before.
The distilled model runs the oldest one once more, alone, when it is nearly clean, and reads a finished chunk once more
for its K/V; the base model makes three passes of everything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LongtakeError
from ..flops import FlopShape
from ..plan import HistoryShape
from ..policies import FlowCacheKV, FullHistory, KVPolicy, KVRange
from ..reuse import FlowCacheReuse
from ..reuse.theory import magi_levels, predicted_reuse, relative_l1
from . import peaks
from .anatomy import Anatomy, Forward
from .request import ModelShape, PlanRequest
from .staggered import Tally, Walk
from .vae import MAGI_VAE, MagiVae

TEXT_TOKENS = 100  # of a prompt with its special tokens, about
NULL_TOKENS = 50
CHUNK_FRAMES, FRAME_STRIDE = 6, 4
T5_PARAMETERS = 4_762_310_656  # of the encoder of T5 v1.1 XXL
WAVES = 256  # channels of the sinusoidal time embedding
SPECIAL_TOKENS = 106  # what the published file of special tokens holds
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class MagiShape(ModelShape):
    """Sizes of a MAGI-1 checkpoint and how it is run."""

    layers: int = 34
    hidden: int = 3072
    ffn: int = 12_288
    heads: int = 24
    kv_heads: int = 8
    head_dim: int = 128
    steps: int = 64
    window: int = 4
    passes: int = 1  # 3: three-way guidance
    ranges: str = "5/4/3/2"
    own: str = "kv-range:ranges=5/4/3/2"
    planned: str = "kv-range:ranges=5/4/3/2"
    chunk_frames: int = CHUNK_FRAMES
    training_frames: int | None = 5 * CHUNK_FRAMES
    channels: int = 16
    patch: int = 2
    text_width: int = 4096
    longest_text: int = 800
    text_tokens: int = TEXT_TOKENS
    special: bool = True  # whether special tokens are put before prompts
    vae: MagiVae | None = MAGI_VAE
    encoder_parameters: int = T5_PARAMETERS
    encoder_itemsize: int = 2

    @property
    def unit(self) -> int:
        """Pixels that a side is a multiple of."""
        return self.patch * 8

    @property
    def weights(self) -> int:
        """Bytes of the transformer: embedders, norms over heads and after branches and the head are kept in fp32."""
        e, m, h = self.hidden, self.ffn, self.head_dim
        q, kv, condition = self.heads * h, self.kv_heads * h, self.hidden // 4
        block = condition * 2 * e + 2 * e + 2 * e + 2 * e * q + 2 * e * kv + 2 * e * kv + 2 * q * e + 2 * e + 2 * e * m
        full = 8 * h + 4 * e
        patched = self.channels * self.patch**2
        text = self.text_width * e + e + self.text_width * condition + condition + self.longest_text * self.text_width
        times = WAVES * condition + condition + condition**2 + condition
        outer = 2 * patched * e + text + times + self.head_dim // 8 + 2 * e
        return self.layers * (self.itemsize * block + FP32 * full) + FP32 * outer

    def history(self, per_frame: int, **known: Any) -> HistoryShape:
        """What a policy is told of a take, but for its end and the chunks in flight."""
        return HistoryShape(
            self.layers, self.kv_heads, self.head_dim, self.itemsize, per_frame, self.chunk_frames,
            training_frames=self.training_frames, decay=self.decay, **known,
        )  # fmt: skip

    @classmethod
    def of(
        cls, name: str, model: Mapping[str, Any], run: Mapping[str, Any], settings: Mapping[str, Any], *, itemsize: int,
        vae: MagiVae | None = None, encoder_parameters: int = 0, text_tokens: int = TEXT_TOKENS,
    ) -> MagiShape:  # fmt: skip
        """Of a folder: `model` is the transformer's configuration, `run` and `settings` are how it is run."""
        own = f"kv-range:ranges={run['kv_ranges']}" if run["kv_ranges"] else "full"
        return cls(
            name=name, about=run.get("about", ""), width=run["width"], height=run["height"], fps=run["fps"],
            itemsize=itemsize, layers=model["num_layers"], hidden=model["hidden_size"], ffn=model["ffn_hidden_size"],
            heads=model["num_attention_heads"], kv_heads=model["num_query_groups"], head_dim=model["kv_channels"],
            steps=settings["num_steps"], window=settings["window_size"], passes=settings["cfg_number"],
            ranges=run["kv_ranges"], own=own, planned=own, training_frames=run["training_frames"],
            chunk_frames=run["chunk_frames"], channels=model["in_channels"], patch=model["patch_size"],
            text_width=model["caption_channels"], longest_text=model["caption_max_length"], text_tokens=text_tokens,
            special=bool(settings["special_tokens"]), vae=vae, encoder_parameters=encoder_parameters,
            encoder_itemsize=itemsize,
        )  # fmt: skip

    @property
    def flop_shape(self) -> FlopShape:
        kv, patched = self.kv_heads * self.head_dim, self.channels * self.patch**2
        return FlopShape.of_magi(self.layers, self.hidden, self.ffn, kv, patched)


SHAPES = {
    shape.name: shape
    for shape in (
        MagiShape(
            name="magi-4.5b", about="MAGI-1 4.5B distilled, as FlowCache ran it (64 steps)", width=720, height=720,
            fps=24, sizes=((480, 272), (1280, 720)),
        ),
        MagiShape(
            name="magi-4.5b-base", about="MAGI-1 4.5B base, three-way guidance", width=720, height=720, fps=24,
            steps=32, passes=3, sizes=((480, 272), (1280, 720)),
        ),
    )
}  # fmt: skip

# FlowCache's table, PFLOPs for 10 chunks of 720x720 in 64 steps, and the steps of a chunk that are taken to be reused
REPORTED = (
    ("FlowCache-slow", 161.0, 15),
    ("FlowCache-fast", 140.0, 21),
)
BUDGET = 6  # chunks held, B_total; not in the paper's table, inferred from its configurations
WARMUP = 5


def nearly_clean_steps(steps: int, after: float = 0.3) -> set[int]:
    """Steps whose time is above `after`, in fp32 as the model sees it: the 0.3 of 64 even steps is a hair above."""
    y = torch.linspace(0, 1, steps + 1) ** 2
    return {k for k, t in enumerate((y / (3 - 2 * y)).tolist()[:-1]) if t > after}


def count(
    shape: MagiShape, chunks: int, steps: int, tokens_per_frame: int, policy: KVPolicy, *, nearly_clean: bool = True,
    clean: bool = True, text: int = 0, null_text: int = 0, skipped: Collection[int] = (),
) -> Tally:  # fmt: skip
    """The forwards of `chunks` chunks. `nearly_clean` and `clean` are the distilled model's extra passes."""
    model, frames = shape.flop_shape, shape.chunk_frames
    c = frames * tokens_per_frame
    live = min(shape.window, chunks) + int(shape.passes == 3 and clean)  # a finished chunk stays for a row
    sizes = shape.history(tokens_per_frame, frames=chunks * frames, live_chunks=live)
    walk = Walk(
        policy, sizes, [frames] * chunks, steps, steps // shape.window, "clean" if clean else "adopt",
        skipped=skipped, rereads_last=False, lingers=shape.passes == 3 and clean,
    )  # fmt: skip
    alone_at = nearly_clean_steps(steps) if nearly_clean and shape.passes == 1 else set()
    tally = Tally()
    for visit in walk.visits():
        if visit.step == steps:
            passes = {"clean": [(visit.keys, null_text)] * (2 if shape.passes == 3 else 1)}
        else:
            passes = {"steps": [(visit.keys, text)]}
            if shape.passes == 3:
                passes["steps"] += [(visit.keys, null_text), (c, null_text)]
            if visit.oldest and visit.step in alone_at:
                passes["nearly_clean"] = [(c, text)]
        for kind, made in passes.items():
            tally.add(kind, [model.forward(c, keys, words) for keys, words in made], visit.reused)
            if not visit.reused:
                tally.forwards_made += [Forward(visit.chunk, c, keys, words) for keys, words in made]
    tally.held = walk.held
    return tally


def plan(request: PlanRequest) -> dict[str, Any]:
    """Costs of a text-to-video take. `pflops` is the sampler's under the policy; `paper_vanilla_pflops` counts what
    FlowCache's table does: every earlier chunk in view, nearly clean passes, no second reading of finished chunks, no
    text. `rows` are that table's, from stated numbers of reused steps; `fit` a model of them, no measurement."""
    shape, chunks, width, height = _take(request)
    frames = shape.chunk_frames
    per_frame, per_chunk = width // shape.unit * (height // shape.unit), frames * FRAME_STRIDE
    steps = request.steps or shape.steps
    policy = request.policy or KVRange(shape.ranges)
    ours = count(shape, chunks, steps, per_frame, policy, text=shape.text_tokens, null_text=NULL_TOKENS)
    vanilla = count(shape, chunks, steps, per_frame, FullHistory(), clean=False)
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.itemsize
    tokens = frames * per_frame
    extra = "three passes" if shape.passes == 3 else "nearly clean passes"
    result = {
        "width": width, "height": height, "fps": shape.fps, "chunks": chunks, "pixel_frames": chunks * per_chunk,
        "latent_frames": chunks * frames, "steps": steps, "chunks_in_flight": min(shape.window, chunks),
        "policy": policy.name, "tokens_per_frame": per_frame, "chunk_tokens": tokens, "token_bytes": token_bytes,
        "chunk_bytes": tokens * token_bytes, "history_bytes": ours.held * token_bytes,
        "full_history_bytes": chunks * tokens * token_bytes,
        "pflops": ours.total.peta, "pflops_counts": (
            f"{chunks} chunks of {steps} steps under {_spec(policy)}, {extra}, clean passes of all but the last "
            f"chunk, {shape.text_tokens} text tokens ({NULL_TOKENS} of the null caption)"
        ),
        "flops": ours.as_dict(),
        "paper_vanilla_pflops": vanilla.total.peta, "paper_vanilla_counts": (
            f"{chunks} chunks of {steps} steps, every chunk sees all before it, {extra}, no clean passes, no text"
        ),
    }  # fmt: skip
    if shape.passes == 1 and chunks >= BUDGET and steps > 2 * WARMUP:
        result |= {"rows": _rows(shape, chunks, steps, per_frame), "fit": _fit(shape, chunks, steps, per_frame)}
    return result


def anatomy(request: PlanRequest) -> Anatomy:
    """What a session of this request is made of."""
    shape, chunks, width, height = _take(request)
    s, e, frames = shape.itemsize, shape.hidden, shape.chunk_frames
    flight = shape.window if request.endless else min(shape.window, chunks)
    flight += 1 if shape.passes == 3 else 0  # a finished chunk stays for a row, to be read once more
    rows, columns = height // shape.unit, width // shape.unit
    sizes = shape.history(
        rows * columns, frames=None if request.endless else chunks * frames, live_chunks=flight, **request.held
    )
    query, kv, n = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, sizes.chunk_tokens
    latents = FP32 * shape.channels * frames * shape.patch**2 * rows * columns
    words = shape.layers * 2 * kv * s  # K and V of one text token
    vae, shared = shape.vae, NULL_TOKENS + (SPECIAL_TOKENS if shape.special else 0)
    spoken = flight * (shape.text_tokens + 2) * words if shape.special else 0  # a chunk's own special tokens before it
    traffic = 2 * (e + query) + 2 * (e + kv) + 2 * query + e + 2 * (e + shape.ffn) + 4 * query
    return Anatomy(
        sizes=sizes, chunk_latents=latents, velocities=flight * shape.passes + 1,
        weights={"transformer": shape.weights + shared * words, **({} if vae is None else {"vae": s * vae.parameters})},
        encoder=shape.encoder_itemsize * shape.encoder_parameters,
        text=shape.text_tokens * (words + FP32 * shape.text_width) + spoken, decoder=0, latents=flight * latents,
        decode=None if vae is None else vae.decode_peak(frames, height, width, s),
        forward=peaks.magi_forward(n, e, shape.ffn, s, query=query, kv=kv), pairs=3 * (shape.head_dim // 8),
        query=query, pairing="half", flop_shape=shape.flop_shape, streamed=s * shape.layers * shape.flop_shape.weights,
        token_traffic=s * shape.layers * traffic,
    )  # fmt: skip


def forwards(request: PlanRequest) -> Iterator[Forward]:
    """Every forward of the take."""
    shape, chunks, width, height = _take(request)
    per_frame = width // shape.unit * (height // shape.unit)
    policy, steps = request.policy or KVRange(shape.ranges), request.steps or shape.steps
    made = count(shape, chunks, steps, per_frame, policy, text=shape.text_tokens, null_text=NULL_TOKENS)
    yield from made.forwards_made


def _take(request: PlanRequest) -> tuple[MagiShape, int, int, int]:
    """The model, how many chunks the take has, and its width and height."""
    shape = request.shape or SHAPES[request.model]
    assert isinstance(shape, MagiShape)
    width, height = request.pixels(shape, shape.unit)
    asked, frames = request.pixel_frames(shape.fps), shape.chunk_frames
    if request.chunk not in (None, frames):
        raise LongtakeError(f"--chunk {request.chunk}: a chunk of {shape.name} has {frames} latent frames")
    steps = request.steps or shape.steps
    if steps % shape.window:
        raise LongtakeError(
            f"--steps {steps}: {shape.name} has {shape.window} chunks in flight, use a multiple of that"
        )
    return shape, (request.chunks or 0) if asked is None else -(-asked // (frames * FRAME_STRIDE)), width, height


def _rows(shape: MagiShape, chunks: int, steps: int, per_frame: int) -> list[dict[str, Any]]:
    def row(
        name: str, policy: KVPolicy, reported: float | None = None, skip: int = 0, **passes: bool
    ) -> dict[str, Any]:
        skipped = range(WARMUP, WARMUP + skip)
        made = count(shape, chunks, steps, per_frame, policy, skipped=skipped, **passes)
        return {
            "name": name, "pflops": made.total.peta, "reported_pflops": reported if published else None,
            "reused_steps_per_chunk": skip, "policy": _spec(policy), **passes,
        }  # fmt: skip

    published = (chunks, steps, per_frame) == (10, 64, 2025)
    bare = {"nearly_clean": False, "clean": False}
    budget = FlowCacheKV(BUDGET)
    return [
        row("vanilla with clean passes", FullHistory()),
        row("vanilla", FullHistory(), 306.0, clean=False),
        row("vanilla, no nearly clean passes", FullHistory(), **bare),
        row("compressed, nothing reused", budget, **bare),
        *(row(name, budget, reported, min(skip, steps - WARMUP), **bare) for name, reported, skip in REPORTED),
    ]


def _fit(shape: MagiShape, chunks: int, steps: int, per_frame: int) -> dict[str, Any]:
    """Reuse as Gaussian data would have it."""
    rows = []
    for threshold in (0.01, 0.015):
        policy = FlowCacheReuse(threshold, "latent", warmup=WARMUP, last="take", rescale="identity")
        skipped = predicted_reuse(policy, relative_l1(magi_levels(steps), 1.0))
        made = count(
            shape, chunks, steps, per_frame, FlowCacheKV(BUDGET), nearly_clean=False, clean=False, skipped=skipped
        )
        rows.append({"threshold": threshold, "reused_steps": skipped, "pflops": made.total.peta})
    return {
        "what": "a fit, not a measurement: relative L1 of Gaussian data with standard deviation s, where s = 1 comes "
        "closest to the published table",
        "s": 1.0, "policy": _spec(FlowCacheKV(BUDGET)), "rows": rows,
    }  # fmt: skip


def _spec(policy: KVPolicy) -> str:
    size = {"FlowCacheKV": "chunks", "KVRange": "ranges"}.get(type(policy).__name__)
    return policy.name if size is None else f"{policy.name}:{size}={getattr(policy, size)}"

"""Lumos-1 (arXiv 2507.08801) as a thin host: a model with an attention seam, positions as a table, and the frame loop.

The model knows neither rotation nor storage. Self-attention of layer i calls `layers[i].attend(q, k, v)` with q and k
normalised but not rotated; the layer object rotates, stores and attends. A `Stream` owns one list of layer objects.
Letters: B batch, N tokens, Hq/Hk query/key heads, D head dim, C channels, V vocabulary, v visual tokens of a frame,
c content tokens (visual and newlines), S steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

FRAME_END, FRAME_BEGIN, NEWLINE, INTEGER, MASK = 8196, 8197, 8803, 8804, 9003
VIDEO_BEGIN, VIDEO_END, VISUAL = 9004, 9005, 65536
PATCH, TEMPORAL_STRIDE = 8, 4  # pixels per code, pixel frames per latent frame: the strides of the positions


class AttentionLayer(Protocol):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, N, Hq, D], k and v [B, N, Hk, D], after QK LayerNorm and before rotation -> [B, N, Hq, D]."""


class Stream(Protocol):
    """One guidance branch: it owns K/V of every layer."""

    @property
    def length(self) -> int:
        """Tokens whose K/V are kept."""

    def begin(self, positions: Positions, time: int, *, causal: bool, writes: bool) -> Sequence[AttentionLayer]:
        """Layers for one pass over tokens at `positions.at(time)`, which see everything kept and each other.

        `causal`: a token does not see the pass's later tokens. `writes`: the pass's K/V are kept, else forgotten.
        """


class Rope(NamedTuple):
    """Rotary table: angle[token, pair] = position[token, axis[pair]] * frequency[pair]; pair i is dims i, i + D/2."""

    axis: Tensor  # [D/2] int64: 0 = t, 1 = h, 2 = w
    frequency: Tensor  # [D/2] fp64

    def angles(self, position: Tensor) -> Tensor:
        """position [N, 3] -> [N, D/2] fp64."""
        return position.double()[:, self.axis] * self.frequency


def mm_rope(head_dim: int, theta: float) -> Rope:
    """MM-RoPE: one frequency ladder over the head, and t, h, w dealt to its pairs 2:3:3 with period 16."""
    # The period counts pairs, so it must divide D/2: with D = 16 upstream gives the two dims of a pair different axes.
    assert head_dim % 32 == 0, f"MM-RoPE needs a head_dim divisible by 32, got {head_dim}"
    pair = torch.arange(head_dim // 2)
    axis = torch.tensor([0, 0, 0, 0, *([1, 1, 2, 2] * 3)])[pair % 16]
    return Rope(axis, float(theta) ** (-2.0 * pair.double() / head_dim))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, N, H, D], angles [N, D/2] -> [B, N, H, D]. The angle is fp64, the rotation has x's dtype."""
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]  # [N, 1, D/2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Positions(NamedTuple):
    """Where tokens stand at latent frame 0, and how far they move per latent frame."""

    base: Tensor  # [N, 3] int64, axes t, h, w
    step: Tensor  # [N, 3] int64

    def at(self, time: int) -> Tensor:
        """[N, 3]"""
        return self.base + time * self.step


def text_positions(start: int, tokens: int) -> Positions:
    """Text and video header: the 1-D index on every axis, at every time."""
    base = torch.arange(start, start + tokens)[:, None].expand(-1, 3)
    return Positions(base, torch.zeros_like(base))


@dataclass(frozen=True)
class FrameGrid:
    """A latent frame of `rows` x `columns` codes: begin, height, width, rows of codes each closed by a newline, end."""

    rows: int
    columns: int

    @property
    def visual(self) -> int:
        return self.rows * self.columns

    @property
    def content(self) -> int:
        return self.rows * (self.columns + 1)

    @property
    def tokens(self) -> int:
        return self.content + 4

    def places(self) -> Tensor:
        """[v] index of each code inside the frame's ids, raster order."""
        return 3 + torch.arange(self.content).view(self.rows, -1)[:, : self.columns].flatten()

    def ids(self, codes: Tensor) -> Tensor:
        """codes [v], -1 = masked -> [N] ids. Newlines stay real."""
        size = (INTEGER + self.rows * PATCH // 32, INTEGER + self.columns * PATCH // 32)
        ids = torch.tensor([FRAME_BEGIN, *size, *[NEWLINE] * self.content, FRAME_END])
        ids[self.places()] = torch.where(codes < 0, MASK, codes + VISUAL)
        return ids

    def positions(self, start: int) -> Positions:
        """Of a stream whose text and header are `start` tokens long: the offset is the stream's, not the frame's."""
        p0 = start + 3  # first content token of frame 0
        row, column = torch.arange(self.content) // (self.columns + 1), torch.arange(self.content) % (self.columns + 1)
        base = torch.arange(start, start + self.tokens)[:, None].repeat(1, 3)  # structural ids: 1-D index on every axis
        base[3:-1] = torch.stack([torch.full_like(row, p0), p0 + PATCH * row, p0 + PATCH * column], dim=1)
        step = torch.full_like(base, self.tokens)
        step[3:-1] = torch.tensor([TEMPORAL_STRIDE, 0, 0])
        return Positions(base, step)


@dataclass(frozen=True)
class ThinLumos:
    """Chameleon block (Llama with a LayerNorm per head on q and k) over a flat dict of weights in checkpoint names."""

    weights: Mapping[str, Tensor]
    layers: int
    head_dim: int
    theta: float
    eps: float

    @property
    def rope(self) -> Rope:
        return mm_rope(self.head_dim, self.theta)

    def hidden(self, ids: Tensor, layers: Sequence[AttentionLayer]) -> Tensor:
        """ids [B, N] -> final normalised hidden states [B, N, C]."""
        w = self.weights
        x = F.embedding(ids, w["model.embed_tokens.weight"])
        for i, layer in enumerate(layers):
            name = f"model.layers.{i}."
            y = F.rms_norm(x, x.shape[-1:], w[name + "input_layernorm.weight"], self.eps)
            q, k, v = (
                F.linear(y, w[f"{name}self_attn.{p}_proj.weight"]).unflatten(-1, (-1, self.head_dim)) for p in "qkv"
            )  # [B, N, H, D]
            q, k = self._head_norm(q, name + "self_attn.q_norm"), self._head_norm(k, name + "self_attn.k_norm")
            x = x + F.linear(layer.attend(q, k, v).flatten(2), w[name + "self_attn.o_proj.weight"])
            y = F.rms_norm(x, x.shape[-1:], w[name + "post_attention_layernorm.weight"], self.eps)
            gate, up = (F.linear(y, w[f"{name}mlp.{p}_proj.weight"]) for p in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, w[name + "mlp.down_proj.weight"])
        return F.rms_norm(x, x.shape[-1:], w["model.norm.weight"], self.eps)

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """hidden [B, N, C] -> [B, N, V], or only the wanted vocabulary columns."""
        return F.linear(hidden, self.weights["lm_head.weight"][columns])

    def _head_norm(self, x: Tensor, name: str) -> Tensor:
        gain, bias = self.weights[name + ".weight"][0], self.weights[name + ".bias"][0]  # stored (1, D), for all heads
        return F.layer_norm(x, (self.head_dim,), gain, bias, 1e-5)


def written_weights(rule: Mapping[str, Any]) -> dict[str, Tensor]:
    """The deterministic weights of a golden's `weight_rule`: sines of a tensor's rank by name and of the flat index."""
    weights = {}
    for j, (name, shape) in enumerate(sorted(rule["shapes"].items())):
        i = torch.arange(1, math.prod(shape) + 1)
        s = torch.sin(((i * i) % rule["modulus"]).double() * rule["a"] + (j + 1) * rule["b"])
        if "norm" in name and name.endswith("weight"):
            s = 1 + rule["norm_scale"] * s
        else:
            s = s * rule["bias_scale" if name.endswith("bias") else "matrix_scale"]
        weights[name] = s.float().view(shape)
    return weights


class Draw(Protocol):
    """Where chance enters. `frame` counts generated frames: a given frame is not counted."""

    def codes(self, frame: int, step: int, logp: Tensor) -> Tensor:
        """logp [v, codes] -> [v] sampled codes."""

    def gumbel(self, frame: int, step: int, tokens: int) -> Tensor:
        """[v] noise of the confidence, before the temperature."""


@dataclass
class FrameRecord:
    """What one generated frame went through."""

    latent_frame: int
    history: tuple[int, int]  # tokens kept by the two streams before the write pass
    step_inputs: list[Tensor]  # S x [v] codes, -1 = masked
    temperatures: list[float]  # S
    final: Tensor  # [v]
    write_ids: Tensor  # [N] ids of the write pass


def history_mask(content: int, ratio: float) -> Tensor:
    """Content positions that the write pass masks: evenly spread, the same in every frame."""
    n = max(1, round(ratio * content))
    return torch.tensor([round(j * content / n) for j in range(n)])


def still_masked(tokens: int, step: int, steps: int) -> int:
    """Codes the cosine schedule leaves masked after `step` (0-based)."""
    # fp32 on purpose: 96 * cos(pi/3) floors to 47 here and to 48 in fp64, and then other ids come out.
    return int(torch.floor(tokens * torch.cos(torch.tensor((step + 1) / steps) * math.pi * 0.5)))


def generate(
    model: ThinLumos,
    streams: tuple[Stream, Stream],
    prompt: Sequence[int],
    grid: FrameGrid,
    draw: Draw,
    *,
    frames: int,
    steps: int,
    guidance: float,
    history_mask_ratio: float,
    given: Tensor | None = None,
) -> Iterator[FrameRecord]:
    """Generate latent frames as upstream does, its quirks included. Yields after each frame's write pass.

    `streams` is (cond, uncond). `prompt`: ids of text, separator and video header (video-begin, seconds, fps).
    `frames`: latent frames of the video. `given`: codes [v] of a conditioning image; it is frame 0 and not yielded.

    Passes, in this order. Every pass sees all that its stream has kept, and itself. "kept" adds the pass's K/V, the
    others are forgotten when they end. The text of cond is the whole prompt, that of uncond only the three header ids.

        once                    cond    text                           causal  kept       does not move in time
                                cond    given frame, unmasked          dense   kept       time 0, only if given
                                uncond  text                           causal  kept
                                uncond  given frame, unmasked          dense   kept       time 0, only if given
        frame f, step 0..S-1    cond    frame, partly masked           dense   forgotten  time f
                                uncond  the same ids                   dense   forgotten  time f
                                (guidance, draw, re-mask)
        frame f, write          cond    finished frame, history-mask   dense   kept       time f
                                uncond  the same ids                   dense   kept       time f

    So a frame is 2S + 2 dense passes of N tokens, after which each stream is N tokens longer, and no pass needs a
    mask: only the very first of a stream is causal, and it has no past. f counts from 1 if a frame is given, else from
    0. The streams never read each other; they differ in text and, through its length, in the offset of all positions.

    Quirks kept: the temperature is multiplied by 1 - (s+1)/S at each step and never reset, so from the second generated
    frame on the ranking is noiseless; the given frame is kept without the history mask; uncond is fed the decoded ids,
    not masks; the last frame is written although nobody reads it. Upstream runs the text and the given frame inside
    step 0 of the first frame and keeps them from there; their K/V are the same, since they see no later frame.
    """
    header = list(prompt).index(VIDEO_BEGIN)
    visual = slice(VISUAL, None)
    places, masked_content = grid.places(), history_mask(grid.content, history_mask_ratio)
    positions = []  # of a frame, per stream
    for stream, text in zip(streams, (prompt, prompt[header:]), strict=True):
        frame_positions = grid.positions(len(text))
        model.hidden(
            torch.tensor([*text])[None], stream.begin(text_positions(0, len(text)), 0, causal=True, writes=True)
        )
        if given is not None:
            model.hidden(grid.ids(given)[None], stream.begin(frame_positions, 0, causal=False, writes=True))
        positions.append(frame_positions)

    def both(ids: Tensor, time: int, *, writes: bool) -> list[Tensor]:
        """One dense pass of each stream over the frame's ids [N] -> two hidden states [N, C]."""
        return [
            model.hidden(ids[None], stream.begin(place, time, causal=False, writes=writes))[0]
            for stream, place in zip(streams, positions, strict=True)
        ]

    temperature = 1.0
    first = 0 if given is None else 1
    for time in range(first, frames):
        codes = torch.full((grid.visual,), -1)
        step_inputs, temperatures = [], []
        for step in range(steps):
            step_inputs.append(codes)
            cond, uncond = (model.logits(h[places], visual) for h in both(grid.ids(codes), time, writes=False))
            logp = F.log_softmax(guidance * (cond - uncond) + uncond, dim=-1)  # [v, codes]
            unknown = codes < 0
            drawn = draw.codes(time - first, step, logp)
            temperature *= 1 - (step + 1) / steps
            temperatures.append(temperature)
            noise = draw.gumbel(time - first, step, grid.visual)
            confidence = logp.gather(1, drawn[:, None])[:, 0] + temperature * noise
            confidence = torch.where(unknown, confidence, torch.inf)  # what is known stays
            codes = torch.where(unknown, drawn, codes)
            if step + 1 < steps:
                count = max(1, min(still_masked(grid.visual, step, steps), int(unknown.sum()) - 1))
                codes = torch.where(confidence < confidence.sort().values[count], -1, codes)
        write_ids = grid.ids(codes)
        write_ids[3 + masked_content] = MASK  # newlines are content: they can be masked too
        history = (streams[0].length, streams[1].length)
        both(write_ids, time, writes=True)
        yield FrameRecord(time, history, step_inputs, temperatures, codes, write_ids)

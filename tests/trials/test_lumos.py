"""The thin Lumos-1 host against the numbers of the original model and of its generation loop."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from tests.trials.lumos import (
    VIDEO_BEGIN,
    VIDEO_END,
    VISUAL,
    FrameGrid,
    FrameRecord,
    Positions,
    Rope,
    ThinLumos,
    generate,
    history_mask,
    mm_rope,
    rotate,
    text_positions,
    written_weights,
)

GOLDENS = Path(__file__).parents[1] / "goldens"
LOOP = json.loads((GOLDENS / "lumos_tiny_generate.json").read_text())
CONFIG = LOOP["config"]
GRID = FrameGrid(CONFIG["height"] // 8, CONFIG["width"] // 8)
HEADER = [VIDEO_BEGIN, 8804 + CONFIG["seconds"], 8804 + CONFIG["fps"]]
PROMPT = [*CONFIG["text_ids"], *HEADER]


def attention(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """q [B, N, Hq, D], k and v [B, M, Hk, D] -> [B, N, Hq, D]; query heads share key heads in groups."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how).transpose(1, 2)


@dataclass
class RotatedLayer:
    """Keeps a list of rotated keys and of values, one entry per kept pass."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    angles: Tensor | None = None
    causal: bool = False
    writes: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, self.angles), rotate(k, self.angles)
        keys, values = [*self.keys, k], [*self.values, v]
        # With a past, a causal mask would be aligned to the wrong corner.
        assert not (self.causal and self.keys), "a causal pass must come first"
        out = attention(q, torch.cat(keys, 1), torch.cat(values, 1), is_causal=self.causal)
        if self.writes:
            self.keys, self.values = keys, values
        return out


@dataclass
class RotatedStream:
    name: str
    rope: Rope
    layers: list[RotatedLayer]
    events: list[tuple]  # (stream, tokens, time, "causal" | "dense", "kept" | "forgotten"), shared by streams

    @property
    def length(self) -> int:
        return sum(k.shape[1] for k in self.layers[0].keys)

    def begin(self, positions: Positions, time: int, *, causal: bool, writes: bool) -> list[RotatedLayer]:
        angles = self.rope.angles(positions.at(time))
        for layer in self.layers:
            layer.angles, layer.causal, layer.writes = angles, causal, writes
        how = ("causal" if causal else "dense", "kept" if writes else "forgotten")
        self.events.append((self.name, len(angles), time, *how))
        return self.layers


@dataclass
class MaskedLayer:
    """The slow obvious twin: the whole sequence at once under a dense mask."""

    angles: Tensor
    allowed: Tensor  # [N, N] bool, query row, key column

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(rotate(q, self.angles), rotate(k, self.angles), v, attn_mask=self.allowed)


def new_stream(model: ThinLumos, name: str = "cond", events: list[tuple] | None = None) -> RotatedStream:
    layers = [RotatedLayer() for _ in range(model.layers)]
    return RotatedStream(name, model.rope, layers, [] if events is None else events)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDENS / "lumos_tiny_forward.safetensors", "pt") as f:
        config, rule = json.loads(f.metadata()["config"]), json.loads(f.metadata()["weight_rule"])
        assert (config, rule) == (CONFIG, LOOP["weight_rule"]), "both goldens must be of one model"
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)


@pytest.fixture(scope="module")
def model() -> ThinLumos:
    weights = written_weights(LOOP["weight_rule"])
    assert sum(w.numel() for w in weights.values()) == LOOP["weight_rule"]["parameters"]
    return ThinLumos(
        weights, CONFIG["num_hidden_layers"], CONFIG["head_dim"], CONFIG["rope_theta"], CONFIG["rms_norm_eps"]
    )


def given_codes() -> Tensor:
    """Codes of the visible frame."""
    factor, offset = CONFIG["frame_rule"]
    return (torch.arange(GRID.visual) * factor + offset) % 64


def prefill(model: ThinLumos, stream: RotatedStream) -> Tensor:
    """Text, then the visible frame, as two kept passes -> hidden states [N, C] of both."""
    text = model.hidden(
        torch.tensor(PROMPT)[None], stream.begin(text_positions(0, len(PROMPT)), 0, causal=True, writes=True)
    )
    frame = stream.begin(GRID.positions(len(PROMPT)), 0, causal=False, writes=True)
    return torch.cat([text, model.hidden(GRID.ids(given_codes())[None], frame)], 1)[0]


def sequence_positions(text: int, grid: FrameGrid, frames: int) -> Tensor:
    """[T, 3] of a text followed by whole frames."""
    frame = grid.positions(text)
    return torch.cat([text_positions(0, text).at(0), *(frame.at(time) for time in range(frames))])


@pytest.mark.parametrize(
    ("name", "text", "grid", "frames"),
    [
        ("", len(PROMPT), GRID, 2),
        ("example_cond_", len(PROMPT), FrameGrid(8, 8), 3),
        ("example_uncond_", len(HEADER), FrameGrid(8, 8), 3),
    ],
)
def test_base_plus_time_times_step_gives_the_upstream_positions(golden, name, text, grid, frames):
    one_d, thw = golden[f"outputs/{name}positions"][0], golden[f"outputs/{name}positions"][1:].T
    content = golden[f"outputs/{name}is_content"].bool()[:, None]
    expected = torch.where(content, thw, one_d[:, None])
    assert torch.equal(sequence_positions(text, grid, frames), expected)


def test_axis_and_frequency_tables_give_the_upstream_rotation(golden, model):
    angles = model.rope.angles(sequence_positions(len(PROMPT), GRID, 2)).repeat(1, 2)  # half-split: both halves alike
    # Upstream multiplies in fp32: at position 232 one rounding of the angle is 1.5e-5.
    assert (angles.cos() - golden["outputs/rope_cos"]).abs().max() < 3e-5
    assert (angles.sin() - golden["outputs/rope_sin"]).abs().max() < 3e-5


@pytest.mark.parametrize(("head_dim", "t_pairs"), [(64, [0, 16]), (128, [0, 16, 32, 48])])
def test_time_owns_four_pairs_of_every_sixteen(head_dim, t_pairs):
    axis = mm_rope(head_dim, 1e4).axis
    assert (axis == 0).nonzero().flatten().tolist() == [p + i for p in t_pairs for i in range(4)]
    assert [(axis == a).sum().item() * 16 // head_dim for a in range(3)] == [2, 3, 3]


def test_a_head_dim_that_breaks_the_axis_period_is_refused():
    with pytest.raises(AssertionError, match="divisible by 32, got 16"):
        mm_rope(16, 1e4)


def test_the_sequence_is_built_as_upstream_builds_it(golden):
    masked = GRID.ids(torch.full((GRID.visual,), -1))
    assert torch.equal(torch.cat([torch.tensor(PROMPT), GRID.ids(given_codes()), masked]), golden["inputs/ids"])


def test_three_mask_free_passes_give_the_upstream_logits_and_cache(golden, model):
    stream = new_stream(model)
    hidden = prefill(model, stream)
    last = GRID.ids(torch.full((GRID.visual,), -1))
    layers = stream.begin(GRID.positions(len(PROMPT)), 1, causal=False, writes=True)
    logits = model.logits(torch.cat([hidden, model.hidden(last[None], layers)[0]]))  # [T, V]

    rows, columns = golden["inputs/logit_rows"], golden["inputs/logit_columns"]
    visual = logits[len(PROMPT) + GRID.tokens :][GRID.places(), VISUAL : VISUAL + 64]
    torch.testing.assert_close(logits[rows][:, columns], golden["outputs/logits"], rtol=0, atol=5e-5)
    torch.testing.assert_close(visual, golden["outputs/visual_logits_last_frame"], rtol=0, atol=5e-5)
    torch.testing.assert_close(logits.abs().double().mean(), golden["outputs/logits_sum_absmean"][1], rtol=1e-6, atol=0)
    assert torch.equal(logits.argmax(-1), golden["outputs/argmax_all_rows"])
    for i, layer in enumerate(stream.layers):
        kept = torch.cat(layer.keys, 1)[0].transpose(0, 1)  # [Hk, T, D]
        torch.testing.assert_close(kept, golden[f"outputs/cache_layer{i}_k"], rtol=0, atol=5e-5)
    values = torch.cat(stream.layers[1].values, 1)[0].transpose(0, 1)
    torch.testing.assert_close(values, golden["outputs/cache_layer1_v"], rtol=0, atol=5e-5)


def test_mask_free_passes_equal_one_pass_under_the_dense_mask(golden, model):
    angles = model.rope.angles(sequence_positions(len(PROMPT), GRID, 2))
    twin = MaskedLayer(angles, golden["outputs/attention_allowed"].bool())
    dense = model.hidden(golden["inputs/ids"][None], [twin] * model.layers)[0]

    stream = new_stream(model)
    hidden = prefill(model, stream)
    ids = golden["inputs/ids"][None, len(hidden) :]
    layers = stream.begin(GRID.positions(len(PROMPT)), 1, causal=False, writes=False)
    torch.testing.assert_close(torch.cat([hidden, model.hidden(ids, layers)[0]]), dense, rtol=0, atol=1e-5)


def test_a_forgotten_pass_leaves_no_trace_in_the_next(golden, model):
    stream = new_stream(model)
    prefill(model, stream)
    place = GRID.positions(len(PROMPT))
    assert stream.length == golden["inputs/decode_cache_length"]
    model.hidden(golden["inputs/ids"][None, -GRID.tokens :], stream.begin(place, 1, causal=False, writes=False))
    decode = model.hidden(golden["inputs/decode_ids"][None], stream.begin(place, 1, causal=False, writes=False))

    logits = model.logits(decode[0])
    picked = logits[golden["inputs/decode_rows"]][:, golden["inputs/logit_columns"]]
    mean = golden["outputs/decode_logits_sum_absmean"][1]
    torch.testing.assert_close(picked, golden["outputs/decode_logits"], rtol=0, atol=5e-5)
    torch.testing.assert_close(logits.abs().double().mean(), mean, rtol=1e-6, atol=0)
    assert torch.equal(logits[:, VISUAL : VISUAL + 64].argmax(-1), golden["outputs/decode_argmax_visual"])


class Argmax:
    def codes(self, frame: int, step: int, logp: Tensor) -> Tensor:
        return logp.argmax(-1)

    def gumbel(self, frame: int, step: int, tokens: int) -> Tensor:
        return torch.zeros(tokens)


class PseudoRandom:
    """The golden's written noise rule."""

    def __init__(self) -> None:
        self.rule = LOOP["pseudo_random"]["noise_rule"]

    def _sine(self, i: Tensor, phase: float) -> Tensor:
        return torch.sin(((i * i) % self.rule["modulus"]).double() * self.rule["a"] + phase)

    def codes(self, frame: int, step: int, logp: Tensor) -> Tensor:
        n, codes = logp.shape
        i = 1 + (frame * CONFIG["steps"] + step) * n * codes + torch.arange(n * codes).view(n, codes)
        return (logp + self.rule["choice_scale"] * self._sine(i, self.rule["b"])).argmax(-1)

    def gumbel(self, frame: int, step: int, tokens: int) -> Tensor:
        i = 1 + (frame * CONFIG["steps"] + step) * tokens + torch.arange(tokens)
        return self.rule["rank_scale"] * self._sine(i, 2 * self.rule["b"])


DRAWS = {"argmax": Argmax, "pseudo_random": PseudoRandom}


def run(model: ThinLumos, mode: str, task: str) -> tuple[list[FrameRecord], list[tuple], tuple[RotatedStream, ...]]:
    """Records of the generated frames, all passes in order, and the streams."""
    events: list[tuple] = []
    streams = (new_stream(model, "cond", events), new_stream(model, "uncond", events))
    records = generate(
        model,
        streams,
        PROMPT,
        GRID,
        DRAWS[mode](),
        frames=CONFIG["latent_frames"],
        steps=CONFIG["steps"],
        guidance=CONFIG["guidance"],
        history_mask_ratio=CONFIG["history_mask_ratio"],
        given=given_codes() if task == "i2v" else None,
    )
    return list(records), events, streams


def test_the_history_mask_is_spread_as_upstream_spreads_it():
    pattern, example = LOOP["history_mask_pattern"], LOOP["history_mask_pattern_example"]
    assert history_mask(GRID.content, CONFIG["history_mask_ratio"]).tolist() == pattern["indices"]
    assert history_mask(example["content_positions"], example["ratio"]).tolist() == example["indices"]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("mode", ["argmax", "pseudo_random"])
def test_generation_equals_upstream_token_for_token(model, mode, task):
    expected = LOOP[mode][task]
    records, _, _ = run(model, mode, task)

    for record, frame in zip(records, expected["frames"], strict=True):
        assert record.latent_frame == frame["latent_frame"]
        assert record.history == (frame["cache_length_cond"], frame["cache_length_uncond"])
        assert [codes.tolist() for codes in record.step_inputs] == frame["step_inputs"]
        assert [int((codes < 0).sum()) for codes in record.step_inputs] == frame["masked_at_step_input"]
        assert record.final.tolist() == frame["final"]
        assert record.write_ids.tolist() == frame["write_pass_ids"]
    assert [t for record in records for t in record.temperatures] == pytest.approx(expected["temperatures"], abs=1e-15)

    finals = [r.final for r in records]
    shown = [given_codes(), *finals] if task == "i2v" else finals
    returned = [*HEADER, *torch.cat([GRID.ids(codes) for codes in shown]).tolist(), VIDEO_END]
    assert returned == expected["returned_ids"]
    assert hashlib.sha1(",".join(map(str, returned)).encode()).hexdigest()[:16] == expected["sha1_16"]
    prompt = [*PROMPT, *GRID.ids(given_codes()).tolist()] if task == "i2v" else PROMPT
    assert prompt == expected["prompt_ids"]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_each_stream_counts_positions_from_its_own_text(task):
    for frame in LOOP["argmax"][task]["frames"]:
        for name, text in (("cond", len(PROMPT)), ("uncond", len(HEADER))):
            at = GRID.positions(text).at(frame["latent_frame"])
            structural = at[[0, 1, 2, -1]]
            assert structural.tolist() == [[u, u, u] for u in frame[f"structural_positions_{name}"]]
            assert at[3:-1, 0].unique().tolist() == [frame[f"content_t_{name}"]]
        assert GRID.positions(len(PROMPT)).at(frame["latent_frame"])[3, 1:].tolist() == frame["content_h0_w0_cond"]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_passes_come_in_the_documented_order_and_only_text_and_finished_frames_are_kept(model, task):
    _, events, streams = run(model, "argmax", task)
    first = 1 if task == "i2v" else 0
    expected: list[tuple] = []
    for name, text in (("cond", len(PROMPT)), ("uncond", len(HEADER))):
        expected.append((name, text, 0, "causal", "kept"))
        expected += [(name, GRID.tokens, 0, "dense", "kept")] * first
    for time in range(first, CONFIG["latent_frames"]):
        for kept in ["forgotten"] * CONFIG["steps"] + ["kept"]:
            expected += [(name, GRID.tokens, time, "dense", kept) for name in ("cond", "uncond")]
    assert events == expected
    frames = CONFIG["latent_frames"] * GRID.tokens
    assert [s.length for s in streams] == [len(PROMPT) + frames, len(HEADER) + frames]

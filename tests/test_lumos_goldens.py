"""Lumos-1 against the numbers of the original model and of its generation loop, on the session everyone uses."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from longtake import FullHistory, Session
from longtake.hosts.lumos import Lumos, LumosGeometry, Vocabulary
from longtake.hosts.lumos.host import PromptLayer
from longtake.hosts.lumos.sequence import FIXED, MASKED, frame_ids, frame_positions, text_positions
from longtake.plan import Entry, Plan
from longtake.samplers.masked import history_pattern

from .lumos import (
    CHANCE,
    CONFIG,
    GEOMETRY,
    HEADER,
    IMAGE,
    LOOP,
    PROMPT,
    Fed,
    GivenCodes,
    N,
    forward_golden,
    given_codes,
    golden_model,
    settings,
)

TEXTS = {"cond": len(PROMPT), "uncond": len(HEADER)}
TAKES = [(task, mode) for task in ("t2v", "i2v") for mode in ("argmax", "pseudo_random")]


@pytest.fixture(scope="module")
def model():
    return golden_model()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return forward_golden()


def host(model, **changes) -> Lumos:
    return Lumos(model, settings(**changes), codec=GivenCodes(), name="golden")


def take(model, task: str, mode: str, policy=None, **options) -> Session:
    return Session(
        host(model), policy or FullHistory(), prompt_embeds=torch.tensor([PROMPT]), noise=CHANCE[mode](),
        image=IMAGE if task == "i2v" else None, decode=False, **options,
    )  # fmt: skip


def returned(task: str, frames: list[Tensor]) -> list[int]:
    """What the original program returns: header, frames, and the end of the video."""
    shown = [given_codes()] * (task == "i2v") + frames
    ids = [frame_ids(content(x), GEOMETRY, WORDS) for x in shown]
    return [*HEADER, *torch.cat(ids, 1)[0].tolist(), 9005]


WORDS = Vocabulary()


def sequence(prefix: int, geometry: LumosGeometry, frames: int) -> Tensor:
    """[T, 3] of a text followed by whole frames."""
    return torch.cat([text_positions(prefix)[0], *(frame_positions(geometry, prefix, f)[0] for f in range(frames))])


@pytest.mark.parametrize(
    ("name", "prefix", "size", "frames"),
    [
        ("", len(PROMPT), (64, 96), 2),
        ("example_cond_", len(PROMPT), (64, 64), 3),
        ("example_uncond_", len(HEADER), (64, 64), 3),
    ],
)
def test_every_token_stands_where_the_original_puts_it(golden, name, prefix, size, frames):
    one_d, thw = golden[f"outputs/{name}positions"][0], golden[f"outputs/{name}positions"][1:].T
    content = golden[f"outputs/{name}is_content"].bool()[:, None]
    geometry = LumosGeometry(*size, 1, 1, 9, patch=(1, 1, 1))
    assert torch.equal(sequence(prefix, geometry, frames), torch.where(content, thw, one_d[:, None]).double())


def test_the_rotary_table_gives_the_original_rotation(golden, model):
    phases = host(model).rotary.phases(sequence(len(PROMPT), GEOMETRY, 2)).repeat(1, 2, 1)  # both halves alike
    # the original multiplies in fp32: at position 232 one rounding of the angle is 1.5e-5
    assert (phases[..., 0] - golden["outputs/rope_cos"]).abs().max() < 3e-5
    assert (phases[..., 1] - golden["outputs/rope_sin"]).abs().max() < 3e-5


def content(codes: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes, (0, 1), value=FIXED)


@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_the_sessions_passes_give_the_original_logits_and_cache(golden, model, residency):
    """Text, then the visible frame, then a masked one, none of them under a mask."""
    here = host(model, guidance_scale=1.0)
    session = Session(
        here, FullHistory(), prompt_embeds=torch.tensor([PROMPT]), image=IMAGE, decode=False, residency=residency,
    )  # fmt: skip
    columns, rows = golden["inputs/logit_columns"], golden["inputs/logit_rows"]
    masked = content(torch.full((1, 1, 1, *GEOMETRY.latent_size), MASKED))
    frames = [frame_ids(x, GEOMETRY, here.words) for x in (content(given_codes()), masked)]
    assert torch.equal(torch.cat([torch.tensor([PROMPT]), *frames], 1)[0], golden["inputs/ids"])

    # what the session did: the prompt by itself, the given frame behind it; and now a frame that is not kept yet
    layers = [PromptLayer(here.rotary, here.rotary.phases(text_positions(len(PROMPT))[0])) for _ in range(here.layers)]
    hidden = [model(torch.tensor([PROMPT]), layers, causal=True)]
    given = session.history.table().blocks[-1].id
    session.history.reopen(given)
    session.history.apply(Plan((Entry(0),)))
    hidden.append(model(frames[0], session.history.layers("cond", given, write=True)))
    session.history.commit(given)
    block = session.rollout.admit(1)
    hidden.append(model(frames[1], session.history.layers("cond", block)))
    logits = model.logits(torch.cat(hidden, 1)[0])
    torch.testing.assert_close(logits[rows][:, columns], golden["outputs/logits"], rtol=0, atol=5e-5)
    torch.testing.assert_close(logits.abs().double().mean(), golden["outputs/logits_sum_absmean"][1], rtol=1e-6, atol=0)
    assert torch.equal(logits.argmax(-1), golden["outputs/argmax_all_rows"])

    # a pass that writes nothing leaves no trace in the next one
    decode = model.logits(model(golden["inputs/decode_ids"][None], session.history.layers("cond", block))[0])
    picked = decode[golden["inputs/decode_rows"]][:, columns]
    torch.testing.assert_close(picked, golden["outputs/decode_logits"], rtol=0, atol=5e-5)
    assert torch.equal(decode[:, 65_536:65_600].argmax(-1), golden["outputs/decode_argmax_visual"])

    hidden = here.forward(masked, 0.0, session.texts["cond"], session.history.layers("cond", block, write=True))
    session.history.commit(block)
    visual = here.logits(hidden.unflatten(1, GEOMETRY.grid)[:, :, :-1].flatten(1, 2))[0]
    torch.testing.assert_close(visual, golden["outputs/visual_logits_last_frame"], rtol=0, atol=5e-5)
    store = session.history.stores["cond"]
    held = torch.cat([store.held[(b.id, "full")].rows for b in session.history.table().blocks])
    for layer in range(here.layers):
        kept = here.rotary.rotate(store.k[layer][:, held], here.rotary.phases(store.base[held]))
        torch.testing.assert_close(kept[0].transpose(0, 1), golden[f"outputs/cache_layer{layer}_k"], rtol=0, atol=5e-5)
    values = store.v[1][0, held].transpose(0, 1)
    torch.testing.assert_close(values, golden["outputs/cache_layer1_v"], rtol=0, atol=5e-5)


def test_a_causal_pass_with_a_past_is_refused(model):
    session = take(model, "i2v", "argmax")
    layers = session.history.layers("cond", session.rollout.admit(1))
    with pytest.raises(RuntimeError, match=f"causal pass of {N} tokens sees {len(PROMPT) + N} before it"):
        model(torch.full((1, N), 9003), layers, causal=True)


def test_the_history_mask_is_spread_as_the_original_spreads_it():
    pattern, example = LOOP["history_mask_pattern"], LOOP["history_mask_pattern_example"]
    content = GEOMETRY.tokens_per_frame - 4
    assert history_pattern(content, CONFIG["history_mask_ratio"]).tolist() == pattern["indices"]
    assert history_pattern(example["content_positions"], example["ratio"]).tolist() == example["indices"]


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize(("task", "mode"), TAKES)
def test_generation_equals_the_original_token_for_token(model, task, mode, residency):
    expected = LOOP[mode][task]
    session = take(model, task, mode, residency=residency)
    fed = Fed(session.host)
    steps, frames = CONFIG["steps"], []
    for frame in expected["frames"]:
        lengths = {name: int(store.used.sum()) for name, store in session.history.stores.items()}
        chunk = next(session)
        frames.append(chunk.latents[None])
        if len(frames) > 1 or task == "i2v":
            assert lengths == {"cond": frame["cache_length_cond"], "uncond": frame["cache_length_uncond"]}
        passes = fed.content[-2 * steps - 2 :]
        inputs = [x[..., :-1].flatten().tolist() for x in passes[:-2:2]]
        assert inputs == frame["step_inputs"]
        assert all(torch.equal(a, b) for a, b in zip(passes[::2], passes[1::2], strict=True))  # both streams alike
        assert chunk.latents.flatten().tolist() == frame["final"]
        assert fed.ids()[-1].tolist() == frame["write_pass_ids"]
    assert hashlib.sha1(",".join(map(str, returned(task, frames))).encode()).hexdigest()[:16] == expected["sha1_16"]
    assert returned(task, frames) == expected["returned_ids"]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_each_stream_counts_positions_from_its_own_text(model, task):
    session = take(model, task, "argmax")
    for frame in LOOP["argmax"][task]["frames"]:
        texts = dict(session.texts)
        at = session.host.stream_positions(GEOMETRY, frame["latent_frame"], 1, texts)
        for name in TEXTS:
            base, _ = at[name]
            assert base[GEOMETRY.structural].tolist() == [[u, u, u] for u in frame[f"structural_positions_{name}"]]
            assert base[3:-1, 0].unique().tolist() == [frame[f"content_t_{name}"]]
        assert at["cond"][0][3, 1:].tolist() == frame["content_h0_w0_cond"]

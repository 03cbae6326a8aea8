"""PackCache on Lumos-1, on the session everyone uses: the recorded runs of nine latent frames, token for token."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from longtake import FullHistory, LastFrames, PackCache, Session, SinkWindow, Uniform
from longtake.evaluate.attention_mass import MassProbe
from longtake.hosts.lumos import Lumos
from longtake.hosts.lumos.sequence import frame_ids, frame_positions, text_positions
from longtake.plan import FULL, as_tensor
from longtake.planner.lumos import LumosShape, plan
from longtake.planner.request import PlanRequest

from .lumos import (
    CONFIG,
    GEOMETRY,
    IMAGE,
    Argmax,
    Fed,
    GivenCodes,
    N,
    PseudoRandom,
    given_codes,
    golden_model,
    settings,
)

HEADER = [9004, 8804 + 3, 8804 + 11]  # 3 seconds at 11 a second: nine latent frames
PROMPT = [*CONFIG["text_ids"], *HEADER]
FRAMES = 9
CONTENT = GEOMETRY.tokens_per_frame - 4
PAST = 2 * CONFIG["steps"]  # passes of a frame before its write passes


@pytest.fixture(scope="module")
def model():
    return golden_model()


def session(model, policy, image: bool = True, **options) -> Session:
    host = Lumos(model, settings(training_frames=FRAMES), codec=GivenCodes(), name="golden")
    return Session(
        host, policy, prompt_embeds=torch.tensor([PROMPT]), image=IMAGE if image else None, decode=False,
        **{"noise": Argmax(), **options},
    )  # fmt: skip


def digest(host: Lumos, frames: list[Tensor]) -> str:
    """Of the ids the original program returns: header, frames, and the end of the video."""
    shown = [torch.nn.functional.pad(x, (0, 1), value=-2) for x in [given_codes(), *frames]]
    ids = torch.cat([frame_ids(x, GEOMETRY, host.words) for x in shown], 1)[0].tolist()
    return hashlib.sha1(",".join(map(str, [*HEADER, *ids, 9005])).encode()).hexdigest()[:16]


def nine_frames(model, policy, **options) -> tuple[str, list[int], list[int], Session]:
    """Digest of the argmax image-to-video run, prefix length and slot of every frame generated, and the session."""
    take = session(model, policy, **options)
    frames, prefixes, slots = [], [], []
    for _ in range(1, FRAMES):
        frames.append(next(take).latents[None])
        prefixes.append(take.stats.last.attended_tokens - N)
        slots.append(sum(b.span for b in take.history.table().blocks) - 1)  # all that is held before it
    return digest(take.host, frames), prefixes, slots, take


def test_full_history_and_an_unlimited_budget_give_the_same_recorded_frames(model):
    for policy in (FullHistory(), PackCache(history_frames=FRAMES, max_frames=FRAMES)):
        assert nine_frames(model, policy)[0] == "cffe618d66043fa4"


@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_one_frame_of_history_over_four_gives_the_recorded_frames(model, residency):
    found, prefixes, slots, take = nine_frames(model, PackCache(), residency=residency)
    assert found == "af5f55b9c4db9f9e"
    assert prefixes == [125, 233, 237, 241, 245, 245, 245, 245]
    assert slots == [1, 2, 3, 4, 5, 5, 5, 5]
    held = [b for b in take.history.table().blocks if b.role != "anchor"]
    # the last frame was written and nothing was planned after it: the four before it are as its passes saw them
    assert [b.forms[FULL].count - 4 for b in held] == [13, 13, 26, 52, CONTENT]


def test_the_sliding_window_gives_the_recorded_frames(model):
    for policy in (LastFrames(1), PackCache(max_frames=1)):
        assert nine_frames(model, policy)[0] == "42f2072b3adb9318"


def test_leaving_everything_where_it_was_written_gives_other_frames(model):
    assert nine_frames(model, PackCache(rebase="none"))[0] not in ("af5f55b9c4db9f9e", "cffe618d66043fa4")


def test_history_bytes_equal_the_formula_and_stay_there(model):
    take = session(model, PackCache())
    row = take.history.shape.token_bytes // 2  # of one stream
    texts = len(PROMPT) + len(HEADER)
    allocated, held = take.memory()["store"], []
    for _ in range(FRAMES - 1):
        next(take)
        held.append(take.stats.last.history_bytes)
    # anchors, the budget, four structural ids per retained frame, and the frame just written
    assert held[4:] == [row * (texts + 2 * (N + CONTENT + 4 * 4 + N))] * 4
    assert take.memory()["store"] == allocated


def test_both_streams_hold_the_same_frames_and_tokens(model):
    take = session(model, PackCache(selection="attention"))
    for _ in range(6):
        next(take)
    cond, uncond = take.history.stores["cond"].held, take.history.stores["uncond"].held
    blocks = [b for b in take.history.table().blocks if b.span]
    assert cond.keys() == uncond.keys() and len(blocks) == 6  # image, four of history, the one just written
    assert all(torch.equal(cond[b.id, FULL].tokens, uncond[b.id, FULL].tokens) for b in blocks)


@pytest.mark.parametrize(
    "policy", [PackCache(), PackCache(0.5, 3), Uniform(), LastFrames(2), SinkWindow(2, 1)], ids=str
)
@pytest.mark.parametrize("image", [True, False], ids=["i2v", "t2v"])
def test_layer_0_keys_in_view_are_those_of_the_virtual_video(model, policy, image):
    """They depend on a token and where it stands, on nothing else: compute them anew from the ids that were written."""
    take = session(model, policy, image)
    fed, prefix = Fed(take.host), len(PROMPT)
    # the image was written before anybody watched: unmasked, as the original does
    written = {0: frame_ids(torch.nn.functional.pad(given_codes(), (0, 1), value=-2), GEOMETRY, take.host.words)[0]}
    attention, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
    for frame in range(int(image), 7):
        next(take)
        held = [b for b in take.history.table().blocks if b.span and b.frame < frame]
        ids, at = [torch.tensor(PROMPT)], [text_positions(prefix)[0]]
        for slot, block in enumerate(held):
            owned = as_tensor(block.forms[FULL].owned)
            ids.append(written[block.frame][owned])
            at.append(frame_positions(GEOMETRY, prefix, slot)[0][owned])
        passes = list(zip(fed.ids(), fed.keys, strict=True))[-PAST - 2 :: 2]  # of cond
        for own, keys in passes:
            x = torch.cat([*ids, own])
            k = attention.k_norm(
                attention.k_proj(norm(model.model.embed_tokens(x))).unflatten(-1, (-1, attention.head_dim))
            )
            positions = torch.cat([*at, frame_positions(GEOMETRY, prefix, len(held))[0]])
            expected = take.host.rotary.rotate(k[None], take.host.rotary.phases(positions))
            torch.testing.assert_close(keys, expected, rtol=0, atol=2e-5)
        written[frame] = passes[-1][0]


@pytest.mark.parametrize("image", [True, False], ids=["i2v", "t2v"])
def test_anchors_are_bitwise_what_was_written_for_ever(model, image):
    take = session(model, PackCache(max_frames=2), image, noise=PseudoRandom())
    next(take)

    def anchors() -> dict:
        blocks = [b.id for b in take.history.table().blocks if b.role == "anchor"]
        found = {}
        for stream, store in take.history.stores.items():
            for block in blocks:
                rows = store.held[block, FULL].rows
                parts = (store.k[:, :, rows], store.v[:, :, rows], store.base[rows], store.step[rows])
                found[stream, block] = [t.clone() for t in parts]
        return found

    first = anchors()
    texts, frames = len(PROMPT), N if image else 0
    assert sum(parts[0].shape[2] for (stream, _), parts in first.items() if stream == "cond") == texts + frames
    for _ in range(5):
        next(take)
        now = anchors()
        assert now.keys() == first.keys()
        assert all(torch.equal(a, b) for key in first for a, b in zip(first[key], now[key], strict=True))


def test_attention_keeps_other_tokens_than_bayer_and_as_many(model):
    takes = [session(model, PackCache(selection=order), noise=PseudoRandom()) for order in ("attention", "bayer")]
    for _ in range(6):
        for take in takes:
            next(take)
    looked, evenly = (
        [as_tensor(b.forms[FULL].owned).tolist() for b in take.history.table().blocks if b.role != "anchor"]
        for take in takes
    )
    assert [len(x) for x in looked] == [len(x) for x in evenly] == [13 + 4, 13 + 4, 26 + 4, 52 + 4, N]
    assert all(a != b for a, b in zip(looked[:-1], evenly[:-1], strict=True)) and looked[-1] == evenly[-1]


def test_history_bytes_of_a_session_are_those_of_the_plan_up_to_named_terms(model):
    """What the planner says the last frame finds, and what the session holds then, differ in the text of the second
    stream, which the planner charges like the first's, and in nothing else."""
    host = session(model, PackCache()).host
    shape = LumosShape.of(
        "golden", CONFIG | {"head_dim": host.head_dim}, host.config.as_dict(), itemsize=4, codes=64_000,
        text_tokens=len(PROMPT),
    )  # fmt: skip
    for policy in (PackCache(), PackCache(1.5, 3), FullHistory()):
        take = session(model, policy, chunks=FRAMES - 1)
        for _ in range(FRAMES - 1):
            chunk = next(take)
        told = plan(PlanRequest(model="golden", shape=shape, frames=4 * (FRAMES - 1) + 1, policy=policy))
        assert told["tokens_per_frame"] == N and told["latent_frames"] == FRAMES
        assert told["prefix_tokens"] == chunk.stats.attended_tokens - N
        second_text = (len(PROMPT) - len(HEADER)) * shape.token_bytes
        # the last frame is not written: its rows, which the plan lists as frame_bytes, are free again
        assert told["frame_bytes"] == 2 * N * shape.token_bytes
        assert chunk.stats.history_bytes == told["history_bytes"] - second_text
        if isinstance(policy, PackCache):  # the closed formula: anchors, budget, four structural ids a frame
            budget = round(policy.history_frames * CONTENT) + 4 * policy.max_frames
            assert told["history_bytes"] == 2 * (len(PROMPT) + N + budget) * shape.token_bytes


def outputs(host: Lumos) -> list[Tensor]:
    """Hidden states of every pass from now on, which all logits are made of."""
    forward, found = host.forward, []

    def spy(*given):
        found.append(forward(*given))
        return found[-1].clone()

    host.forward = spy  # type: ignore[method-assign]
    return found


def test_attention_is_measured_on_lumos_too_and_leaves_no_trace(model):
    quiet, watched = (session(model, PackCache(), noise=PseudoRandom()) for _ in range(2))
    hidden = [outputs(take.host) for take in (quiet, watched)]
    probe = MassProbe(watched.history)
    frames = []
    with probe.watching():
        for _ in range(4):
            frames.append(next(quiet).latents)
            assert torch.equal(frames[-1], next(watched).latents)
    assert len(torch.stack(frames).unique()) > 16 and not torch.equal(frames[0], frames[1])  # codes that vary
    assert len(hidden[0]) == len(hidden[1]) == 4 * (PAST + 2)
    assert all(torch.equal(a, b) for a, b in zip(*hidden, strict=True))
    last = [c for c in probe.chunks if c.stream == "uncond"][-1]
    assert [(s.kind, s.tokens) for s in last.segments] == [
        ("text", 3), ("anchor", N), ("history", 30), ("history", 30), ("history", 56), ("current", N)
    ]  # fmt: skip
    assert last.array().shape[:2] == (CONFIG["steps"], CONFIG["num_hidden_layers"])

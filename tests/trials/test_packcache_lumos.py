"""PackCache on Lumos-1's arithmetic, on the library's history: the regressions of nine frames, token for token."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longtake import FullHistory, LastFrames, PackCache
from longtake.plan import FULL, as_tensor

from . import test_lumos_history as trial
from .lumos import INTEGER, VIDEO_BEGIN, VIDEO_END, FrameRecord
from .test_lumos import CONFIG, GRID, given_codes, model  # noqa: F401 (fixture)
from .test_lumos_history import STRUCTURAL, TEXTS, Take, key_error, rollout

HEADER = [VIDEO_BEGIN, INTEGER + 3, INTEGER + 11]  # 3 seconds at 11 a second: nine latent frames
FRAMES = 9


class Packed(Take):
    """The trial's take, whose history knows of structural tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.model.weights["model.layers.0.self_attn.k_proj.weight"].shape[0] // self.model.head_dim
        shape = replace(
            self.history.shape, kv_heads=heads, structural_tokens=len(STRUCTURAL),
            anchor_tokens=max(self.texts.values()) + self.given * GRID.tokens,
        )  # fmt: skip
        self.history = type(self.history)(
            shape, self.history.rotary, streams=tuple(self.texts), capacity=self.policy.capacity(shape),
            visible=self.policy.visible(shape), residency=self.residency,
        )  # fmt: skip


def nine_frames(model, policy, monkeypatch, residency: str = "resident"):  # noqa: F811
    """(returned hash, prefix lengths, slots of the frames generated, take) of the argmax image-to-video run."""
    prompt = [*CONFIG["text_ids"], *HEADER]
    monkeypatch.setattr(trial, "PROMPT", prompt)
    take = Packed(model, policy, residency, given=True)
    prefixes, slots, records = [], [], []
    for record in rollout(take, "i2v", "argmax", FRAMES):
        records.append(record)
        spy = next(spy for name, time, spy in take.seen if name == "cond" and time == record.latent_frame)
        prefixes.append(spy.keys.shape[1] - GRID.tokens)
        slots.append(record.latent_frame + take.history.views["cond"].plan.live_shift)
    take.settle()
    return digest(records), prefixes, slots, take


def digest(records: list[FrameRecord]) -> str:
    shown = [given_codes(), *(record.final for record in records)]
    returned = [*HEADER, *torch.cat([GRID.ids(codes) for codes in shown]).tolist(), VIDEO_END]
    return hashlib.sha1(",".join(map(str, returned)).encode()).hexdigest()[:16]


def test_full_history_and_an_unlimited_budget_give_the_same_nine_frames(model, monkeypatch):  # noqa: F811
    unlimited = PackCache(history_frames=FRAMES, max_frames=FRAMES)
    digests = [nine_frames(model, policy, monkeypatch)[0] for policy in (FullHistory(), unlimited)]
    assert digests == ["cffe618d66043fa4"] * 2


@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_one_frame_of_history_over_four_gives_the_recorded_tokens(model, monkeypatch, residency):  # noqa: F811
    found, prefixes, slots, take = nine_frames(model, PackCache(), monkeypatch, residency)
    assert found == "af5f55b9c4db9f9e"
    assert prefixes == [125, 233, 237, 241, 245, 245, 245, 245]
    assert slots == [1, 2, 3, 4, 5, 5, 5, 5]
    held = [b for b in take.history.table().blocks if b.span and b.role != "anchor"]
    # the last frame was written, and nobody planned after it: the four before it are as the last pass saw them
    assert [len(as_tensor(b.forms[FULL].owned)) - 4 for b in held] == [13, 13, 26, 52, 104]
    for name, text in TEXTS.items():
        rows = int(take.history.stores[name].used.sum())
        assert rows == text + GRID.tokens + 104 + 4 * 4 + GRID.tokens  # the formula: anchors, budget, ids, chunk


def test_the_sliding_window_gives_the_recorded_tokens(model, monkeypatch):  # noqa: F811
    for policy in (LastFrames(1), PackCache(max_frames=1)):
        assert nine_frames(model, policy, monkeypatch)[0] == "42f2072b3adb9318"


def test_a_window_that_moves_nothing_gives_other_tokens(model, monkeypatch):  # noqa: F811
    assert nine_frames(model, PackCache(rebase="none"), monkeypatch)[0] != "af5f55b9c4db9f9e"


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_layer_0_keys_are_those_of_the_virtual_video(model, task):  # noqa: F811
    take = Packed(model, LastFrames(1), "resident", given=task == "i2v")
    assert key_error(take, task) < 2e-5


def test_denoising_never_touches_what_is_held(model, monkeypatch):  # noqa: F811
    """The rows of the store are the same before and after the steps of a frame; only its write pass adds to them."""
    take = Packed(model, PackCache(), "resident", given=True)
    before: dict[str, Tensor] = {}
    compared = 0
    for _ in rollout(take, "i2v", "argmax", 5):
        for name, store in take.history.stores.items():
            table = take.history.table()
            rows = {b.id: store.held[(b.id, FULL)] for b in table.blocks if (b.id, FULL) in store.held}
            for block, held in rows.items():
                now = store.k[:, :, held.rows]
                key = f"{name}/{block}"
                if key in before:
                    tokens, was = before[key]
                    assert torch.equal(was[:, :, torch.isin(tokens, held.tokens)], now)
                    compared += 1
                before[key] = (held.tokens.clone(), now.clone())
    assert compared > 12  # text, image and history of both streams

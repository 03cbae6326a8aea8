"""Lumos-1 on the library's own history: text as an anchor, frames as blocks, positions that step unequally."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.history import History
from longtake.plan import BlockTable, Drop, Entry, HistoryShape, Plan, Signals
from longtake.policies import FullHistory, KVPolicy
from longtake.rope import RotaryTable

from .lumos import MASK, VIDEO_END, VISUAL, FrameRecord, Positions, ThinLumos, generate, mm_rope, text_positions
from .test_lumos import CONFIG, DRAWS, GRID, HEADER, LOOP, PROMPT, given_codes, golden, model  # noqa: F401 (fixtures)

TEXTS = {"cond": len(PROMPT), "uncond": len(HEADER)}
STRUCTURAL = torch.tensor([0, 1, 2, GRID.tokens - 1])
CONTENT = range(3, GRID.tokens - 1)
FRAMES = 5  # latent frames of the policy's takes: given, kept, evicted, and two that move
BOTH_RESIDENCIES = pytest.mark.parametrize("residency", ["resident", "scratch"])
SEEDS = [(task, mode) for task in ("t2v", "i2v") for mode in ("argmax", "pseudo_random")]


def rotary(head_dim: int = CONFIG["head_dim"]) -> RotaryTable:
    """MM-RoPE as the library has it."""
    rope = mm_rope(head_dim, CONFIG["rope_theta"])
    return RotaryTable(tuple(rope.axis.tolist()), tuple(rope.frequency.tolist()), "half")


@dataclass
class Spy:
    """A layer of the view, and what attention saw in it."""

    view: object
    causal: bool
    keys: Tensor | None = None  # [B, history + live, Hk, D], rotated

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.view.attend(q, k, v, causal=self.causal)
        self.keys = self.view.k.clone()
        return out


@dataclass
class Take:
    """Both guidance streams of a take on one history. `given`: the conditioning image is never evicted."""

    model: ThinLumos
    policy: KVPolicy
    residency: str
    texts: dict[str, int] = field(default_factory=lambda: dict(TEXTS))
    given: bool = False
    frame: int = 0  # next to be admitted
    live: dict[object, int] = field(default_factory=dict)  # "text" or time → block
    written: dict[int, set[str]] = field(default_factory=dict)
    seen: list[tuple[str, int, Spy]] = field(default_factory=list)  # stream, time, first layer of every frame's pass

    def __post_init__(self) -> None:
        heads = self.model.weights["model.layers.0.self_attn.k_proj.weight"].shape[0] // self.model.head_dim
        anchors = max(self.texts.values()) + self.given * GRID.tokens
        shape = HistoryShape(
            self.model.layers, heads, self.model.head_dim, 4, GRID.tokens, 1, streams=len(self.texts),
            anchor_tokens=anchors,
        )  # fmt: skip
        self.policy.check(shape)
        self.history = History(
            shape, rotary(self.model.head_dim), streams=tuple(self.texts), capacity=self.policy.capacity(shape),
            visible=self.policy.visible(shape), residency=self.residency,
        )  # fmt: skip

    def stream(self, name: str) -> HistoryStream:
        return HistoryStream(self, name)

    def begin(self, name: str, positions: Positions, time: int, causal: bool, writes: bool) -> list[Spy]:
        self.settle()
        key = "text" if causal else time
        if key not in self.live:
            self.admit(key)
        block = self.live[key]
        base, _ = self.place(name, key)
        assert torch.equal(base, positions.at(time)), "the host's loop and the history must agree on positions"
        spies = [Spy(view, causal) for view in self.history.layers(name, block, write=writes)]
        if writes:
            self.written[block].add(name)
        if not causal:
            self.seen.append((name, time, spies[0]))
        return spies

    def admit(self, key: object) -> None:
        positions = {name: self.place(name, key) for name in self.texts}
        if key == "text":
            block = self.history.admit(0, 0, positions, role="anchor")
        else:
            assert key == self.frame
            role = "anchor" if self.given and key == 0 else "live"
            block = self.history.admit(
                key, 1, positions, role=role, grid=(GRID.rows, GRID.columns + 1), packable=CONTENT,
                structural=STRUCTURAL,
            )  # fmt: skip
            self.frame += 1
        self.live[key], self.written[block] = block, set()
        self.plan()

    def place(self, name: str, key: object) -> tuple[Tensor, Tensor]:
        """base [n, 3] where the tokens stand, step [n, 3] what a shift by one latent frame adds."""
        if key == "text":
            return text_positions(0, self.texts[name])
        frame = GRID.positions(self.texts[name])
        return frame.at(key), frame.step

    def settle(self) -> None:
        """Commit what every stream has written; its pass is over when the next one begins."""
        done = [key for key, block in self.live.items() if len(self.written[block]) == len(self.texts)]
        for key in done:
            self.history.commit(self.live.pop(key))
        if done and self.live:
            self.plan()

    def plan(self) -> None:
        self.history.apply(self.policy.plan(self.history.table(), self.history.signals()))


@dataclass
class HistoryStream:
    """One guidance stream, as the host's loop knows it."""

    take: Take
    name: str

    @property
    def length(self) -> int:
        self.take.settle()
        store = self.take.history.stores[self.name]
        return sum(len(store.held[(b.id, "full")].rows) for b in self.take.history.table().blocks)

    def begin(self, positions: Positions, time: int, *, causal: bool, writes: bool) -> list[Spy]:
        return self.take.begin(self.name, positions, time, causal, writes)


def rollout(take: Take, task: str, mode: str, frames: int = CONFIG["latent_frames"]) -> Iterator[FrameRecord]:
    return generate(
        take.model, (take.stream("cond"), take.stream("uncond")), PROMPT, GRID, DRAWS[mode](),
        frames=frames, steps=CONFIG["steps"], guidance=CONFIG["guidance"],
        history_mask_ratio=CONFIG["history_mask_ratio"], given=given_codes() if task == "i2v" else None,
    )  # fmt: skip


def check_tokens(records: list[FrameRecord], task: str, mode: str, lengths: bool = True) -> None:
    expected = LOOP[mode][task]
    for record, frame in zip(records, expected["frames"], strict=True):
        assert not lengths or record.history == (frame["cache_length_cond"], frame["cache_length_uncond"])
        assert [codes.tolist() for codes in record.step_inputs] == frame["step_inputs"]
        assert record.final.tolist() == frame["final"]
        assert record.write_ids.tolist() == frame["write_pass_ids"]
    shown = [given_codes()] * (task == "i2v") + [record.final for record in records]
    returned = [*HEADER, *torch.cat([GRID.ids(codes) for codes in shown]).tolist(), VIDEO_END]
    assert hashlib.sha1(",".join(map(str, returned)).encode()).hexdigest()[:16] == expected["sha1_16"]


# --- the goldens ----------------------------------------------------------------------------------------------------


@BOTH_RESIDENCIES
@pytest.mark.parametrize(("task", "mode"), SEEDS)
def test_generation_on_the_history_equals_upstream_token_for_token(model, task, mode, residency):  # noqa: F811
    take = Take(model, FullHistory(), residency, given=task == "i2v")
    check_tokens(list(rollout(take, task, mode)), task, mode)
    lengths = [take.stream(name).length for name in TEXTS]
    assert lengths == [text + CONFIG["latent_frames"] * GRID.tokens for text in TEXTS.values()]
    table = take.history.table()
    assert [(b.role, b.frame, b.span) for b in table.blocks[:2]] == [
        ("anchor", 0, 0),
        ("anchor" if task == "i2v" else "committed", 0, 1),
    ]
    assert table.complete and table.frames_seen == CONFIG["latent_frames"] and not table.live


@BOTH_RESIDENCIES
def test_forward_on_the_history_gives_the_upstream_logits_and_cache(golden, model, residency):  # noqa: F811
    take = Take(model, FullHistory(), residency, {"cond": len(PROMPT)}, given=True)
    stream, place = take.stream("cond"), GRID.positions(len(PROMPT))
    text = stream.begin(text_positions(0, len(PROMPT)), 0, causal=True, writes=True)
    hidden = [model.hidden(torch.tensor(PROMPT)[None], text)]
    hidden.append(model.hidden(GRID.ids(given_codes())[None], stream.begin(place, 0, causal=False, writes=True)))
    masked = GRID.ids(torch.full((GRID.visual,), -1))[None]
    hidden.append(model.hidden(masked, stream.begin(place, 1, causal=False, writes=False)))
    logits = model.logits(torch.cat(hidden, 1)[0])  # [T, V]

    rows, columns = golden["inputs/logit_rows"], golden["inputs/logit_columns"]
    visual = logits[len(PROMPT) + GRID.tokens :][GRID.places(), VISUAL : VISUAL + 64]
    torch.testing.assert_close(logits[rows][:, columns], golden["outputs/logits"], rtol=0, atol=5e-5)
    torch.testing.assert_close(visual, golden["outputs/visual_logits_last_frame"], rtol=0, atol=5e-5)
    assert torch.equal(logits.argmax(-1), golden["outputs/argmax_all_rows"])

    # a read-only pass leaves no trace in the one after it
    assert stream.length == golden["inputs/decode_cache_length"]
    again = stream.begin(place, 1, causal=False, writes=False)
    decode = model.logits(model.hidden(golden["inputs/decode_ids"][None], again)[0])
    picked = decode[golden["inputs/decode_rows"]][:, columns]
    torch.testing.assert_close(picked, golden["outputs/decode_logits"], rtol=0, atol=5e-5)
    assert torch.equal(decode[:, VISUAL : VISUAL + 64].argmax(-1), golden["outputs/decode_argmax_visual"])

    # the store's rows, rotated where they stand, are the published cache (which holds rotated keys)
    model.hidden(masked, stream.begin(place, 1, causal=False, writes=True))
    assert stream.length == len(PROMPT) + 2 * GRID.tokens
    store, table = take.history.stores["cond"], take.history.table()
    held = torch.cat([store.held[(b.id, "full")].rows for b in table.blocks])
    for layer in range(model.layers):
        kept = take.history.rotary.rotate(store.k[layer][:, held], take.history.rotary.phases(store.base[held]))
        torch.testing.assert_close(kept[0].transpose(0, 1), golden[f"outputs/cache_layer{layer}_k"], rtol=0, atol=5e-5)
    values = store.v[1][0, held].transpose(0, 1)
    torch.testing.assert_close(values, golden["outputs/cache_layer1_v"], rtol=0, atol=5e-5)


def test_a_causal_pass_with_a_past_is_refused(model):  # noqa: F811
    take = Take(model, FullHistory(), "resident", {"cond": len(PROMPT)})
    stream = take.stream("cond")
    ids = torch.tensor(PROMPT)[None]
    model.hidden(ids, stream.begin(text_positions(0, len(PROMPT)), 0, causal=True, writes=True))
    layers = stream.begin(GRID.positions(len(PROMPT)), 0, causal=False, writes=True)
    for layer in layers:
        layer.causal = True
    with pytest.raises(RuntimeError, match=f"causal pass of {GRID.tokens} tokens sees {len(PROMPT)} before it"):
        model.hidden(GRID.ids(given_codes())[None], layers)


# --- a policy that moves frames to slots ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LastFrames(KVPolicy):
    """Anchors and the last `keep` frames, each where it would stand if nothing else had ever been."""

    keep: int = 1
    moves: bool = True

    name: ClassVar[str] = ""

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        recent = [b for b in table.blocks if b.role != "anchor"]
        seen = [b for b in table.blocks if b.role == "anchor"] + recent[-self.keep :]
        entries, slot = [], 0
        for block in seen:
            entries.append(Entry(block.id, shift=self.moves * (slot - block.frame)))
            slot += block.span
        drops = tuple(Drop(b.id) for b in recent[: -self.keep])
        return Plan(tuple(entries), drops, live_shift=self.moves * (slot - table.now))

    def capacity(self, shape: HistoryShape) -> int:
        return (self.keep + 1) * shape.tokens_per_frame


def virtual_keys(model: ThinLumos, text: int, ids: list[Tensor]) -> Tensor:  # noqa: F811
    """Layer-0 keys [T, Hk, D] of a text and whole frames in the video made of them alone. They depend on a token and
    its position, on nothing else."""
    w, name = model.weights, "model.layers.0."
    x = F.embedding(torch.cat([torch.tensor(PROMPT[len(PROMPT) - text :]), *ids]), w["model.embed_tokens.weight"])
    y = F.rms_norm(x, x.shape[-1:], w[name + "input_layernorm.weight"], model.eps)
    k = F.linear(y, w[name + "self_attn.k_proj.weight"]).unflatten(-1, (-1, model.head_dim))
    k = model._head_norm(k, name + "self_attn.k_norm").double()  # [T, H, D]
    at = torch.cat([text_positions(0, text).at(0), *(GRID.positions(text).at(slot) for slot in range(len(ids)))])
    phasor = torch.exp(1j * model.rope.angles(at))[:, None]  # [T, 1, D/2]
    turned = torch.complex(*k.chunk(2, -1)) * phasor
    return torch.cat([turned.real, turned.imag], -1).float()


def key_error(take: Take, task: str) -> float:
    """Largest difference between layer-0 keys in view and keys computed at the virtual positions, in any pass."""
    held: list[Tensor] = [GRID.ids(given_codes())] if task == "i2v" else []  # ids of the frames in view
    anchors, errors = len(held), []
    for record in rollout(take, task, "argmax", FRAMES):
        passes = [(name, spy) for name, time, spy in take.seen if time == record.latent_frame]
        inputs = [GRID.ids(codes) for codes in record.step_inputs for _ in TEXTS] + [record.write_ids] * 2
        for (name, spy), ids in zip(passes, inputs, strict=True):
            expected = virtual_keys(take.model, TEXTS[name], [*held, ids])
            assert spy.keys.shape[1:] == expected.shape  # the pass sees these tokens and no others
            errors.append(float((spy.keys[0] - expected).abs().max()))
        held = [*held[:anchors], record.write_ids]
    return max(errors)


@BOTH_RESIDENCIES
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_keys_moved_to_slots_equal_keys_computed_at_the_virtual_positions(model, task, residency):  # noqa: F811
    assert key_error(Take(model, LastFrames(1), residency, given=task == "i2v"), task) < 2e-5


def test_keys_left_where_they_were_written_would_be_noticed(model):  # noqa: F811
    assert key_error(Take(model, LastFrames(1, moves=False), "resident"), "t2v") > 1


@BOTH_RESIDENCIES
def test_what_stays_keeps_its_rows_and_everything_else_gives_them_back(model, residency):  # noqa: F811
    take = Take(model, LastFrames(1), residency, given=True)
    sizes = {name: store.size for name, store in take.history.stores.items()}
    first: dict[tuple[str, int], tuple[Tensor, ...]] = {}
    for record in rollout(take, "i2v", "argmax", FRAMES):
        take.settle()
        for name, store in take.history.stores.items():
            blocks = take.history.table().blocks
            recent = [record.latent_frame - 1, record.latent_frame][-min(2, record.latent_frame) :]
            assert [(b.frame, b.span) for b in blocks] == [(0, 0), (0, 1), *((f, 1) for f in recent)]
            for block in blocks:  # un-rotated keys, values, positions: bitwise what was written, for ever
                rows = store.held[(block.id, "full")].rows
                now = (store.k[:, :, rows], store.v[:, :, rows], store.base[rows], store.step[rows])
                for a, b in zip(first.setdefault((name, block.id), now), now, strict=True):
                    assert torch.equal(a, b)
            assert int(store.used.sum()) == TEXTS[name] + GRID.tokens * (1 + len(recent))
    assert sizes == {name: store.size for name, store in take.history.stores.items()}  # nothing grew


def test_content_and_structural_ids_step_unequally_and_height_and_width_stay(model):  # noqa: F811
    take = Take(model, FullHistory(), "scratch")
    for name, text in TEXTS.items():
        base, step = take.place(name, 3)
        moved = base - 2 * step  # Entry(shift=-2)
        assert torch.equal(moved, GRID.positions(text).at(1))
        assert torch.equal((base - moved)[STRUCTURAL], torch.full((4, 3), 2 * GRID.tokens))
        assert torch.equal((base - moved)[3:-1], torch.tensor([8, 0, 0]).expand(GRID.content, 3))


@pytest.mark.parametrize(("task", "mode"), SEEDS)
def test_slots_change_nothing_while_nothing_is_evicted(model, task, mode):  # noqa: F811
    take = Take(model, LastFrames(CONFIG["latent_frames"]), "resident", given=task == "i2v")
    check_tokens(list(rollout(take, task, mode)), task, mode)


def test_a_window_of_one_frame_is_another_video(model):  # noqa: F811
    moved, stayed = (
        [r.final.tolist() for r in rollout(Take(model, LastFrames(1, moves), "resident"), "t2v", "pseudo_random")]
        for moves in (True, False)
    )
    full = [frame["final"] for frame in LOOP["pseudo_random"]["t2v"]["frames"]]
    assert moved[:2] == stayed[:2] == full[:2]  # one frame of history is all there is
    assert len({str(finals) for finals in (moved, stayed, full)}) == 3


def test_packing_against_the_true_now_would_not_be_the_virtual_video(model):  # noqa: F811
    """The chunk in flight must move too: a text never moves, so a constant shift of all frames is not neutral."""

    @dataclass(frozen=True)
    class Right(LastFrames):
        def plan(self, table: BlockTable, signals: Signals) -> Plan:
            left = super().plan(table, signals)
            entries = tuple(Entry(e.block, shift=e.shift - left.live_shift) for e in left.entries)
            return Plan(entries, left.drops)

    finals = [
        [r.final.tolist() for r in rollout(Take(model, policy, "resident"), "t2v", "pseudo_random")]
        for policy in (LastFrames(1), Right(1))
    ]
    assert finals[0] != finals[1]


def test_history_masks_reach_the_rows(model):  # noqa: F811
    """The write pass stores what the loop fed it, masked ids included, not what the last step saw."""
    take = Take(model, FullHistory(), "resident")
    (record, *_) = list(rollout(take, "t2v", "argmax"))
    assert (record.write_ids == MASK).any()
    block = next(b for b in take.history.table().blocks if b.span and b.frame == 0)
    store = take.history.stores["cond"]
    rows = store.held[(block.id, "full")].rows
    k = take.history.rotary.rotate(store.k[0][:, rows], take.history.rotary.phases(store.base[rows]))[0]
    expected = virtual_keys(model, len(PROMPT), [record.write_ids])[len(PROMPT) :]
    torch.testing.assert_close(k, expected, rtol=0, atol=2e-5)

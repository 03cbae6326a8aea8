"""The staggered sampler on SkyReels-V2 against the published implementation, row by row, and its step tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake import LongtakeError
from longtake.chunk import Clock
from longtake.history import History
from longtake.plan import FULL, BlockTable, Drop, Entry, Fuse, HistoryShape, Plan, Signals
from longtake.policies import FlowCacheKV, FullHistory, KVPolicy
from longtake.reuse import FlowCacheReuse, NoReuse, ReusePolicy, ReuseRun
from longtake.rope import wan_table
from longtake.samplers.staggered import Stagger, Staggered
from longtake.samplers.step_matrix import StepMatrix
from longtake.session import history_shape

from .skyreels import golden_host, skyreels_golden, timestep_matrix

TOLERANCE = 2e-5  # max |error| / max |recorded output|, per row


def fuse_score(q: Tensor, k: Tensor, weight: float = 0.07, pool: int = 7) -> Tensor:
    """FlowCache's worth of each key, said slowly: rotated q [M, H, D] and k [N, H, D] → [H, N]."""
    logits = torch.einsum("mhd,nhd->hmn", q, k) / q.shape[-1] ** 0.5
    importance = F.max_pool1d(logits.softmax(-1).mean(1), pool, stride=1, padding=pool // 2)
    unit = F.normalize(k, dim=-1)
    cosine = torch.einsum("mhd,nhd->hmn", unit, unit)
    cosine.diagonal(dim1=1, dim2=2).zero_()
    return weight * importance - (1 - weight) * cosine.mean(1).softmax(-1)


@dataclass(frozen=True)
class LastBlocks(KVPolicy):
    """Of the finished blocks only the last few."""

    blocks: int

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        old, seen = table.blocks[: -self.blocks], table.blocks[-self.blocks :]
        return Plan(tuple(Entry(b.id) for b in seen), tuple(Drop(b.id) for b in old))

    def capacity(self, shape: HistoryShape) -> int | None:
        return FullHistory().capacity(shape)


@dataclass(frozen=True)
class FuseTo(KVPolicy):
    """Finished blocks are fused into `blocks` blocks' worth of tokens, best first, once there are more."""

    blocks: int
    sort: bool = False

    def plan(self, table: BlockTable, signals: Signals) -> Plan:
        budget = self.blocks * table.live[0].forms[FULL].count
        if sum(block.forms[FULL].count for block in table.blocks) <= budget:
            return Plan(tuple(Entry(block.id) for block in table.blocks))
        return Plan((Fuse(tuple(block.id for block in table.blocks), budget, sort=self.sort),))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.stack([fuse_score(*pair) for pair in zip(q, k, strict=True)])

    def capacity(self, shape: HistoryShape) -> int | None:
        return FullHistory().capacity(shape)


def reuse(threshold: float, warmup: int = 5) -> ReusePolicy:
    return FlowCacheReuse(threshold, "timestep", "residual", warmup, "chunk", "identity", clamp=False)


RUNS: dict[str, tuple[KVPolicy, ReusePolicy]] = {
    "off": (FullHistory(), NoReuse()),
    "on_a": (FullHistory(), reuse(0.35)),
    "on_b": (FullHistory(), reuse(0.9)),
    "on_noret": (FullHistory(), reuse(0.35, warmup=1)),
    "prefix_off": (FullHistory(), NoReuse()),
    "prefix_on": (FullHistory(), reuse(0.35)),
    "kvrange1": (LastBlocks(1), NoReuse()),
    "compress_b1": (FuseTo(1), NoReuse()),
    "compress_b2_on": (FuseTo(2), reuse(0.35)),
}


class Replay:
    """The golden's take on the real sampler, host and history; with `forced`, every row starts from the recorded
    latents, as all recorded runs did."""

    def __init__(
        self, run: str, policy: KVPolicy, how: ReusePolicy, *, residency: str = "resident", forced: bool = True,
        poison: bool = False,
    ) -> None:  # fmt: skip
        tensors, meta = skyreels_golden()
        self.tensors, self.config, self.run, self.forced = tensors, meta["config"], run, forced
        self.facts = next(r for r in meta["runs"] if r["key"] == run)
        self.inputs = f"inputs/{'prefix' if self.facts['prefix'] else 'plain'}"
        self.host = golden_host(tensors, meta)
        self.geometry = self.host.geometry()
        self.frames = self.config["NB"] * self.config["BS"]
        self.outputs: dict[tuple[int, str, int], Tensor] = {}
        self.seen: list[tuple[str, int]] = []
        self.row = 0
        shape = replace(history_shape(self.host, self.geometry, 1, 2), frames=self.frames, live_chunks=5)
        policy = policy.settle(shape)
        policy.check(shape)
        self.history = History(
            shape, self.host.rotary, streams=("cond", "uncond"), capacity=policy.capacity(shape),
            residency=residency, score=policy.score,
        )  # fmt: skip
        if poison:
            for store in self.history.stores.values():
                store.k.fill_(float("nan"))
                store.v.fill_(float("nan"))
            for pair in self.history.buffers._held.values():
                for buffer in pair:
                    buffer.fill_(float("nan"))
        self.texts = {s: self.host.text_state(tensors[f"inputs/context_{s}"]) for s in ("cond", "uncond")}
        self.sampler = Staggered(
            self.host, self.geometry, self.history, policy, ReuseRun(how, self.host.feature),
            replace(Stagger.of(self.host.config), condition_noise=float(self.config["a"]), compat="upstream"),
            noise=self, texts=self.texts, guidance=6.0, ends_at=self.frames,
        )  # fmt: skip
        self._record()

    def latents(self, row: int, frame: int, span: int) -> Tensor:
        return self.tensors[f"{self.inputs}/latents"][row : row + 1, :, frame : frame + span]

    def draw(self, channels: int, frames: int, height: int, width: int) -> Tensor:
        """Recorded noise; what is added to given frames is those frames, which were recorded with their noise in."""
        return self.latents(self.row, self.sampler.frame, frames)

    def _record(self) -> None:
        run, guide = self.host._run, self.host.guide

        def recorded(latents: Tensor, timestep: float, text: Any, layers: Any, residual: Any) -> Any:
            if layers:
                stream = "cond" if text is self.texts["cond"] else "uncond"
                self.seen.append((stream, layers[0].k.shape[1] // self.config["tokens_per_block"]))
            return run(latents, timestep, text, layers, residual)

        def guided(velocities: dict[str, Tensor], timestep: float, guidance: float) -> Tensor:
            self.guided = velocities
            return guide(velocities, timestep, guidance)

        self.host._run, self.host.guide = recorded, guided  # type: ignore[method-assign]
        advance = self.sampler._advance

        def advanced(chunk: Any, clock: Clock) -> None:
            if self.forced:
                chunk.x = self.latents(self.row, chunk.frame, chunk.span)
            advance(chunk, clock)
            for stream, velocity in self.guided.items():
                self.outputs[self.row, stream, chunk.frame] = velocity[0]

        self.sampler._advance = advanced  # type: ignore[method-assign]

    def play(self) -> Tensor:
        """All rows; the finished latents [C, F, h, w]."""
        blocks = []
        with torch.no_grad():
            if self.facts["prefix"]:
                self.sampler.give(self.latents(0, 0, self.config["BS"]))
                blocks.append(self.latents(0, 0, self.config["BS"]))
            while len(blocks) < self.config["NB"]:
                while not self.sampler.done:
                    self.sampler._row(Clock())
                    self.row += 1
                blocks += [done.latents for done in self.sampler.done]
                self.sampler.done.clear()
        return torch.cat(blocks, 2)[0]

    def errors(self) -> dict[int, float]:
        """Worst error of each row, relative to the largest recorded output of its branch."""
        worst: dict[int, float] = {}
        for row, stream in sorted({key[:2] for key in self.outputs}):
            mine = {frame: v for (r, s, frame), v in self.outputs.items() if (r, s) == (row, stream)}
            recorded = self.tensors[f"{self.run}/fp32/{stream}"][row]
            got = torch.cat(list(mine.values()), 1)
            expected = torch.cat([recorded[:, f : f + self.config["BS"]] for f in mine], 1)
            worst[row] = max(worst.get(row, 0.0), float((got - expected).abs().max() / expected.abs().max()))
        return worst


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("run", RUNS)
def test_every_row_of_the_published_runs_is_reproduced(run: str, residency: str) -> None:
    """Velocity of every chunk in flight, computed or reused, in both branches; and which ones were computed."""
    replay = Replay(run, *RUNS[run], residency=residency)
    replay.play()
    errors = replay.errors()
    assert len(errors) == len(replay.tensors[f"{run}/decision"])
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("run", RUNS)
def test_every_forward_attends_to_the_published_number_of_blocks(run: str) -> None:
    replay = Replay(run, *RUNS[run])
    replay.play()
    calls = replay.facts["kv_groups_seen_per_call"]  # alternating between the branches, a list per row
    for first, stream in enumerate(("cond", "uncond")):
        assert [n for s, n in replay.seen if s == stream] == [blocks for call in calls[first::2] for blocks in call]


@pytest.mark.parametrize("run", ["on_a", "on_b", "on_noret", "prefix_on", "compress_b2_on"])
def test_reuse_decisions_are_the_published_ones(run: str) -> None:
    replay = Replay(run, *RUNS[run])
    decided = []
    finish = replay.sampler.reuse.finish
    replay.sampler.reuse.finish = lambda chunk: decided.append(finish(chunk)) or decided[-1]
    replay.play()
    wanted = replay.tensors[f"{run}/decision"][:, 0].T  # [block, row]
    per_block = [[d == 2 for d in row.tolist() if d] for row in wanted]
    assert [[d.reused for d in one] for one in decided] == [one for one in per_block if one]


@pytest.mark.parametrize("run", ["off", "prefix_off"])
def test_a_free_run_ends_where_the_published_one_ended(run: str) -> None:
    """UniPC per chunk, guidance and visibility together: nothing is teacher-forced but the noise."""
    replay = Replay(run, *RUNS[run], forced=False)
    got = replay.play()
    expected = replay.tensors[f"trajectory/{'prefix' if 'prefix' in run else 'plain'}/final_latents_reuse_off_fp32"]
    generated = slice(replay.config["BS"] if replay.facts["prefix"] else 0, None)
    got, expected = got[:, generated], expected[:, generated]
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("run", "policy", "row"),
    [
        ("kvrange1", FullHistory(), 13),
        ("compress_b1", LastBlocks(1), 13),
        ("compress_b1", FuseTo(1, sort=True), 15),
    ],
)
def test_another_policy_would_be_noticed(run: str, policy: KVPolicy, row: int) -> None:
    replay = Replay(run, policy, NoReuse())
    replay.play()
    errors = replay.errors()
    assert max(error for at, error in errors.items() if at < row) < TOLERANCE
    assert errors[row] > 1e-2


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize(
    ("run", "policy"),
    [
        ("off", None), ("kvrange1", None), ("compress_b1", None), ("prefix_off", None), ("on_b", None),
        ("prefix_on", None), ("compress_b2_on", FlowCacheKV(chunks=8, queries="next", sort=False)),
    ],
)  # fmt: skip
def test_nothing_outside_the_visible_set_is_ever_read(run: str, policy: KVPolicy | None, residency: str) -> None:
    """Every buffer starts as NaN: whatever a forward looks at without having been told to would show."""
    kv, how = RUNS[run]
    clean, poisoned = (Replay(run, policy or kv, how, residency=residency, poison=p) for p in (False, True))
    assert torch.equal(clean.play(), poisoned.play())
    assert clean.outputs.keys() == poisoned.outputs.keys()
    assert all(torch.equal(clean.outputs[key], poisoned.outputs[key]) for key in clean.outputs)


@pytest.mark.parametrize(("run", "blocks"), [("compress_b1", 1), ("compress_b2_on", 2)])
@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_flowcache_kv_chooses_as_published(run: str, blocks: int, residency: str) -> None:
    """The library's own policy: fused in the middle of a forward, by the next block's own queries. `blocks` of past
    beside the five in flight and the one that waits."""
    policy = FlowCacheKV(chunks=blocks + 6, queries="next", sort=False)
    replay = Replay(run, policy, RUNS[run][1], residency=residency)
    replay.play()
    assert max(replay.errors().values()) < TOLERANCE
    calls = replay.facts["kv_groups_seen_per_call"]
    assert [n for stream, n in replay.seen if stream == "cond"] == [n for call in calls[::2] for n in call]


def test_survivors_are_chosen_once_for_every_layer_head_and_branch() -> None:
    """Three chunks finish while another one is still to come: each fusing is resolved by one forward per branch."""
    asked = 0

    @dataclass(frozen=True)
    class Counting(FuseTo):
        def score(self, q: Tensor, k: Tensor) -> Tensor:
            nonlocal asked
            asked += 1
            return super().score(q, k)

    replay = Replay("compress_b1", Counting(1), NoReuse())
    replay.play()
    assert asked == 3 * replay.host.layers * 2
    history = replay.history
    fused = history.table().blocks[0]
    assert (fused.role, fused.frame, fused.span, fused.forms[FULL].count) == ("fused", 0, 8, 8)
    positions = [history.stores[branch].held[fused.id, FULL].head_base[:, 0] for branch in history.streams]
    sets = [{frozenset(map(tuple, h.tolist())) for h in one.transpose(1, 2).flatten(0, 1)} for one in positions]
    assert [len(one) for one in sets] == [4, 4]  # two layers with two heads each
    assert sets[0] != sets[1]
    assert not FullHistory().covers(history.table())


@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_branches_need_not_compute_in_step(residency: str) -> None:
    """One branch fuses, another block enters, and only then does the other branch compute: as if each were alone."""
    layers, heads, tokens, dim = 2, 2, 4, 12
    policy, steps = FuseTo(1), torch.tensor([1.0, 0, 0]).expand(tokens, -1)

    def outputs(histories: dict[str, History]) -> dict[tuple[str, int, int], Tensor]:
        out: dict[tuple[str, int, int], Tensor] = {}
        everyone = list({id(history): history for history in histories.values()}.values())

        def enter(frame: int) -> None:
            for history in everyone:
                history.admit(frame, 1, (torch.arange(tokens)[:, None] + steps * frame, steps))
                history.apply(policy.plan(history.table(), history.signals()))

        def forward(stream: str, frame: int) -> None:
            history = histories[stream]
            number = next(block.id for block in history.table().live if block.frame == frame)
            noise = torch.Generator().manual_seed(len(stream) + 10 * frame)
            for layer, view in enumerate(history.layers(stream, number, write=True)):
                q, k, v = torch.randn(3, 1, tokens, heads, dim, generator=noise)
                out[stream, frame, layer] = view.attend(q, k, v)

        for frame in (0, 1):
            enter(frame)
            for stream in ("cond", "uncond"):
                forward(stream, frame)
            for history in everyone:
                history.commit(history.table().live[0].id)
        enter(2)  # two blocks are finished: one of them is to be left
        forward("cond", 2)
        enter(3)
        for stream in ("cond", "uncond"):
            forward(stream, 2)
            forward(stream, 3)
        assert all([block.role for block in history.table().blocks] == ["fused"] for history in everyone)
        return out

    def history(*streams: str) -> History:
        shape = HistoryShape(layers, heads, dim, 4, tokens, 1, streams=len(streams))
        return History(
            shape, wan_table(dim), streams=streams, capacity=4 * tokens, residency=residency, score=policy.score
        )

    together = outputs(dict.fromkeys(("cond", "uncond"), history(*("cond", "uncond"))))
    alone = outputs({branch: history(branch) for branch in ("cond", "uncond")})
    assert all(torch.equal(together[key], alone[key]) for key in alone)


# --- step tables ------------------------------------------------------------------------------------------------------


def matrices() -> Iterator[Any]:
    for entry in timestep_matrix()["matrices"]:
        name = "-".join(str(entry[key]) for key in ("latent_length", "ar_step", "causal_block_size", "num_pre_ready"))
        yield pytest.param(entry, id=name)


@pytest.mark.parametrize("entry", matrices())
def test_step_matrices_are_the_published_ones(entry: dict[str, Any]) -> None:
    size = entry["causal_block_size"]
    matrix = StepMatrix(entry["num_steps"], entry["ar_step"])
    ready = entry["num_pre_ready"] // size
    counters = matrix.counters(entry["blocks"], ready)
    assert counters == entry["step_index"]
    made = range(entry["blocks"] - ready)
    steps = [[None] * ready + [matrix.step(row, block) for block in made] for row in range(entry["rows"])]
    assert [[int(step is not None) for step in row] for row in steps] == entry["update_mask"]
    assert matrix.rows(entry["blocks"] - ready) == entry["rows"]


def test_the_setting_the_fork_refuses_is_refused_with_advice() -> None:
    for entry in timestep_matrix()["rejected"]:
        size = entry["causal_block_size"]
        with pytest.raises(LongtakeError, match="use lag=10 or more"):
            StepMatrix(entry["num_steps"], entry["ar_step"]).check(
                entry["latent_length"] // size, entry["base_num_frames"] // size
            )


@pytest.mark.parametrize("entry", timestep_matrix()["timesteps"], ids=lambda e: str(e["num_steps"]))
def test_timesteps_are_the_published_ones(entry: dict[str, Any]) -> None:
    tensors, meta = skyreels_golden()
    host = golden_host(tensors, meta)
    host.config = replace(host.config, shift=entry["shift"])
    timesteps, levels = host.timetable(entry["num_steps"])
    assert list(timesteps) == entry["timesteps"]
    assert levels == pytest.approx(entry["sigmas"], abs=1e-6)

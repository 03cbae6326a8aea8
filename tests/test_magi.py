"""MAGI-1 runs as published: whole takes of the authors' sampler on a tiny network, call by call."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from longtake.chunk import Clock
from longtake.history import History
from longtake.hosts.magi.host import MagiHost, host_config
from longtake.hosts.magi.schedule import MagiSettings
from longtake.plan import FULL, HistoryShape, Plan
from longtake.policies import FlowCacheKV, FullHistory, KVPolicy, KVRange
from longtake.reuse import FlowCacheReuse, NoReuse, ReusePolicy, ReuseRun
from longtake.rope import RotaryTable
from longtake.samplers.magi import MagiStaggered
from longtake.samplers.staggered import Finished, Stagger

from .magi import golden_model
from .tiny import golden

RUNS = ["distill", "distill_ranges", "base_cfg3", "distill_prefix", "distill12"]


@pytest.fixture(scope="module")
def stored() -> tuple[dict[str, Tensor], dict]:
    return golden("magi_tiny_dit")


class Calls(MagiHost):
    """Remembers every step's latents and what its passes came to, in order: (x, t, velocity)."""

    def forward(self, latents: Tensor, timestep: float, text: object, layers: list) -> Tensor:
        self.latents = {**getattr(self, "latents", {}), timestep: latents}
        return super().forward(latents, timestep, text, layers)

    def guide(self, velocities: dict[str, Tensor], timestep: float, guidance: float) -> Tensor:
        velocity = super().guide(velocities, timestep, guidance)
        if not hasattr(self, "steps"):
            self.steps: list[tuple[Tensor, float, Tensor]] = []
        self.steps.append((self.latents[timestep], timestep, velocity))
        return velocity


@dataclass
class Drawn:
    """The golden's noise, chunk after chunk."""

    noise: Tensor  # [B, C, F, H, W]
    at: int = 0

    def draw(self, channels: int, frames: int, height: int, width: int) -> Tensor:
        self.at += frames
        return self.noise[:, :, self.at - frames : self.at]


@dataclass
class Take:
    """A staggered take of a golden run on the library's own history."""

    sampler: MagiStaggered
    history: History
    finished: list[Finished] = field(default_factory=list)

    def run(self) -> Take:
        clock = Clock()
        while True:
            try:
                self.finished.append(self.sampler.next(clock))
            except StopIteration:
                return self
            self.sampler.pop()

    @property
    def latents(self) -> Tensor:
        return torch.cat([chunk.latents for chunk in self.finished], 2)


def take(
    host: MagiHost, noise: Tensor, text: Tensor, *, prefix: Tensor | None = None, policy: KVPolicy | None = None,
    reuse: ReusePolicy | None = None, commit: str = "clean", residency: str = "resident", capacity: int | None = None,
    ends: bool = True,
) -> Take:  # fmt: skip
    """noise [B, C, F, h, w] of the whole take, given frames included; text [B, T, d]."""
    frames = host.config.chunk_frames
    _, channels, total, height, width = noise.shape
    patch = host.transformer.config.patch_size
    geometry = replace(
        host.geometry(8 * height, 8 * width), channels=channels, chunk_frames=frames, patch=(1, patch, patch)
    )
    shape = HistoryShape(
        host.layers, host.kv_heads, host.head_dim, 4, geometry.tokens_per_frame, frames, batch=len(noise), frames=total,
        live_chunks=min(host.settings.window_size, -(-total // frames)),
    )  # fmt: skip
    policy = (policy or FullHistory()).settle(shape)
    rows = policy.capacity(shape) if capacity is None else capacity
    history = History(
        shape, host.rotary, capacity=rows, residency=residency,
        score=policy.score if type(policy).score is not KVPolicy.score else None,
    )  # fmt: skip
    sampler = MagiStaggered(
        host, geometry, history, policy, ReuseRun(reuse or NoReuse(), host.feature),
        Stagger(lag=host.settings.stage_steps, commit=commit), noise=Drawn(noise),
        texts={"cond": host.text_state(text)}, ends_at=total if ends else None,
    )  # fmt: skip
    if prefix is not None:
        whole = prefix.shape[2] // frames * frames
        sampler.noise.at = whole
        sampler.give(prefix)
    return Take(sampler, history)


def golden_host(stored: tuple[dict[str, Tensor], dict], run: dict) -> Calls:
    tensors, meta = stored
    config = meta["config"]
    settings = MagiSettings.of({**config, **run, "window_size": run["window"], "special_tokens": ()})
    return Calls(golden_model(tensors, config), settings, replace(host_config(settings), chunk_frames=config["cw"]))


def golden_take(stored: tuple[dict[str, Tensor], dict], key: str, **options: object) -> Take:
    tensors, meta = stored
    run = next(run for run in meta["runs"] if run["key"] == key)
    inputs = {name: tensors.get(f"{key}/inputs/{name}") for name in ("noise", "y", "text_mask", "prefix_video")}
    chunk = run["chunks"] - 1
    text = inputs["y"][0, chunk][inputs["text_mask"][0, chunk].bool()]
    policy = None
    if run["noise2clean_kvrange"]:
        policy = KVRange("/".join(map(str, run["noise2clean_kvrange"])), clean=run["clean_chunk_kvrange"])
    host = golden_host(stored, run)
    return take(host, inputs["noise"], text[None], prefix=inputs["prefix_video"], policy=policy, **options)


def rotated(taken: Take, layer: int) -> Tensor:
    """The K/V rows [tokens, Hk, K | V] of everything held, in time order, keys turned to where they stand."""
    store, table = taken.history.stores["cond"], taken.history.table()
    parts = []
    for block in (*table.blocks, *table.live):
        held = store.held[block.id, FULL]
        position = store.base[held.rows] if held.head_base is None else held.head_base[layer]
        k = taken.history.rotary.rotate(store.k[layer][:, held.rows], taken.history.rotary.phases(position))
        parts.append(torch.cat([k, store.v[layer][:, held.rows]], -1))
    return torch.cat(parts, 1)[0]


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("key", RUNS)
def test_a_whole_take_is_the_authors(stored: tuple, key: str, residency: str) -> None:
    tensors, meta = stored
    result = golden_take(stored, key, residency=residency).run()
    want = tensors[f"{key}/final_latents"]
    given = next(run for run in meta["runs"] if run["key"] == key)["prefix_frames"]
    made = want.shape[2] - given
    torch.testing.assert_close(result.latents[:, :, -made:], want[:, :, given:], rtol=0, atol=1e-4)
    if given:  # one of the three begins the first chunk that is made, and comes out as it was given
        assert result.latents.shape[2] == made + 1
        assert torch.equal(result.latents[:, :, :1], tensors[f"{key}/inputs/prefix_video"][:, :, 2:])


@pytest.mark.parametrize("key", RUNS)
def test_every_call_is_the_authors(stored: tuple, key: str) -> None:
    """Of every row: latents, time and velocity (history, nearly-clean blend and guidance put together) of every chunk,
    oldest first."""
    tensors, meta = stored
    run = next(run for run in meta["runs"] if run["key"] == key)
    result = golden_take(stored, key).run()
    ours = iter(result.sampler.host.steps)
    for call in run["calls"]:
        if call["kind"] != "denoise":
            continue
        x, t, out = (tensors[f"{key}/call{call['call']}/{name}"] for name in ("x", "t", "out"))
        frames, clean = meta["config"]["cw"], int(call["clean_pass"])
        for at in range(clean, t.shape[1]):
            latents, time, velocity = next(ours)
            span = slice(at * frames, (at + 1) * frames)
            assert time == pytest.approx(t[0, at].item(), abs=2e-7)
            torch.testing.assert_close(latents, x[:, :, span], rtol=0, atol=2e-5)
            torch.testing.assert_close(velocity, out[:, :, span], rtol=0, atol=1e-4)
    assert next(ours, None) is None


@pytest.mark.parametrize("key", ["distill", "base_cfg3", "distill_prefix", "distill12"])
def test_the_history_ends_with_the_authors_cache(stored: tuple, key: str) -> None:
    """Clean passes and given frames are what stays; of the base model, the pass without text writes."""
    result = golden_take(stored, key).run()
    past = sum(block.forms[FULL].count for block in result.history.table().blocks)
    want = stored[0]
    assert past == len(want[f"{key}/kv_cache_layer0"]) - 12  # all but the last chunk, which nothing follows
    for layer in range(2):
        rows = rotated(result, layer)[:past]
        torch.testing.assert_close(rows, want[f"{key}/kv_cache_layer{layer}"][:past], rtol=0, atol=1e-4)


# --- FlowCache's loop: reuse and compression, chunks adopted as their last step left them ---------------------------

LOOPS = [
    "off", "on", "on_low", "off_keep_nearly_clean", "compress_B5_token_chunk", "compress_B5_on",
    "compress_B6_frame_frame_on",
]  # fmt: skip
COMPUTED, REUSED = 1, 2


@pytest.fixture(scope="module")
def loops() -> tuple[dict[str, Tensor], dict]:
    return golden("magi_tiny_flowcache_loop")


def flowcache_take(loops: tuple, key: str, residency: str, carry: str = "update", sort: bool = False) -> Take:
    tensors, meta = loops
    config = meta["config"]
    run = next(run for run in meta["runs"] if run["key"] == key)
    settings = MagiSettings.of({
        **config, "num_steps": run["num_steps"], "window_size": run["window"], "special_tokens": (),
        "nearly_clean": not run["discard_nearly_clean"],
    })  # fmt: skip
    host = MagiHost(golden_model(tensors, config), settings, replace(host_config(settings), chunk_frames=config["cw"]))
    y, mask = (tensors[f"{run['inputs']}/{name}"] for name in ("y", "text_mask"))
    policy: KVPolicy = FullHistory()
    if run["compress"]:
        policy = FlowCacheKV(
            run["B_total"], run["mix_lambda"], run["strategy"], asking=run["query_granularity"], sort=sort
        )
    reuse = FlowCacheReuse(run["threshold"], "latent", carry, run["warmup"], "take", "identity")
    return take(
        host, tensors[f"{run['inputs']}/noise"], y[:1, 0][:, mask[0, 0].bool()], policy=policy, reuse=reuse,
        commit="adopt", residency=residency,
    )  # fmt: skip


def walked(taken: Take, noise: Tensor) -> Tensor:
    """The latents [step, C, F, h, w] of the whole video after every row."""
    frames, after = taken.sampler.geometry.chunk_frames, []
    x = list(noise.split(frames, 2))
    while not taken.finished or len(taken.finished) < len(x):
        taken.sampler._row(Clock())
        for chunk in taken.sampler.live:
            x[chunk.chunk] = chunk.x
        while taken.sampler.done:
            taken.finished.append(taken.sampler.done[0])
            taken.sampler.pop()
            x[taken.finished[-1].chunk] = taken.finished[-1].latents
        after.append(torch.cat(x, 2)[0])
    return torch.stack(after)


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("key", LOOPS)
def test_the_flowcache_loop_is_the_authors(loops: tuple, key: str, residency: str) -> None:
    tensors, meta = loops
    run = next(run for run in meta["runs"] if run["key"] == key)
    taken = flowcache_take(loops, key, residency)
    latents = walked(taken, tensors[f"{run['inputs']}/noise"])
    decision, accumulator = (tensors[f"{key}/{name}"].clone() for name in ("decision", "accumulator"))
    for chunk in taken.finished:
        for d in chunk.decisions:
            row = chunk.chunk * run["num_steps"] // run["window"] + d.index
            assert decision[row, chunk.chunk] == (REUSED if d.reused else COMPUTED)
            assert d.accumulator == pytest.approx(accumulator[row, chunk.chunk].item(), abs=2e-6)
    assert sum(len(chunk.decisions) for chunk in taken.finished) == int((decision > 0).sum())
    torch.testing.assert_close(latents, tensors[f"{key}/latents_after_step"], rtol=0, atol=1e-4)
    if run["compress"]:
        rows = rotated(taken, 0)
        torch.testing.assert_close(rows, tensors[f"{key}/kv_cache_layer0"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("key", "options"), [("compress_B5_on", {"sort": True}), ("on", {"carry": "velocity"})])
def test_our_own_modes_are_other_runs(loops: tuple, key: str, options: dict) -> None:
    """Survivors by position, and a velocity that is carried, differ from the published run from where they first
    matter: the second compression, the first reused step."""
    tensors, meta = loops
    run = next(run for run in meta["runs"] if run["key"] == key)
    latents = walked(flowcache_take(loops, key, "resident", **options), tensors[f"{run['inputs']}/noise"])
    error = (latents - tensors[f"{key}/latents_after_step"]).abs().amax(dim=(1, 2, 3, 4))
    reused = (tensors[f"{key}/decision"] == REUSED).any(1).nonzero()[0].item()
    first = run["compressions"][1]["step"] + 1 if run["compress"] else reused
    assert error[:first].max() < 1e-4
    assert error[-1] > 1e-2


@pytest.mark.parametrize("residency", ["resident", "scratch"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pass_that_does_not_write_leaves_no_trace(residency: str, alone: bool) -> None:
    """Passes share one K/V and only some of them write: later chunks must not see what another pass computed."""
    layers, tokens, query_heads, kv_heads, dim = 2, 4, 6, 2, 8
    rotary = RotaryTable((0, 1, 2), (1.0, 0.5, 0.25), "half")  # 6 of 8 channels turn
    steps = torch.tensor([1.0, 0, 0]).expand(tokens, -1)

    def output(extra: bool) -> list[Tensor]:
        shape = HistoryShape(layers, kv_heads, dim, 4, tokens, 1)
        history = History(shape, rotary, capacity=2 * tokens, residency=residency)
        ids = [history.admit(t, 1, (torch.arange(tokens)[:, None] + steps * t, steps)) for t in range(2)]
        history.apply(Plan())

        def forward(chunk: int, seed: int, write: bool, seen: bool = True) -> list[Tensor]:
            noise = torch.Generator().manual_seed(seed)
            out = []
            for view in history.layers("cond", ids[chunk], write=write, history=seen):
                q = torch.randn(1, tokens, query_heads, dim, generator=noise)
                out.append(view.attend(q, *torch.randn(2, 1, tokens, kv_heads, dim, generator=noise)))
            return out

        forward(0, seed=1, write=True)
        if extra:
            forward(0, seed=2, write=False, seen=not alone)
        return forward(1, seed=3, write=True)

    assert all(torch.equal(*pair) for pair in zip(output(extra=True), output(extra=False), strict=True))

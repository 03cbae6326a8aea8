"""MAGI-1 runs as published: whole takes of the authors' sampler on a tiny network, call by call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from longtake.chunk import Clock
from longtake.geometry import Geometry
from longtake.history import History
from longtake.hosts.magi.host import MagiHost, host_config
from longtake.hosts.magi.schedule import MagiSettings
from longtake.plan import FULL, HistoryShape
from longtake.policies import FullHistory, KVPolicy, KVRange
from longtake.reuse import NoReuse, ReusePolicy, ReuseRun
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

    def __call__(self, frames: int) -> Tensor:
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
    policy = policy or FullHistory()
    shape = HistoryShape(
        host.layers, host.kv_heads, host.head_dim, 4, geometry.tokens_per_frame, frames, batch=len(noise), frames=total
    )
    rows = policy.capacity(shape) if capacity is None else capacity
    history = History(
        shape, host.rotary, capacity=rows, residency=residency,
        score=policy.score if type(policy).score is not KVPolicy.score else None,
    )  # fmt: skip
    sampler = MagiStaggered(
        host, geometry, history, policy, ReuseRun(reuse or NoReuse(), host.feature),
        Stagger(lag=host.settings.stage_steps, commit=commit), draw=Drawn(noise),
        texts={"cond": host.text_state(text)}, ends_at=total if ends else None,
    )  # fmt: skip
    if prefix is not None:
        whole = prefix.shape[2] // frames * frames
        sampler.draw.at = whole
        sampler.begin(prefix)
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

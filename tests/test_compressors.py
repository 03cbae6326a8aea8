"""Compressors: token counts, positions, and what a session makes of them."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from longtake import Geometry, Session
from longtake.compressors import Compressor, MeanPool, TakeState
from longtake.plan import COMPRESSED, Drop, Entry, Plan
from longtake.policies import KVPolicy
from longtake.session import history_shape

from .tiny import text, tiny_wan

CLOSE = {"atol": 1e-5, "rtol": 0}
WAN = Geometry(480, 832, 16, 4, 16)


@dataclass(frozen=True)
class Middle(KVPolicy):
    """The first block and the last one in full, all between them compressed and where they were."""

    identity: bool = False  # the compressed form has as many tokens as the full one
    requires: ClassVar[frozenset[str]] = frozenset({"compressed"})

    def plan(self, table, signals):
        entries, drops = [], []
        for i, block in enumerate(table.blocks):
            if i == 0 or i == len(table.blocks) - 1:
                entries.append(Entry(block.id))
                continue
            entries.append(Entry(block.id, COMPRESSED))
            if "full" in block.forms:
                drops.append(Drop(block.id))
        return Plan(tuple(entries), tuple(drops), forms=(COMPRESSED,) if table.frames_seen else ())

    def capacity(self, shape):
        return 3 * shape.chunk_tokens + 20 * shape.compressed_tokens


@dataclass(frozen=True)
class Identity(Compressor):
    """As many tokens as the chunk has: the compressed form is the full one."""

    def grid(self, geometry, span=None):
        return (geometry.chunk_frames if span is None else span, *geometry.grid)

    def positions(self, base, step, geometry, span):
        return base, step

    def compress(self, latents, pixels, state, model, geometry):
        return model.embed(latents), replace(state, frames=state.frames + latents.shape[2])


def take_of(host=None, policy=None, **options) -> Session:
    options = {"prompt_embeds": text(), "decode": False} | options
    return Session(host or tiny_wan(grid=(8, 8)), policy or Middle(), **options)


# --- token counts and positions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "chunk", "grid"),
    [(480, 832, 4, (2, 7, 13)), (480, 832, 3, (1, 7, 13)), (128, 128, 3, (1, 2, 2)), (64, 64, 3, (1, 1, 1))],
)
def test_a_chunk_is_compressed_to_the_published_count(height, width, chunk, grid):
    geometry = Geometry(height, width, 16, chunk, 16)
    assert MeanPool().grid(geometry) == grid
    assert MeanPool().tokens(geometry) == grid[0] * grid[1] * grid[2]


def test_the_shape_a_policy_sees_counts_182_tokens_for_four_frames_of_832x480():
    host = tiny_wan(grid=(30, 52), chunk_frames=4)
    assert history_shape(host, host.geometry()).compressed_tokens == 182


def test_midpoints_stand_in_the_middle_of_what_they_cover():
    host = tiny_wan(grid=(30, 52), chunk_frames=4)
    base, step = host.positions(host.geometry(), 12, 4)
    small, moves = MeanPool().positions(base, step, host.geometry(), 4)
    small = small.unflatten(0, (2, 7, 13))
    for i, j, k in ((0, 0, 0), (1, 6, 12), (1, 3, 5)):
        assert small[i, j, k].tolist() == [12 + 2 * i + 1, 4 * j + 2, 4 * k + 2]
    assert moves.tolist() == [[1, 0, 0]] * 182


def test_raster_positions_count_in_the_small_grid():
    host = tiny_wan(grid=(8, 12), chunk_frames=4)
    base, step = host.positions(host.geometry(), 8, 4)
    small, _ = MeanPool(where="raster").positions(base, step, host.geometry(), 4)
    assert small.unflatten(0, (2, 2, 3))[1, 1, 2].tolist() == [9, 1, 2]


def test_phasor_positions_are_the_direction_of_the_mean_phasor():
    host = tiny_wan(grid=(8, 12), chunk_frames=4, head_dim=24)
    base, step = host.positions(host.geometry(), 400, 4)
    small, _ = MeanPool(where="phasor").positions(base, step, host.geometry(), 4)
    phasors = torch.view_as_complex(host.rotary.phases(base).double().contiguous()).unflatten(0, (2, 2, 2, 4, 3, 4))
    mean = phasors.mean((1, 3, 5)).flatten(0, 2)
    ours = torch.view_as_complex(host.rotary.phases(small).double().contiguous())
    torch.testing.assert_close(ours, mean / mean.abs(), atol=1e-6, rtol=0)


# --- the compressed form in a take ------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["resident", "scratch"])
def test_tokens_of_the_patch_embedding_get_the_keys_and_values_of_the_chunk_itself(residency):
    take = take_of(compressor=Identity(), residency=residency)
    for _ in range(3):
        next(take)
    store = take.history.stores["cond"]
    full, small = (store.held[(2, form)].rows for form in ("full", COMPRESSED))
    assert torch.equal(store.k[:, :, full], store.k[:, :, small])
    assert torch.equal(store.v[:, :, full], store.v[:, :, small])


def test_an_identity_compressor_changes_nothing():
    from longtake import FullHistory

    whole, packed = take_of(policy=FullHistory()), take_of(compressor=Identity())
    for _ in range(6):
        torch.testing.assert_close(next(packed).latents, next(whole).latents, **CLOSE)

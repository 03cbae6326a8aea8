"""MAGI-1 from the authors' files to chunks of frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import longtake
from longtake import FlowCacheKV, FlowCacheReuse, FullHistory, LongtakeError, Session, SlidingWindow
from longtake.hosts.magi.host import MagiHost
from longtake.policies import KVRange
from longtake.samplers.staggered import Stagger

from .magi import published_config, special_tokens, tiny_model, tiny_vae, write_published


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> MagiHost:
    return longtake.load(write_published(tmp_path_factory.mktemp("base")), device="cpu")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> MagiHost:
    return longtake.load(write_published(tmp_path_factory.mktemp("distill"), distill=True, shards=1), device="cpu")


def words(batch: int = 1, length: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(batch, length, 20, generator=torch.Generator().manual_seed(seed))


def latents(session: Session) -> Tensor:
    return torch.cat([chunk.latents for chunk in session], -3)


def test_the_published_files_say_how_a_model_is_run(base: MagiHost, distilled: MagiHost) -> None:
    assert (base.settings.cfg_number, base.settings.distill) == (3, False)
    assert (distilled.settings.cfg_number, distilled.settings.distill) == (1, True)
    for host in (base, distilled):
        assert (host.config.steps, host.config.lag, host.config.fps) == (8, 2, 8)
        assert torch.equal(host.transformer.videodit_blocks.layers[1].mlp.linear_fc1.weight,
                           tiny_model().videodit_blocks.layers[1].mlp.linear_fc1.weight)  # fmt: skip
    take = Session(base, prompt_embeds=words(), decode=False)
    assert take.policy == KVRange("5/4/3/2")
    assert [name for name in take._streams] == ["cond"]


@pytest.mark.parametrize("kind", ["base", "distilled"])
@pytest.mark.parametrize(
    "policy", [None, FullHistory(), SlidingWindow(14, sink=2), FlowCacheKV(7)], ids=lambda p: type(p).__name__
)
def test_twelve_chunks_come_out_under_every_policy(
    kind: str, policy: object, request: pytest.FixtureRequest
) -> None:
    host = request.getfixturevalue(kind)
    take = Session(host, policy, prompt_embeds=words(2), chunks=12, seed=5)
    chunks = list(take)
    assert len(chunks) == 12
    assert all(chunk.frames.shape == (2, 8, 32, 48, 3) for chunk in chunks)  # 4 pixel frames per latent one
    assert all(torch.isfinite(chunk.latents).all() for chunk in chunks)
    if policy is not None and not isinstance(policy, FullHistory):
        held = take.policy.capacity(take.history.shape) * take.history.shape.token_bytes
        assert max(chunk.stats.history_bytes for chunk in chunks) <= held


@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_two_takes_in_lockstep_are_the_two_alone(kind: str, request: pytest.FixtureRequest) -> None:
    """Their prompts have different lengths."""
    host = request.getfixturevalue(kind)
    both = words(2)
    both[1, 3:] = 0
    together = latents(Session(host, prompt_embeds=both, chunks=5, seed=[5, 6], decode=False))
    for i in range(2):
        alone = latents(Session(host, prompt_embeds=both[i : i + 1], chunks=5, seed=5 + i, decode=False))
        torch.testing.assert_close(together[i], alone, rtol=0, atol=2e-4)
    assert (together[0] - together[1]).abs().max() > 0.1

"""In bf16 the host is at least as accurate as everything in bf16, the published way; fp64 is the truth."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longtake import FullHistory, Session
from longtake.hosts.wan import CausalWan

from .reference.wan import block_causal_forward, wan_twin
from .tiny import text, tiny_wan

LAYERS, HEADS, HEAD_DIM, CHUNKS = 4, 4, 24, 4
SEEDS = range(6)


def trained_like(seed: int) -> WanTransformer3DModel:
    """Random weights with the sizes training gives them: unit gain through linear layers, norms near one."""
    torch.manual_seed(seed)
    host = tiny_wan(layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM)
    host.release()
    model = host.transformer
    for name, p in model.named_parameters():
        if p.ndim > 1 and "scale_shift" not in name:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(p, 1.0, 0.2)
        else:
            torch.nn.init.normal_(p, std=0.2)
    return model


def chunks(seed: int) -> Tensor:
    return torch.randn(1, 4, 3 * CHUNKS, 4, 6, generator=torch.Generator().manual_seed(seed))


def through_the_host(host: CausalWan, latents: Tensor, timestep: float) -> Tensor:
    """The last chunk's velocity at `timestep`, behind a history of clean chunks."""
    take = Session(host, FullHistory(), prompt_embeds=text(), decode=False)
    history = take.history
    for i, part in enumerate(latents.split(3, 2)):
        block = history.admit(3 * i, 3, host.positions(take.geometry, 3 * i, 3))
        history.apply(take.policy.plan(history.table(), history.signals()))
        if i + 1 < CHUNKS:
            host.forward(part, 0.0, take.texts["cond"], history.layers("cond", block, write=True))
            history.commit(block)
    return host.forward(part, timestep, take.texts["cond"], history.layers("cond", block)).double()


def by_the_twin(model: WanTransformer3DModel, latents: Tensor, timestep: float, dtype: torch.dtype) -> Tensor:
    times = [0.0] * 3 * (CHUNKS - 1) + [timestep] * 3
    velocity = wan_twin(
        dict(model.state_dict()), LAYERS, HEADS, latents, times, text(), [3] * CHUNKS, dtype, model.config.eps
    )
    return velocity[:, :, -3:].double()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_fp64_twin_is_the_stock_model(seed):
    """Written from the formulas, it agrees with diffusers to fp32 rounding: what follows measures rounding only."""
    model, latents = trained_like(seed), chunks(seed)
    times = [0.0] * 9 + [900.0] * 3
    stock = block_causal_forward(model, latents, times, text(), [3] * CHUNKS)[:, :, -3:].double()
    assert relative(stock, by_the_twin(model, latents, 900.0, torch.float64)) < 1e-5


@pytest.mark.parametrize("timestep", [937.5, 625.0, 250.0])
def test_fp32_through_the_history_is_fp64_to_rounding(timestep):
    model, latents = trained_like(0), chunks(0)
    truth = by_the_twin(model, latents, timestep, torch.float64)
    host = tiny_wan(layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM)
    ours = through_the_host(CausalWan(model, host.config), latents, timestep)
    assert relative(ours, truth) < 1e-5


def errors(seed: int, folder, timestep: float) -> tuple[float, float]:
    """Relative error of our bf16 host, as diffusers loads it, and of everything in bf16."""
    model, latents = trained_like(seed), chunks(seed)
    truth = by_the_twin(model, latents, timestep, torch.float64)
    model.save_pretrained(folder)
    loaded = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    assert loaded.blocks[0].scale_shift_table.dtype == torch.float32  # the islands are there
    host = CausalWan(loaded, tiny_wan().config)
    assert host.dtype == torch.bfloat16
    ours = through_the_host(host, latents, timestep)
    return relative(ours, truth), relative(by_the_twin(model, latents, timestep, torch.bfloat16), truth)


@pytest.mark.parametrize("timestep", [937.5, 250.0])
def test_bf16_is_at_least_as_accurate_as_everything_in_bf16(timestep, tmp_path):
    pairs = [errors(seed, tmp_path / str(seed), timestep) for seed in SEEDS]
    ours, theirs = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    assert ours <= theirs
    assert all(a < 1.1 * b for a, b in pairs)  # and on no seed worse by more than chance
    assert 1e-4 < ours < 0.05  # it did run in bf16

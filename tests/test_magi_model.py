"""The MAGI-1 network computes what the authors' modules computed, module by module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.attention import attend
from longtake.hosts.magi.model import MagiTransformer3DModel, cap, chunk_positions

from .magi import golden_model
from .tiny import golden

NEAR = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def stored() -> tuple[dict[str, Tensor], dict]:
    return golden("magi_tiny_dit")


@pytest.fixture(scope="module")
def model(stored: tuple) -> MagiTransformer3DModel:
    return golden_model(stored[0], stored[1]["config"])


class Shown:
    """A view with given keys and values before the tokens in flight, rotated by given phases."""

    def __init__(self, model: MagiTransformer3DModel, positions: Tensor, before: Tensor, limits: list[tuple]) -> None:
        self.rotary, self.phases = model.rotary(), model.rotary().phases(positions)
        self.before, self.limits = before, limits

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.rotary.rotate(q, self.phases), self.rotary.rotate(k, self.phases)
        old_k, old_v = self.before[None].chunk(2, -1)
        k, v = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
        parts = q.chunk(len(self.limits), 1)
        return torch.cat([attend(p, k[:, a:b], v[:, a:b]) for p, (a, b) in zip(parts, self.limits, strict=True)], 1)


def rows(x: Tensor) -> Tensor:
    """Upstream's [tokens, batch, hidden] → [batch, tokens, hidden]."""
    return x.transpose(0, 1)


def test_the_embedders_are_the_authors(stored: tuple, model: MagiTransformer3DModel) -> None:
    g, _ = stored
    close = lambda mine, name: torch.testing.assert_close(mine, g[name], **NEAR)
    close(model.t_embedder(g["component/t_embedder/t"]), "component/t_embedder/out")
    close(model.t_embedder(g["component/step_size/value"]), "component/step_size/out")
    close(cap(g["component/gate_softcap/in"]), "component/gate_softcap/out")
    close(model.x_embedder(g["distill/trace9/x_embedder/in"]), "distill/trace9/x_embedder/out")
    close(model.y_embedder.text(g["distill/trace9/y_embedder/in"]), "distill/trace9/y_embedder/out0")
    close(model.y_embedder.condition(null=False)[None, None], "distill/trace9/y_embedder/out1")


@pytest.mark.parametrize(("name", "frames", "grid"), [("4x3x2", 4, (3, 2)), ("6x5x4", 6, (5, 4))])
def test_the_learned_bands_turn_tokens_as_the_authors_table_does(
    stored: tuple, model: MagiTransformer3DModel, name: str, frames: int, grid: tuple[int, int]
) -> None:
    sine, cosine = stored[0][f"component/rope_{name}"].chunk(2, -1)
    phases = model.rotary().phases(chunk_positions(0, frames, *grid))
    torch.testing.assert_close(phases, torch.stack((cosine, sine), -1), **NEAR)


def test_projections_and_norms_are_the_authors(stored: tuple, model: MagiTransformer3DModel) -> None:
    g, _ = stored
    attention = model.videodit_blocks.layers[0].self_attention
    x = attention.linear_qkv.layer_norm(rows(g["component/qkv/in"]))
    q, k, v = attention.qkv(x)
    sine, cosine = g["component/qkv/rope"].chunk(2, -1)
    phases, rotary = torch.stack((cosine, sine), -1), model.rotary()
    torch.testing.assert_close(rotary.rotate(q, phases)[0], g["component/qkv/q"], **NEAR)
    torch.testing.assert_close(rotary.rotate(k, phases)[0], g["component/qkv/k"], **NEAR)
    torch.testing.assert_close(v[0], g["component/qkv/v"], **NEAR)
    torch.testing.assert_close(attention.cross_queries(x)[0], g["component/xattn/q"], **NEAR)
    k, v = attention.text_kv(g["component/xattn/text"])
    torch.testing.assert_close(k, g["component/xattn/k"], **NEAR)
    torch.testing.assert_close(v, g["component/xattn/v"], **NEAR)


def test_every_block_of_a_call_with_a_cached_chunk_is_the_authors(stored: tuple, model: MagiTransformer3DModel) -> None:
    """Call 9 of the run `distill`: one clean chunk in the cache, two in flight at different times."""
    g, meta = stored
    trace = {k.removeprefix("distill/trace9/"): v for k, v in g.items() if k.startswith("distill/trace9/")}
    frames, tokens = meta["config"]["cw"], meta["config"]["tokens_per_chunk"]
    call = next(r for r in meta["runs"] if r["key"] == "distill")["calls"][9]
    positions = chunk_positions(frames, 2 * frames, 2, 3)
    real = g["distill/call9/text_mask"].bool()[:, 0]
    text = g["distill/call9/y"][0, 0][real[0]]
    step = 2 * 8 / 4
    times = g["distill/call9/t"][0].tolist()
    conditions = torch.cat([model.condition(t, step, null=False) for t in times])
    hidden = rows(trace["videodit_blocks.layers.0/in"])
    torch.testing.assert_close(model.tokens(g["distill/call9/x"]), hidden, **NEAR)
    for i, layer in enumerate(model.videodit_blocks.layers):
        name = f"videodit_blocks.layers.{i}"
        close = lambda mine, part, name=name: torch.testing.assert_close(mine, rows(trace[name + part]), **NEAR)
        gates = torch.cat(layer.ada_modulate_layer(conditions), -1)
        torch.testing.assert_close(gates, cap(trace[f"{name}.ada_modulate_layer/out"])[0], **NEAR)
        view = Shown(model, positions, g[f"distill/kv_cache_layer{i}"][:tokens], call["kv_ranges_tokens"])
        # the golden's cache at the end holds chunk 0 as its clean pass left it: what this call saw
        kv = [layer.self_attention.text_kv(model.y_embedder.text(text[None]))]
        own, cross = layer.self_attention.heads(hidden, view, kv)
        close(own, ".self_attention/out0")
        close(cross, ".self_attention/out1")
        close(layer.mlp(rows(trace[f"{name}.mlp/in"])), ".mlp/out")
        out = layer(hidden, conditions.repeat_interleave(tokens, 0), view, kv)
        close(out, "/out")
        hidden = rows(trace[f"{name}/out"])
    last = model.videodit_blocks.final_layernorm(hidden)
    torch.testing.assert_close(last, rows(trace["videodit_blocks.final_layernorm/out"]), **NEAR)
    out = model.final_linear.linear(last)
    torch.testing.assert_close(out, rows(trace["final_linear/out"]), **NEAR)
    torch.testing.assert_close(model.pixels(out, g["distill/call9/x"].shape), g["distill/call9/out"], **NEAR)

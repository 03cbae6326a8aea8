"""A compiled transformer: whole graphs, and none added once the history is full."""

import pytest
import torch
from torch._dynamo.utils import counters

from longtake import Session, SlidingWindow

from .tiny import text, tiny_wan


@pytest.mark.parametrize("residency", ["resident", "alias"])
def test_no_recompilation_once_the_window_is_full(residency):
    def take(host):
        return Session(host, SlidingWindow(9, 3), prompt_embeds=text(), decode=False, seed=3, residency=residency)

    plain = take(tiny_wan(layers=2))
    expected = [next(plain).latents for _ in range(7)]
    torch._dynamo.reset()
    counters.clear()
    host = tiny_wan(layers=2)
    host.transformer.compile(backend="eager", fullgraph=True)  # fullgraph: a graph break is an error
    compiled, graphs = take(host), []
    for latents in expected:
        assert torch.allclose(next(compiled).latents, latents, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 2 <= graphs[-1] <= 6, graphs  # reading and writing passes, filling and full
    assert graphs[3] == graphs[-1], graphs

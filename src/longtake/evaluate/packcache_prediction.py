"""What a take of Lumos-1 should cost, from forwards and draws timed apart, while the arms are measured.

    seconds of a frame = streams · (steps + 1) · (a + b · keys) + seconds of its draws

a and b come from bare forwards over few and over many keys, made between the frames of the takes and judged like them,
by the median. What is drawn is timed with the sampler itself: the head is a product over the visual columns and the
codes still masked, far less than the whole vocabulary for every token that the cost model charges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..history import LayerView
from ..hosts.lumos import Lumos
from ..samplers.base import Sampling
from ..samplers.masked import MaskedSampler, still_masked
from .lumos_shapes import LumosBench
from .machine import Clock

REPEATS = 3  # forwards of each length, every time


def drawn_rows(cells: int, steps: int) -> int:
    """Rows for which a frame of `cells` codes makes logits, over all its steps."""
    rows = most = cells
    for step in range(steps - 1):
        most = max(1, min(still_masked(cells, step, steps), most - 1))
        rows += most
    return rows


@dataclass
class Calibration:
    """Timed between the frames of takes of `steps`, the longest of `latent_frames`; `again` adds to what is known."""

    bench: LumosBench
    steps: int
    latent_frames: int
    forwards: dict[int, list[float]] = field(default_factory=dict)  # keys → seconds
    draws: list[float] = field(default_factory=list)  # all draws of a frame

    @property
    def lengths(self) -> tuple[int, int]:
        cost = self.bench.cost
        return cost.frame_tokens, cost.full_keys(self.latent_frames - 1)

    def again(self, host: Lumos, clock: Clock) -> None:
        for keys in self.lengths:
            forward = _bare(host, keys)
            self.forwards.setdefault(keys, []).extend(clock.seconds(forward) for _ in range(REPEATS))
        self.draws.append(clock.seconds(_drawing(host, self.steps)))

    @property
    def known(self) -> bool:
        """Whether everything was timed at least once."""
        return bool(self.draws) and all(self.forwards.get(keys) for keys in self.lengths)

    @property
    def line(self) -> tuple[float, float]:
        """Seconds of a forward without any key, and for every key; neither is negative."""
        (few, many), (short, long) = self.lengths, (median(self.forwards[keys]) for keys in self.lengths)
        each = min(max(0.0, (long - short) / (many - few)), short / few)
        return short - each * few, each

    def speedup(self, latent_frames: int, budget: float) -> tuple[float, float]:
        """Full history over anchors and `budget` frames of history: of a take, and of its last frame."""
        cost, (base, each), drawing = self.bench.cost, self.line, median(self.draws)
        made = self.bench.shape.streams * (self.steps + 1)
        seconds = lambda keys: made * (base + each * keys) + drawing
        full = [seconds(cost.full_keys(f)) for f in range(1, latent_frames)]
        own = [seconds(cost.budget_keys(f, budget)) for f in range(1, latent_frames)]
        return sum(full) / sum(own), full[-1] / own[-1]

    def as_dict(self) -> dict[str, Any]:
        """Medians, and what a FLOP takes: `e` is one of attention over one of a matrix product."""
        if not self.known:
            return {"keys": list(self.lengths), "e": None}
        cost, (base, each) = self.bench.cost, self.line
        shape, n = self.bench.shape, cost.frame_tokens
        linear, attention = (
            2 * n * shape.linear_parameters,
            n * shape.attention_flops(1, 1),
        )  # no head in a bare forward
        cells = shape.height // shape.patch * (shape.width // shape.patch)
        rates: dict[str, float | None] = {"linear_tflops": None, "attention_tflops": None, "e": None}
        if base > 0 and each > 0:
            rates = {
                "linear_tflops": 1e-12 * linear / base, "attention_tflops": 1e-12 * attention / each,
                "e": (each / attention) / (base / linear),
            }  # fmt: skip
        return {
            "keys": list(self.lengths), "seconds": [median(self.forwards[keys]) for keys in self.lengths],
            "forwards": {str(keys): values for keys, values in self.forwards.items()}, "draws": self.draws,
            "drawing_seconds": median(self.draws),
            "head_flops": drawn_rows(cells, self.steps) * 2 * shape.hidden * shape.visual_codes,
            "charged_head_flops": shape.streams * (self.steps + 1) * n * 2 * shape.hidden * shape.vocabulary, **rates,
        }  # fmt: skip


def _bare(host: Lumos, keys: int) -> Any:
    """A forward that attends to `keys` in all; every layer reads the same buffer."""
    geometry = host.geometry()
    n = geometry.tokens_per_frame
    base, _ = host.positions(geometry, 0, 1)
    phases = host.rotary.phases(base.to(host.device))
    k, v = (torch.randn(1, keys, host.kv_heads, host.head_dim, dtype=host.dtype, device=host.device) for _ in range(2))
    views = [LayerView(host.rotary, phases, k, v, slice(keys - n, keys), None, None, None, None)] * host.layers
    ids = torch.zeros(1, n, dtype=torch.int64, device=host.device)
    return lambda: host.model(ids, views)


def _drawing(host: Lumos, steps: int) -> Any:
    """Everything that sampling a frame is beside its forwards."""
    geometry = host.geometry()
    cells = geometry.grid[0] * geometry.grid[1]
    hidden = torch.randn(1, cells, host.model.config.hidden_size, dtype=torch.float32, device=host.device)
    sampler = MaskedSampler(steps=steps)

    def forward(x: Tensor, t: float, step: int) -> Tensor:
        return hidden

    def frame() -> Tensor:
        noise = sampler.noise([torch.Generator().manual_seed(0)])
        return sampler.sample(Sampling(host, geometry, 1, sampler.schedule, 0, noise, forward))

    return frame

"""The forwards of a chunk's steps, recorded once and replayed: CUDA graphs over the chunk loop.

Once a window is full, every chunk's step s does the same operations on tensors of the same shapes: the view lies where
it lay, the chunk's keys go to the same tail. What differs is copied into buffers whose addresses never change: the
latents and the phases of the chunk's own tokens. A forward is recorded when its like comes a second time, so a window
that is still filling records nothing; and all recordings are forgotten when something else than those two differs (the
view, the prompt), so they do not pile up.

The commit pass is never recorded: it stores keys and values in rows that change from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import LongtakeError
from .history import LayerView
from .hosts.base import Host, TextState

Work = Callable[[], None]
Record = Callable[[Work], Work]  # what runs `work` again, on the same tensors
WARMUP = 3


@dataclass
class Recorded:
    """One forward: its static buffers, and what runs it on them."""

    latents: Tensor
    phases: Tensor
    out: Tensor
    again: Work

    @property
    def nbytes(self) -> int:
        return self.latents.nbytes + self.phases.nbytes + self.out.nbytes


class Replay:
    """Forwards of `host` by (stream, timestep). `record` makes a recording: `CudaGraphs(device)` on a GPU; a function
    that gives `work` back replays by computing again, which is what tests compare with."""

    def __init__(self, host: Host, record: Record) -> None:
        self.host, self.record = host, record
        self.replayed = 0  # forwards that were not computed by their operations
        self._where: dict[str, tuple[Any, ...]] = {}  # by stream: what the recordings of it depend on
        self._texts: dict[str, TextState] = {}
        self._seen: set[tuple[str, float]] = set()
        self._recorded: dict[tuple[str, float], Recorded] = {}

    @property
    def nbytes(self) -> int:
        """Of the static buffers; what a graph allocates for activations is the allocator's."""
        return sum(one.nbytes for one in self._recorded.values())

    def forward(
        self, stream: str, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView]
    ) -> Tensor:
        """`host.forward`, replayed if it has been recorded."""
        if not all(_plain(view) for view in layers):
            return self.host.forward(latents, timestep, text, layers)
        where = (latents.shape, latents.dtype, len(layers), *(_place(view) for view in layers))
        if self._where.get(stream) != where or self._texts.get(stream) is not text:
            self._forget(stream)
            self._where[stream], self._texts[stream] = where, text
        key = (stream, timestep)
        if (known := self._recorded.get(key)) is not None:
            known.latents.copy_(latents)
            known.phases.copy_(layers[0].phases)
            known.again()
            self.replayed += 1
            return known.out.clone()
        out = self.host.forward(latents, timestep, text, layers)
        if key in self._seen:
            self._recorded[key] = self._record(latents, timestep, text, layers, out)
        self._seen.add(key)
        return out

    def _record(
        self, latents: Tensor, timestep: float, text: TextState, layers: list[LayerView], out: Tensor
    ) -> Recorded:
        given, phases, made = latents.clone(), layers[0].phases.clone(), torch.empty_like(out)
        views = [copy(view) for view in layers]
        for view in views:
            view.phases = phases

        def work() -> None:
            made.copy_(self.host.forward(given, timestep, text, views))

        return Recorded(given, phases, made, self.record(work))

    def _forget(self, stream: str) -> None:
        self._recorded = {key: one for key, one in self._recorded.items() if key[0] != stream}
        self._seen = {key for key in self._seen if key[0] != stream}


class CudaGraphs:
    """Records on a CUDA device; all graphs share one pool of memory, since they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Runs `work` a few times, then captures it. Raises RuntimeError for what cannot be captured."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # kernels are chosen and loaded outside of the graph
            for _ in range(WARMUP):
                work()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay


def check_graphs(host: Host, sampler: str, residency: str) -> None:
    """Raise LongtakeError, with advice, where a chunk loop cannot be recorded."""
    if host.device.type != "cuda":
        raise LongtakeError(f"cuda_graphs needs a CUDA device, this model is on {host.device.type}: leave it out")
    if sampler != "chunked" or host.config.host != "wan":
        raise LongtakeError(
            f"cuda_graphs is for causal Wan models, one chunk at a time; {host.name} is none: leave it out"
        )
    if residency != "resident":
        raise LongtakeError(
            f"cuda_graphs needs a view that stays where it is, this one is {residency!r}: use residency='resident'"
        )


def _plain(view: LayerView) -> bool:
    """Whether a layer's attention depends on its tensors alone, and only its phases are new in each chunk."""
    hooks = (view.prepare, view.write, view.observe, view.direct, view.groups, view.bias)
    return all(hook is None for hook in hooks)


def _place(view: LayerView) -> tuple[Any, ...]:
    """Where a layer's view and its live tail lie."""
    tail, phases = view.k_live, view.phases
    return view.k.data_ptr(), view.v.data_ptr(), view.k.shape, tail.data_ptr(), tail.shape, phases.shape

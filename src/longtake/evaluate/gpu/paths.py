"""Ways of doing the same thing: a layer's view and attention by PyTorch and by Triton, in every form of history; and a
chunk with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import LongtakeError
from ...history import FORMS, History
from ...hosts.base import Host
from ...plan import Entry, HistoryShape, Plan
from ...session import Session
from ..machine import Clock
from .report import PathRow

WARMUP, REPEATS = 2, 7


def layer_paths(host: Host, history_frames: int, clock: Clock) -> Iterator[PathRow]:
    """One layer of `host` over `history_frames` latent frames of random history and a chunk of its own."""
    geometry = host.geometry()
    past, own = (n * geometry.tokens_per_frame for n in (history_frames, geometry.chunk_frames))
    what = f"view and attention of a layer, {own} tokens over {past}"
    for form in (None, *FORMS):
        for kernels in (None, "triton"):
            way = f"{form or 'as computed'}, {kernels or 'PyTorch'}"
            if reason := _cannot(kernels, clock.device):
                yield PathRow(what, way, "missing", reason=reason)
                continue
            try:
                attend = _layer(host, history_frames, form, kernels)
                yield _timed(what, way, attend, clock)
            except (LongtakeError, RuntimeError) as error:
                yield PathRow(what, way, "missing", reason=str(error).split("\n")[0])


def _cannot(kernels: str | None, device: torch.device) -> str:
    if kernels is None:
        return ""
    if device.type != "cuda":
        return f"needs a CUDA device, this run was on {device.type}"
    return "" if find_spec("triton") is not None else "triton is not installed"


def _layer(host: Host, frames: int, form: str | None, kernels: str | None) -> Callable[[], Tensor]:
    geometry = host.geometry()
    chunk, itemsize = geometry.chunk_frames, host.dtype.itemsize
    shape = HistoryShape(1, host.kv_heads, host.head_dim, itemsize, geometry.tokens_per_frame, chunk)
    rows = (frames + chunk) * geometry.tokens_per_frame
    history = History(
        shape, host.rotary, capacity=rows, visible=rows, residency="scratch", dtype=host.dtype, device=host.device,
        history_dtype=form, kernels=kernels,
    )  # fmt: skip
    noise = torch.Generator(host.device).manual_seed(0)
    size = (1, chunk * geometry.tokens_per_frame, host.kv_heads, host.head_dim)
    draw = lambda: torch.randn(*size, generator=noise, device=host.device).to(host.dtype)
    for start in range(0, frames, chunk):
        block = _announced(history, host, start)
        for view in history.layers("cond", block, write=True):
            view.put(draw(), draw())
        history.commit(block)
    block = _announced(history, host, frames)
    view = history.layers("cond", block)[0]
    groups = _query_heads(host) // host.kv_heads
    q, k, v = draw().repeat_interleave(groups, 2), draw(), draw()
    return lambda: view.attend(q, k, v)


def _announced(history: History, host: Host, frame: int) -> int:
    geometry = host.geometry()
    block = history.admit(frame, geometry.chunk_frames, host.positions(geometry, frame, geometry.chunk_frames))
    history.apply(Plan(tuple(Entry(b.id) for b in history.table().blocks)))
    return block


def _query_heads(host: Host) -> int:
    return int(getattr(getattr(host, "transformer", None), "config", {}).get("num_attention_heads", host.kv_heads))


def graph_paths(host: Host, policy: Any, given: dict[str, Any], chunks: int, clock: Clock) -> Iterator[PathRow]:
    """The last of `chunks` chunks of a take, with and without CUDA graphs."""
    what = f"chunk {chunks - 1} of {host.name} under {policy.name}"
    for graphs in (False, True):
        way = "CUDA graphs" if graphs else "as it is"
        if graphs and clock.device.type != "cuda":
            yield PathRow(what, way, "missing", reason=f"needs a CUDA device, this run was on {clock.device.type}")
            continue
        try:
            take = Session(host, policy, decode=False, cuda_graphs=graphs, **given)
            for _ in range(chunks - 1):
                next(take)
            yield PathRow(what, way, "run", clock.seconds(partial(next, take)), 1)
        except (LongtakeError, RuntimeError) as error:
            yield PathRow(what, way, "missing", reason=str(error).split("\n")[0])


def _timed(what: str, way: str, work: Callable[[], Any], clock: Clock) -> PathRow:
    for _ in range(WARMUP):
        work()
    return PathRow(what, way, "run", float(np.median([clock.seconds(work) for _ in range(REPEATS)])), REPEATS)

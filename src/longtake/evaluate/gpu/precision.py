"""What a quantised history does to attention, on keys, values and queries that a model computed itself.

A take is made with everything kept as it was computed. Then each layer's queries of the last chunk attend once to the
keys and values of all chunks as they are, and once as each form would have kept them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attention import attend
from ...history import FORMS, LayerView
from ...history.store import Store
from ...hosts.base import Host
from ...policies import FullHistory
from ...session import Session
from .report import ErrorRow

KEPT = ("float32", "bfloat16", *FORMS)  # the forms that are compared; the first is what errors refer to


def history_errors(host: Host, name: str, chunks: int, seed: int = 0, **given: Any) -> list[ErrorRow]:
    """A row for each form, of a take of `chunks` chunks; `given` goes to the session (its prompt)."""
    take = Session(host, FullHistory(), chunks=chunks, seed=seed, decode=False, **given)
    asked: dict[int, Tensor] = {}

    def look(stream: str, block: int, write: bool, layers: list[LayerView]) -> None:
        for number, view in enumerate(layers if write and stream == "cond" else ()):
            view.observe = lambda q, k, number=number: asked.__setitem__(number, q.detach())

    take.history.probe = look
    for _ in take:
        pass
    store = take.history.stores["cond"]
    rows = store.used.nonzero()[:, 0].to(store.base.device)
    phases = host.rotary.phases(store.base[rows])
    off: dict[str, list[tuple[float, float]]] = {form: [] for form in KEPT}
    for layer, q in asked.items():
        exact = _attended(host, store, layer, rows, phases, q, KEPT[0])
        for form in KEPT:
            error = _attended(host, store, layer, rows, phases, q, form) - exact
            off[form].append((float(error.square().sum()), float(exact.square().sum())))
    bytes_of = lambda form: FORMS[form].head_bytes(host.head_dim) if form in FORMS else _itemsize(form) * host.head_dim
    return [
        ErrorRow(
            name, form, 2 * bytes_of(form), (sum(e for e, _ in found) / sum(w for _, w in found)) ** 0.5,
            max((e / w) ** 0.5 for e, w in found),
        )
        for form, found in off.items()
    ]  # fmt: skip


def _attended(host: Host, store: Store, layer: int, rows: Tensor, phases: Tensor, q: Tensor, form: str) -> Tensor:
    """Attention of rotated q [B, N, H, D] to all rows of a layer, kept in a form: fp32."""
    k, v = (_kept(t[layer].index_select(1, rows).float(), form) for t in (store.k, store.v))
    return attend(q.float(), host.rotary.rotate(k, phases), v)


def _kept(x: Tensor, form: str) -> Tensor:
    if form in FORMS:
        return FORMS[form].unpack(*FORMS[form].pack(x), torch.empty_like(x))
    return x.to(getattr(torch, form)).float()


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)

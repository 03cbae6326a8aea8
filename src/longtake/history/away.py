"""What of a take lies in host memory: a store of its own there, and the device memory that a plan's part of it is
fetched into before the first forward of a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PlanError
from ..plan import HistoryShape
from ..rope import RotaryTable
from .memory import Memory
from .parts import Part
from .quantised import Quantised
from .store import Store, stretches


class Staging(Memory):
    """Device memory for `tokens` tokens of one stream in all layers, in the storage form of the host's.

    On a GPU the copies run in a CUDA stream of their own and a layer waits for its own only, so that fetching overlaps
    with the forwards; the host memory must be pinned for that.
    """

    def __init__(
        self, shape: HistoryShape, tokens: int, dtype: torch.dtype, device: torch.device, form: Quantised | None = None
    ) -> None:
        super().__init__((shape.layers, shape.batch, tokens, shape.kv_heads, shape.head_dim), dtype, device, form=form)
        self.used = 0
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: list[torch.cuda.Event] = []

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.kept)

    def clear(self) -> None:
        """Nothing that was fetched is needed any more."""
        self.used = 0

    def fetch(self, source: Store, rows: Tensor) -> slice:
        """Copy rows [B, n] (or [n], the same for all takes) of `source` here; returns where they will lie.

        Raises PlanError if there is no room: more is shown than the policy's `offloaded` said."""
        n, room = rows.shape[-1], self.k.shape[2]
        to = slice(self.used, self.used + n)
        if to.stop > room:
            raise PlanError(f"{to.stop} tokens of host memory are shown, offloaded() promised {room} at most")
        self.used = to.stop
        takes = [slice(None)] if rows.dim() == 1 else [slice(b, b + 1) for b in range(rows.shape[0])]
        pieces = [
            (take, slice(to.start + start, to.start + start + at.stop - at.start), at)
            for take, own in zip(takes, rows.reshape(len(takes), n), strict=True)
            for start, at in stretches(own)
        ]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            self._ready = []
        with torch.cuda.stream(self._stream):  # of None: no other stream
            for layer in range(self.k.shape[0]):
                for take, here, there in pieces:
                    for own, its in zip(self.kept, source.kept, strict=True):
                        own[layer][take, here].copy_(its[layer][take, there], non_blocking=True)
                if self._stream is not None:
                    event = torch.cuda.Event()
                    event.record(self._stream)
                    self._ready.append(event)
        return to

    def wait(self, layer: int) -> None:
        """Let what follows on the device begin when this layer's copies are done."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ready[layer])


class Fetched(Part):
    """Tokens of host memory, fetched when the plan was taken up; `phases` [n, P, 2], or [B, n, 1, P, 2] per take."""

    def __init__(self, staging: Staging, source: Store, rotary: RotaryTable, rows: Tensor, phases: Tensor) -> None:
        self.staging, self.rotary, self.phases, self.n = staging, rotary, phases, rows.shape[-1]
        self.at = (slice(None), staging.fetch(source, rows))

    def fill(self, layer: int, k: Tensor, v: Tensor, q: Tensor | None) -> None:
        self.staging.wait(layer)
        self.rotary.rotate(self.staging.keys(layer, self.at, k), self.phases, out=k)
        self.staging.copy_values(layer, self.at, v)

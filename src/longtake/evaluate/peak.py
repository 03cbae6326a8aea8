"""The most bytes of tensors that are alive while something runs, by watching every operation."""

from __future__ import annotations

import weakref
from collections.abc import Set
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .measure import living_storages, storage_of


class PeakBytes(TorchDispatchMode):
    """`with PeakBytes() as watch:` leaves in `peak` the most bytes of CPU storages that operations made and that were
    alive at once. What a kernel allocates for itself alone is not seen.

    `existing`: what is there at the start is looked up among Python's objects, so that it counts when it is given back.
    `start` and `stop` are for where there is no one place to leave; a second `stop` does nothing.
    """

    def __init__(self, existing: bool = False) -> None:
        super().__init__()
        self._existing, self._running = existing, False
        self._known: dict[int, weakref.ref[Any]] = {}
        self._now = self._first = self._most = 0

    @property
    def peak(self) -> int:
        return self._most - self._first

    def __enter__(self) -> Self:
        if self._existing:
            for storage in living_storages("cpu"):
                self._note(storage)
        self._first = self._most = self._now
        self._running = True
        super().__enter__()
        return self

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        if self._running:
            self.__exit__(None, None, None)

    def __exit__(self, *raised: Any) -> None:
        self._running = False
        super().__exit__(*raised)
        self._known.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            self._note(storage, given)
        self._most = max(self._most, self._now)
        return out

    def _note(self, storage: torch.UntypedStorage, given: Set[int] = frozenset()) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:  # seen before; a view of what was there
            return

        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self._now -= size

        self._known[key] = weakref.ref(storage, gone)
        self._now += size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Those of the CPU tensors in what an operation was given, or gave."""
    tensors = (x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == "cpu")
    return [storage for x in tensors if (storage := storage_of(x)) is not None]

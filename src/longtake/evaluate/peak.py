"""The most bytes of tensors that are alive while something runs on the CPU, by watching every operation."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class WatchBytes(TorchDispatchMode):
    """From `start` to `stop`, `extra` becomes the bytes of CPU storages alive at most, above those alive at the start.

    What exists at the start is looked up among Python's objects, so that it counts when it is given back. What a kernel
    allocates for itself alone is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref[Any]] = {}
        self._now = self._first = self._most = 0
        self._running = False

    @property
    def extra(self) -> int:
        return self._most - self._first

    def start(self) -> None:
        gc.collect()
        tensors: dict[type, bool] = {}
        for thing in gc.get_objects():
            kind = type(thing)  # not isinstance: it would run properties of lazy modules
            if kind not in tensors:
                tensors[kind] = issubclass(kind, Tensor)
            if tensors[kind]:
                self._note(thing)
        self._first = self._most = self._now
        self._running = True
        self.__enter__()

    def stop(self) -> None:
        """Once more does nothing."""
        if self._running:
            self._running = False
            self.__exit__(None, None, None)
            self._known.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        self._most = max(self._most, self._now)
        return out

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse and wrapper tensors have no storage of their own
            return
        key = storage._cdata
        if key in self._known:
            return
        bytes_ = storage.nbytes()

        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self._now -= bytes_

        self._known[key] = weakref.ref(storage, gone)
        self._now += bytes_

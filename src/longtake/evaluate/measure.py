"""Measuring a take from outside: medians with intervals, live tensor bytes, resident memory, operations.

Nothing here asks a session what it holds: tensors are found by walking Python's own object list, operations by watching
the dispatcher.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import LongtakeError
from .typed import record

RESAMPLES = 10_000
LEVEL = 0.95


def bootstrap(
    values: Sequence[float], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of `values`; the same seed gives the same interval.

    Raises LongtakeError without values.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        raise LongtakeError("an interval needs at least one value")
    rng = np.random.default_rng(seed)
    medians = np.median(data[rng.integers(0, len(data), (resamples, len(data)))], axis=1)
    low, high = np.quantile(medians, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


@dataclass(frozen=True)
class Figure:
    """One measured number: the median of `n` values and its 95 % bootstrap interval, or why it is missing."""

    name: str
    unit: str
    n: int = 0
    median: float | None = None
    ci95: tuple[float, float] | None = None
    values: tuple[float, ...] = ()
    missing: str = ""

    @classmethod
    def of(cls, name: str, unit: str, values: Sequence[float], seed: int = 0) -> Self:
        return cls(name, unit, len(values), float(np.median(values)), bootstrap(values, seed=seed), tuple(values))

    @classmethod
    def absent(cls, name: str, unit: str, reason: str) -> Self:
        return cls(name, unit, missing=reason)

    def line(self) -> str:
        """For people."""
        if self.median is None or self.ci95 is None:
            return f"{self.name}: missing, {self.missing}"
        low, high = self.ci95
        return f"{self.name}: {self.median:.4g} {self.unit}".rstrip() + f"  [{low:.4g}, {high:.4g}]  n={self.n}"

    def as_dict(self) -> dict[str, Any]:
        if self.missing:
            return {"name": self.name, "unit": self.unit, "missing": self.missing}
        digits = lambda x: float(f"{x:.6g}")
        assert self.median is not None and self.ci95 is not None
        return {
            "name": self.name, "unit": self.unit, "n": self.n, "median": digits(self.median),
            "ci95": [digits(x) for x in self.ci95], "values": [digits(x) for x in self.values],
        }  # fmt: skip

    @classmethod
    def read(cls, row: dict[str, Any], place: str = "figure") -> Self:
        """Raises LongtakeError, with `place`, for a row that is neither measured nor missing."""
        given = record(_Absent if "missing" in row else _Measured, row, place)
        if isinstance(given, _Absent):
            return cls.absent(given.name, given.unit, given.missing)
        return cls(given.name, given.unit, given.n, given.median, given.ci95, given.values)


@dataclass(frozen=True)
class _Absent:
    """A figure's row in JSON when nothing was measured."""

    name: str
    unit: str
    missing: str


@dataclass(frozen=True)
class _Measured:
    """A figure's row in JSON."""

    name: str
    unit: str
    n: int
    median: float
    ci95: tuple[float, float]
    values: tuple[float, ...]


def live_tensor_bytes(device: torch.device | str | None = None) -> int:
    """Bytes of all tensor storages that are alive in this process, each counted once however many views it has."""
    kind = None if device is None else torch.device(device).type
    return sum({storage._cdata: storage.nbytes() for storage in living_storages(kind)}.values())


def living_storages(kind: str | None = None) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors alive in this process, or of those on a kind of device; one for every view of it."""
    gc.collect()
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor):  # not isinstance: it would run properties of lazy modules
            continue
        if (kind is not None and thing.device.type != kind) or thing.device.type == "meta":
            continue
        storage = storage_of(thing)
        if storage is not None and storage.device.type != "meta":  # a compiler's stand-ins hold nothing
            yield storage


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """What a tensor lies in; None for sparse and wrapper tensors, which have no storage of their own."""
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None


def rss_bytes() -> int | None:
    """Resident memory of this process; None where neither /proc nor psutil can tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        import resource

        return pages * resource.getpagesize()
    except (OSError, ImportError, ValueError, IndexError):
        pass
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


@dataclass
class OpCounts:
    """How often each ATen operation ran, in all and by the shapes of its tensors."""

    by_name: Counter[str] = field(default_factory=Counter)
    by_shape: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.by_name.total()


class CountOperations(TorchDispatchMode):
    """`with CountOperations() as counts:` counts every operation that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = OpCounts()

    def __enter__(self) -> OpCounts:
        super().__enter__()
        return self.counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        shapes = ",".join(str(tuple(a.shape)) for a in args if isinstance(a, torch.Tensor))
        self.counts.by_name[name] += 1
        self.counts.by_shape[f"{name}({shapes})"] += 1
        return func(*args, **(kwargs or {}))


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Paired ratios values / base."""
    if len(values) != len(base) or any(b <= 0 or not math.isfinite(b) for b in base):
        raise LongtakeError(f"{len(values)} values against {len(base)} bases: ratios need positive pairs")
    return [v / b for v, b in zip(values, base, strict=True)]

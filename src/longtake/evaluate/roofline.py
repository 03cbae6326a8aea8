"""The machine's ceilings, measured: matrix products in TFLOP/s by dtype, and copying in GB/s read and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .machine import DTYPES, Clock

GEMM_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # n of an n × n × n product
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # more than any cache holds
REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """The best that was seen: of matrix products by dtype, and of copies too large for a cache."""

    gemm_tflops: dict[str, float]
    copy_gbs: float

    def of(self, resource: str) -> float | None:
        """The ceiling of a dtype's products in TFLOP/s, or of "copy" in GB/s; None if it was not measured."""
        return self.copy_gbs if resource == "copy" else self.gemm_tflops.get(resource)


def gemm_rates(clock: Clock, dtype: torch.dtype, n: int, repeats: int = REPEATS) -> list[float]:
    """TFLOP/s of single n × n × n products into a buffer that is there already."""
    a, b, out = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(3))
    torch.mm(a, b, out=out)
    return [2e-12 * n**3 / clock.seconds(lambda: torch.mm(a, b, out=out)) for _ in range(repeats)]


def copy_rates(clock: Clock, size: int, repeats: int = REPEATS) -> list[float]:
    """GB/s, read and written, of single copies of `size` bytes."""
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return [2e-9 * source.nbytes / clock.seconds(lambda: target.copy_(source)) for _ in range(repeats)]


@torch.no_grad()
def ceilings(clock: Clock, dtypes: Sequence[str]) -> Ceilings:
    """Ceilings of the device of `clock` with the threads that are set now; a few seconds."""
    kind = clock.device.type
    best = {name: max(max(gemm_rates(clock, DTYPES[name], n)) for n in GEMM_SIZES[kind]) for name in dtypes}
    return Ceilings(best, max(copy_rates(clock, COPY_BYTES[kind])))

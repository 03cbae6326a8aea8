"""`longtake bench roofline`: this machine's ceilings, by size of the operands; the best of them are what shares refer
to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .bench_report import Report, table
from .bench_stage import Progress, staged
from .machine import DTYPES, named, place, precision
from .measure import Figure
from .roofline import Ceilings, copy_rates, gemm_rates


@dataclass(frozen=True)
class Sizes:
    """What is measured: n of n × n × n products, and bytes of copies, from small to large."""

    gemm: tuple[int, ...]
    copy_bytes: tuple[int, ...]


MICRO = Sizes((32, 64), (1 << 16, 1 << 18))
DEFAULT = {
    "cpu": Sizes((256, 512, 1024, 2048, 3072), (1 << 20, 16 << 20, 256 << 20)),
    "cuda": Sizes((1024, 2048, 4096, 8192), (16 << 20, 256 << 20, 2 << 30)),
}


@dataclass(kw_only=True)
class RooflineReport(Report):
    """The ceilings, also where every report has them (`ceilings`), and a figure for each size."""

    kind: ClassVar[str] = "roofline"

    gemm_tflops: dict[str, float]
    copy_gbs: float

    def own_lines(self) -> list[str]:
        found = [f"{dtype}: {rate:.4g} TFLOP/s at most" for dtype, rate in self.gemm_tflops.items()]
        return [*found, f"copies of the largest size: {self.copy_gbs:.4g} GB/s at most, read and written"]

    def own_tables(self) -> list[str]:
        rows = [(f"matrix products, {dtype}", f"{rate:.3g} TFLOP/s") for dtype, rate in self.gemm_tflops.items()]
        return [table(("ceiling", "best"), [*rows, ("copies, read and written", f"{self.copy_gbs:.3g} GB/s")])]


def run(
    shape: str = "default", *, dtypes: Sequence[str] = ("float32", "bfloat16"), repeats: int = 9,
    device: str | None = None, threads: int | None = None, force: bool = False, command: str = "",
    progress: Progress | None = None,
) -> RooflineReport:  # fmt: skip
    """Measure with the threads given. Raises LongtakeError for unknown names, and on a busy machine unless `force`."""
    where = place(device or ("cuda" if torch.cuda.is_available() else "cpu"), shape, f"{shape} --device cpu")
    sizes = named(shape, {"default": DEFAULT[where.type], "micro": MICRO})
    for name in dtypes:
        precision(name)
    options: dict[str, Any] = {"threads": threads, "force": force, "command": command, "progress": progress}
    with staged(where, dtypes[0], **options, ceilings=()) as stage:
        work = [(name, n) for name in dtypes for n in sizes.gemm]
        figures, best = [], dict.fromkeys(dtypes, 0.0)
        for done, (name, n) in enumerate(work):
            rates = gemm_rates(stage.clock, DTYPES[name], n, repeats)
            best[name] = max(best[name], *rates)
            figures.append(Figure.of(f"{name} product, {n} × {n} × {n}", "TFLOP/s", rates))
            stage.progress("products", done + 1, len(work))
        rates = []
        for done, size in enumerate(sizes.copy_bytes):
            rates = copy_rates(stage.clock, size, repeats)
            figures.append(Figure.of(f"copy of {size / (1 << 20):g} MiB", "GB/s", rates))
            stage.progress("copies", done + 1, len(sizes.copy_bytes))
        stage.head["ceilings"] = Ceilings(best, max(rates))
        return RooflineReport(
            **stage.head, shape={"name": shape, "gemm": list(sizes.gemm), "copy_bytes": list(sizes.copy_bytes)},
            settings=stage.settings | {"dtype": " and ".join(dtypes), "repeats": repeats}, figures=figures,
            gemm_tflops=best, copy_gbs=max(rates),
        )  # fmt: skip

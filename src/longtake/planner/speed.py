"""Seconds from ceilings: what a device multiplies and moves at most, given, measured or nominal.

A forward takes at least as long as its FLOPs at the ceiling of matrix products, and at least as long as its bytes at
the ceiling of copies; whichever is more. What comes out is a floor: no kernel reaches both, and what is not counted
(see `Anatomy.traffic` and `flops`; text encoder and video decoder) comes on top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LongtakeError
from .anatomy import Anatomy, Forward, by_chunk

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet has it: dense half-precision TFLOP/s, GB/s of memory, bytes of memory."""

    name: str
    about: str
    memory: int
    tflops: float
    bandwidth: float


# Nominal figures, none of them measured here: dense bf16 (fp16 for the T4) tensor-core rates with fp32 accumulation,
# without sparsity, and memory bandwidths, as NVIDIA's data sheets and architecture white papers state them: T4 (2019),
# A10 (2021), A40 (2020), L4 and L40S (2023), A100 (2021), H100 (2023), H200 (2024); GA102 white paper v2.1 for the RTX
# 3090, Ada white paper v2.1 for the RTX 4090, Blackwell RTX white paper v1.1 for the RTX 5090. Memory is in GiB.
CARDS = {
    card.name: card
    for card in (
        Card("t4", "Tesla T4 16 GB", 16 * GIB, 65, 320),
        Card("a10", "A10 24 GB", 24 * GIB, 125, 600),
        Card("l4", "L4 24 GB", 24 * GIB, 121, 300),
        Card("rtx-3090", "GeForce RTX 3090 24 GB", 24 * GIB, 71, 936),
        Card("rtx-4090", "GeForce RTX 4090 24 GB", 24 * GIB, 165.2, 1008),
        Card("rtx-5090", "GeForce RTX 5090 32 GB", 32 * GIB, 209.5, 1792),
        Card("a40", "A40 48 GB", 48 * GIB, 149.7, 696),
        Card("l40s", "L40S 48 GB", 48 * GIB, 362, 864),
        Card("a100-40gb", "A100 SXM 40 GB", 40 * GIB, 312, 1555),
        Card("a100", "A100 SXM 80 GB", 80 * GIB, 312, 2039),
        Card("h100", "H100 SXM 80 GB", 80 * GIB, 989.4, 3350),
        Card("h200", "H200 SXM 141 GB", 141 * GB, 989.4, 4800),
    )
}


@dataclass(frozen=True)
class Ceilings:
    """TFLOP/s of matrix products and GB/s of copies, and whence they are."""

    tflops: float | None
    bandwidth: float | None
    source: str

    def as_dict(self) -> dict[str, Any]:
        return {"tflops": self.tflops, "gb_per_second": self.bandwidth, "source": self.source}


def ceilings(
    card: Card | None = None, roofline: Path | None = None, tflops: float | None = None, bandwidth: float | None = None,
    itemsize: int = 2,
) -> Ceilings | None:  # fmt: skip
    """What is known of a device: given numbers before measured ones before a card's nominal ones; None if nothing is.
    `itemsize` says of which working numbers measured products are looked for.

    Raises LongtakeError for numbers that are no rates, and for a file without any."""
    for option, value in (("--tflops", tflops), ("--bandwidth", bandwidth)):
        if value is not None and not 0 < value < math.inf:
            raise LongtakeError(f"{option} {value:g}: give a finite number above 0")
    found = Ceilings(None, None, "")
    if card is not None:
        found = Ceilings(card.tflops, card.bandwidth, f"nominal: {card.about}, dense half precision")
    if roofline is not None:
        found = read(roofline, itemsize)
    if tflops is not None or bandwidth is not None:
        source = "given" if not found.source or (tflops and bandwidth) else f"given, else {found.source}"
        found = Ceilings(tflops or found.tflops, bandwidth or found.bandwidth, source)
    return None if found.tflops is None and found.bandwidth is None else found


def read(path: Path, itemsize: int = 2) -> Ceilings:
    """The measured ceilings that `longtake bench roofline` wrote down: `gemm_tflops`, by dtype, and `copy_gbs`, read
    and written. Raises LongtakeError for a file without them."""
    advice = "write it with `longtake bench roofline`"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LongtakeError(f"{path}: not readable as JSON ({error}); {advice}") from error
    data = data if isinstance(data, dict) else {}
    products, copies = data.get("gemm_tflops"), data.get("copy_gbs")
    by_dtype = products if isinstance(products, dict) else {"": products}
    wanted = {2: ("bfloat16", "float16"), 4: ("float32",)}.get(itemsize, ())
    rates = {name: rate for name, given in by_dtype.items() if (rate := _rate(given)) is not None}
    dtype = next((name for name in wanted if name in rates), max(rates, key=lambda name: rates[name], default=None))
    if dtype is None and _rate(copies) is None:
        raise LongtakeError(f"{path}: has neither gemm_tflops nor copy_gbs; {advice}")
    source = " ".join(("measured:", path.name, dtype or "")).strip()
    return Ceilings(None if dtype is None else rates[dtype], _rate(copies), source)


def _rate(value: Any) -> float | None:
    """A rate that was measured; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    return None


def predict(anatomy: Anatomy, forwards: Iterable[Forward], known: Ceilings | None) -> dict[str, Any]:
    """FLOPs, bytes and seconds of every chunk and of the take. Seconds are None where no ceiling is known."""
    rows: list[dict[str, Any]] = []
    for chunk, made in by_chunk(iter(forwards)).items():
        flops = sum(anatomy.flops(f).total * f.count for f in made)
        moved = sum(anatomy.traffic(f) * f.count for f in made)
        seconds: float | None = None
        if known is not None:
            seconds = sum(f.count * _least(anatomy.flops(f).total, anatomy.traffic(f), known) for f in made)
        rows.append(
            {"chunk": chunk, "forwards": sum(f.count for f in made), "flops": flops, "bytes": moved, "seconds": seconds}
        )
    total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in ("forwards", "flops", "bytes")}
    total["seconds"] = None if known is None else sum(row["seconds"] for row in rows)
    source = None if known is None else known.as_dict()
    return {"ceilings": source, "take": total, "last_chunk": rows[-1], "chunks": rows}


def _least(flops: int, moved: int, known: Ceilings) -> float:
    multiplying = flops / (known.tflops * 1e12) if known.tflops else 0.0
    moving = moved / (known.bandwidth * 1e9) if known.bandwidth else 0.0
    return max(multiplying, moving)

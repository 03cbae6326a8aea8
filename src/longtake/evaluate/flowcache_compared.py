"""Which arms of `longtake bench flowcache` are compared with each other, and how: paired by seed.

FlowCache with TeaCache at an equal share of reused steps; what is carried over; reuse and a compressed past together
with each alone, and their interaction: whether both at once harm more (or less) than the two harms add up to. Likeness
has no value for the take it is measured against, so its interaction is of errors, which are 0 there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .compare.statistics import holm, paired
from .flowcache_report import READ, Compared, QualityRow, known

Hits = dict[int, list[float]]

BOTH, KV, REUSE, NEITHER = (
    "flowcache slow, compressed", "compressed", "flowcache slow, two in flight", "none, two in flight",
)  # fmt: skip
PAIRS = (
    *((f"flowcache {speed}", f"teacache as {speed}") for speed in ("slow", "fast")),
    *((f"flowcache {speed}", f"flowcache {speed}, carry {carry}")
      for speed in ("slow", "fast") for carry in ("update", "residual")),
    *((f"flowcache {speed}, carry update", f"flowcache {speed}, carry residual") for speed in ("slow", "fast")),
    (BOTH, KV), (BOTH, REUSE),
)  # fmt: skip
LIKENESS: dict[str, Callable[[QualityRow], list[float]]] = {
    "PSNR": lambda row: row.psnr,
    "SSIM": lambda row: row.ssim,
    "PSNR continued": lambda row: row.continued_psnr,
    "SSIM continued": lambda row: row.continued_ssim,
}


def compared(rows: Sequence[QualityRow]) -> list[Compared]:
    """Every comparison whose arms are there, p values corrected within a measure."""
    by = {row.arm: row for row in rows}
    pairs = [(by[a], by[b]) for a, b in PAIRS if a in by and b in by]
    found = []
    for name, values in LIKENESS.items():
        found += _of(name, [(a.arm, b.arm, _single(values(a)), _single(values(b))) for a, b in pairs])
    for name in READ:
        told = [(a.arm, b.arm, by_seed(a.hits[name]), by_seed(b.hits[name])) for a, b in pairs if a.events]
        found += _of(name, told + _interaction_read(by, name))
    for name, values in LIKENESS.items():
        found += _of(f"error in {name}", _interaction_like(by, name, values))
    return found


def by_seed(outcomes: Sequence[Sequence[float]]) -> Hits:
    """Outcomes of each seed, as `compare.statistics` has them."""
    return {seed: list(values) for seed, values in enumerate(outcomes)}


def error(measure: str, value: float) -> float:
    """Of a likeness: the squared error as a share of the full range squared, for decibels; what is missing to 1."""
    return 10 ** (-value / 10) if measure.startswith("PSNR") else 1 - value


def _interaction_read(by: Mapping[str, QualityRow], name: str) -> list[tuple[str, str, Hits, Hits]]:
    if not {BOTH, KV, REUSE, NEITHER} <= by.keys() or not by[BOTH].events:
        return []
    both, kv, reuse, neither = (by[arm].hits[name] for arm in (BOTH, KV, REUSE, NEITHER))
    return [(f"{BOTH} + {NEITHER}", f"{KV} + {REUSE}", _sums(both, neither), _sums(kv, reuse))]


def _interaction_like(
    by: Mapping[str, QualityRow], name: str, values: Callable[[QualityRow], list[float]]
) -> list[tuple[str, str, Hits, Hits]]:
    if not {BOTH, KV, REUSE} <= by.keys():
        return []
    both, kv, reuse = ([[error(name, v)] for v in values(by[arm])] for arm in (BOTH, KV, REUSE))
    return [(BOTH, f"{KV} + {REUSE}", by_seed(both), _sums(kv, reuse))]


def _sums(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Hits:
    """Event by event: the returns of a scene are the same in every arm."""
    return by_seed([[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)])


def _single(values: Sequence[float]) -> Hits:
    return by_seed([[value] for value in values])


def _of(measure: str, pairs: Sequence[tuple[str, str, Hits, Hits]]) -> list[Compared]:
    results = [(a, b, *paired(x, y)) for a, b, x, y in pairs]
    corrected = holm([p for *_, p in results])
    return [
        Compared(measure, a, b, gap, known(within), p, q)
        for (a, b, gap, within, p), q in zip(results, corrected, strict=True)
    ]

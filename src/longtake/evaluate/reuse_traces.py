"""What reuse sees and does: how far chunks move from step to step, what is decided by that, and what theory says.

Two takes from the same noise. One computes everything and records the relative L1 of every step; the other follows the
reuse policy and records its decisions and accumulators. Beside the measured curves stands the closed form for Gaussian
data of standard deviation s (`longtake.reuse.theory`), with the s that comes closest to the measured ones: a fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LongtakeError
from ..hosts.base import Host
from ..named import spec
from ..reuse import Decision, FlowCacheReuse, ReusePolicy, parse
from ..reuse.theory import relative_l1, rises, steepest_power
from ..samplers.one_by_one import OneByOne
from ..session import Session
from .provenance import provenance, write_report

SCHEMA = 1
DEVIATIONS = (0.3, 0.6, 1.0)
CANDIDATES = tuple(np.geomspace(0.05, 5, 200).tolist())


@dataclass(frozen=True)
class ReuseReport:
    """Traces of one model: `moved` with everything computed, `decided` under the policy, one list per chunk."""

    model: str
    reuse: str
    metric: str
    levels: tuple[float, ...]  # noise levels of a chunk, before every step and after the last
    renoised: bool  # the sampler adds fresh noise after every step: the closed form is not of this
    moved: tuple[tuple[Decision, ...], ...]
    decided: tuple[tuple[Decision, ...], ...]
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def changes(self) -> np.ndarray:
        """Relative L1 [chunks, steps − 1]: entry k is the move from step k to step k + 1."""
        return np.array([[d.change for d in chunk[1:]] for chunk in self.moved], dtype=np.float64)

    def theory(self, s: float) -> list[float]:
        """The closed form of the moves between steps (the last one leads to no further step)."""
        return relative_l1(self.levels, s)[:-1]

    def fit(self) -> tuple[float, float] | None:
        """(s, R² of the logarithms) of the closed form closest to the mean of the chunks; None where it says nothing:
        a metric without latents, fresh noise, or moves of zero."""
        mean = self.changes().mean(0)
        if self.metric != "latent" or self.renoised or not (mean > 0).all() or len(mean) < 3:
            return None
        logs = np.log(mean)
        errors = [float(((np.log(self.theory(s)) - logs) ** 2).sum()) for s in CANDIDATES]
        best = int(np.argmin(errors))
        total = float(((logs - logs.mean()) ** 2).sum())
        return CANDIDATES[best], 1 - errors[best] / total if total else math.nan

    @property
    def reused(self) -> float:
        """Share of all steps."""
        steps = [d.reused for chunk in self.decided for d in chunk]
        return sum(steps) / len(steps)

    def as_dict(self) -> dict[str, Any]:
        changes, fit = self.changes(), self.fit()
        return {
            "schema": SCHEMA, "analysis": "reuse", "model": self.model, "reuse": self.reuse, "metric": self.metric,
            "settings": self.settings, "levels": list(self.levels), "fresh_noise_after_steps": self.renoised,
            "relative_l1": changes.tolist(), "rises": [rises(row) for row in changes.tolist()],
            "decisions": [[asdict(d) for d in chunk] for chunk in self.decided], "reused_share": self.reused,
            "closed_form": {f"{s:g}": self.theory(s) for s in DEVIATIONS},
            "closed_form_rises": {f"{s:g}": rises(self.theory(s)) for s in DEVIATIONS},
            "steepest_power": {f"{s:g}": steepest_power(s) for s in (0.0, *DEVIATIONS, 2.0)},
            "fit": None if fit is None else {"s": fit[0], "r2_of_logarithms": fit[1], "what": "a fit"},
            "provenance": self.provenance,
        }  # fmt: skip

    def text(self) -> str:
        changes, fit = self.changes(), self.fit()
        mean = changes.mean(0)
        up = sum(rises(row) for row in changes.tolist())
        lines = [
            f"{self.model}: {len(self.moved)} chunks of {len(self.levels) - 1} steps, metric {self.metric}",
            f"  relative L1 per step: {mean.min():.4g} … {mean.max():.4g}, rises throughout in {up} of {len(changes)}",
            f"  {self.reuse} reuses {self.reused:.1%} of the steps",
        ]
        if fit is not None:
            lines.append(f"  closed form of Gaussian data, fitted: s = {fit[0]:.3g}, R² {fit[1]:.3f} of the logarithms")
        elif self.renoised:
            lines.append("  fresh noise after every step: the closed form is not of this sampler")
        else:
            lines.append(f"  the closed form speaks of latents, not of the metric {self.metric!r}")
        return "\n".join(lines)

    def write(self, folder: Path, stem: str = "reuse") -> list[Path]:
        """`stem`.json and the figures in `folder`. Raises LongtakeError if they cannot be written."""
        from .reuse_figures import figures

        return write_report(folder, stem, json.dumps(self.as_dict()), figures(self))


def measure(
    host: Host, prompt: str | None = None, *, reuse: ReusePolicy | str = "flowcache:slow", metric: str | None = None,
    chunks: int = 4, **options: Any,
) -> ReuseReport:  # fmt: skip
    """Run both takes. `metric` says what is traced, default what the policy measures; options go to the session.

    Raises LongtakeError if neither the policy nor the caller names a metric."""
    policy = (parse(reuse) if isinstance(reuse, str) else reuse).for_model(host.reuse_preset)
    metric = metric or policy.measure()
    if metric is None:
        raise LongtakeError(f"{spec(policy)} measures nothing: say what is to be traced with metric= (or --metric)")
    if metric != policy.measure() and hasattr(policy, "metric"):
        policy = replace(policy, metric=metric)  # type: ignore[call-arg]
    if chunks < 1:
        raise LongtakeError(f"{chunks} chunks: give at least 1")
    options = {"decode": False, "chunks": chunks, **options} | ({} if prompt is None else {"prompt": prompt})
    everything = FlowCacheReuse(0.0, metric, warmup=0, last="none", rescale="identity")
    first = Session(host, reuse=everything, **options)
    moved = tuple(chunk.stats.decisions for chunk in first)
    decided = tuple(chunk.stats.decisions for chunk in Session(host, reuse=policy, **options))
    turns = first.rollout.turns()
    levels: tuple[float, ...] = (*(turn.sigma for turn in turns), turns[-1].next_sigma)
    if levels[0] < levels[-1]:  # hosts whose time runs from noise to data
        levels = tuple(1 - level for level in levels)
    if len(levels) < 4:
        raise LongtakeError(f"{len(levels) - 1} steps per chunk are too few to trace: use --steps 3 or more")
    told = {"prompt": prompt, "chunks": chunks, "policy": spec(first.policy)}
    return ReuseReport(
        host.name, spec(policy), metric, levels, isinstance(first.rollout, OneByOne), moved, decided, told,
        provenance(host.device),
    )  # fmt: skip


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values."""
    some = [v for v in values if v > 0] or [1e-3]
    return min(some) / 2, max(some) * 2

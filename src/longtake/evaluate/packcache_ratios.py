"""How much faster a packed history is than its baselines, with intervals, at every length that was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..planner.lumos import CostModel
from .bench_report import Missing
from .measure import LEVEL
from .packcache_prediction import Calibration
from .packcache_report import ArmRun, Ratio

RESAMPLES = 2_000


def ratios(
    arms: Mapping[str, ArmRun], own: str, lengths: Sequence[tuple[int, int]], cost: CostModel, calibration: Calibration,
    budget: float | None,
) -> tuple[list[Ratio], list[Missing]]:  # fmt: skip
    """Of every length (pixel frames, latent frames) and baseline; `budget` is the packed history in frames, None if it
    is no such history: then nothing is predicted. Lengths that an arm did not reach are missing."""
    mine, found, missing = arms[own], [], []
    drawn = {name: resampled(arm, seed) for seed, (name, arm) in enumerate(arms.items())}
    for pixels, latent in lengths:
        n = latent - 1
        for name, arm in arms.items():
            if name == own:
                continue
            if short := [each for each in (own, name) if len(arms[each].seconds) < n]:
                reason = f"{short[0]} made {len(arms[short[0]].seconds)} of {n} latent frames"
                missing.append(Missing(f"ratio to {name} at {pixels} pixel frames", reason))
                continue
            full, packed = drawn[name][:, :n], drawn[own][:, :n]
            row = Ratio(
                pixels, latent, name, sum(arm.seconds[:n]) / sum(mine.seconds[:n]),
                arm.seconds[n - 1] / mine.seconds[n - 1],
                _interval(full.sum(1) / packed.sum(1)), _interval(full[:, -1] / packed[:, -1]),
                (sum(arm.clock_seconds[:n]) / sum(mine.clock_seconds[:n]),
                 arm.clock_seconds[n - 1] / mine.clock_seconds[n - 1]),
            )  # fmt: skip
            if budget is not None:
                row.counted = cost.budget_speedup(latent, budget, 1.0)
                row.predicted = calibration.speedup(latent, budget) if calibration.known else None
            found.append(row)
    return found, missing


def resampled(arm: ArmRun, seed: int = 0) -> np.ndarray:
    """Seconds of every frame [resamples, frames], its forwards drawn again with replacement; what lies between them is
    as it was."""
    rng = np.random.default_rng(seed)
    frames = []
    for forwards, count, rest in zip(arm.forwards, arm.forward_counts, arm.between, strict=True):
        values = np.asarray(forwards)
        drawn = values[rng.integers(0, len(values), (RESAMPLES, len(values)))]
        frames.append(rest + count * np.median(drawn, axis=1))
    return np.stack(frames, 1) if frames else np.zeros((RESAMPLES, 0))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)

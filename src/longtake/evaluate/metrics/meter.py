"""All measures of one clip, taken piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...zoo.readback import clock_steps
from . import light, motion, repetition
from .definitions import DEFINITIONS
from .trend import Trend, trend

Reader = Callable[[np.ndarray], np.ndarray]


class Meter:
    """Takes the frames of a clip as they come, keeps numbers and thumbnails of them.

    `clock` reads the hand of a procedural world's clock in turns from frames, `turn` is the lawful number of frames for
    one turn; without them nothing is said of a world.
    """

    def __init__(self, fps: float, clock: Reader | None = None, turn: int = 1) -> None:
        self.fps, self.clock, self.turn = fps, clock, turn
        self._past: np.ndarray | None = None  # the last two frames
        self._found: dict[str, list[np.ndarray]] = {}
        self._small: list[np.ndarray] = []

    def add(self, frames: np.ndarray) -> None:
        """The next frames, uint8 [T, H, W, 3]."""
        past = frames[:0] if self._past is None else self._past
        both = np.concatenate([past, frames])
        found = {
            "brightness": light.brightness(frames), "contrast": light.contrast(frames),
            "sharpness": light.sharpness(frames), "flicker": light.flicker(both),
            "motion": motion.speeds(both[max(0, len(past) - 1) :], self.fps),
        }  # fmt: skip
        if self.clock is not None:
            found["clock"] = self.clock(frames)
        for name, values in found.items():
            self._found.setdefault(name, []).append(values)
        self._small.append(repetition.thumbnails(frames))
        self._past = both[-2:]

    def frames(self) -> dict[str, Any]:
        """Every measure over time, as JSON values: `per_frame` (None where there is none), and likeness over lags."""
        joined = {name: np.concatenate(parts) for name, parts in self._found.items()}
        total = len(joined["brightness"])
        pad = {"flicker": (1, 1), "motion": (1, 0)}
        per_frame = {}
        for name, values in joined.items():
            before, after = pad.get(name, (0, 0)) if len(values) < total else (0, 0)
            listed = [None] * before + [_rounded(value) for value in values] + [None] * after
            per_frame[name] = listed[:total] + [None] * (total - len(listed))
        likeness = repetition.similarity(np.concatenate(self._small))
        return {
            "fps": self.fps, "per_frame": per_frame,
            "repetition": {"lags": list(range(len(likeness))), "similarity": [_rounded(value) for value in likeness]},
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """The clip's measures by the names of `DEFINITIONS`, as JSON values; None where it is too short for one."""
        joined = {name: np.concatenate(parts) for name, parts in self._found.items()}
        sharp = trend(joined["sharpness"], self.fps)
        percent = 100 / sharp.mean if sharp is not None and sharp.mean > 0 else 1.0
        mean = lambda values: _rounded(float(values.mean())) if len(values) else None
        found: dict[str, Any] = {
            "brightness_drift": _told(trend(joined["brightness"], self.fps), "brightness_drift"),
            "contrast_drift": _told(trend(joined["contrast"], self.fps), "contrast_drift"),
            "sharpness_drift": _told(sharp, "sharpness_drift", percent),
            "flicker": mean(joined["flicker"]), "dynamic_degree": mean(joined["motion"]),
        }  # fmt: skip
        again = repetition.repetition(repetition.similarity(np.concatenate(self._small)), self.fps)
        found["repetition"] = None if again is None else _rounded(again)
        if "clock" in joined:
            found["clock_lawful"] = mean(lawful_steps(joined["clock"], self.turn))
        return found


def lawful_steps(hand: np.ndarray, turn: int) -> np.ndarray:
    """Whether the hand of a clock, in turns [T], moved into each frame by one lawful step of 1 / `turn`, give or take
    one: [T − 1] of 0 and 1."""
    return (np.abs(clock_steps(hand) * turn - 1.0) < 1.0).astype(float)


def _told(found: Trend | None, name: str, scale: float = 1.0) -> dict[str, Any] | None:
    if found is None:
        return None
    interval = None
    if found.low is not None and found.high is not None:
        interval = [_rounded(found.low * scale), _rounded(found.high * scale)]
    return {"slope": _rounded(found.slope * scale), "ci95": interval, "unit": DEFINITIONS[name].unit}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

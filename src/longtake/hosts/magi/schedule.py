"""When a MAGI-1 chunk is where: times from noise (0) to data (1), step sizes, guidance by time, KV ranges.

u = k/N,  y = u²,  t = y / (s − (s − 1)·y)       shift s = 3;  x += (t[k+1] − t[k])·v
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LongtakeError

UNLIMITED_CLEAN = 8  # chunks a given one sees when neither of the two ranges is limited


@dataclass(frozen=True)
class MagiSettings:
    """How a MAGI-1 checkpoint is run. Defaults: 4.5B base; names are the published ones where there is one."""

    num_steps: int = 32
    window_size: int = 4  # chunks in flight
    shift: float = 3.0
    distill: bool = False  # the model takes its step size as a second time
    cfg_number: int = 3  # passes: 3 for three-way guidance, 1 for none
    cfg_t_range: tuple[float, ...] = (0.0, 0.0217, 0.1, 0.3, 0.999)
    prev_chunk_scales: tuple[float, ...] = (1.5, 1.5, 1.5, 1.0, 1.0)
    text_scales: tuple[float, ...] = (7.5, 7.5, 7.5, 0.0, 0.0)
    noise2clean_kvrange: tuple[int, ...] = (5, 4, 3, 2)  # chunks seen, itself included, by progress; (): all
    clean_chunk_kvrange: int = 1  # the same for given chunks, and for finished ones; −1: as if they went on
    clean_t: float = 0.9999  # time of the clean pass
    nearly_clean: bool = True  # distilled: blend in a pass that sees the chunk alone, once it is nearly clean
    nearly_clean_after: float = 0.3  # in time
    nearly_clean_weight: float = 0.7  # of the pass with history
    scale_factor: float = 0.18215  # of VAE latents
    special_tokens: tuple[str, ...] = ("hq", "duration")  # put before the prompt, the last one first
    null_tokens: int = 50  # of the learned null caption, attended to by passes without text

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.window_size < 1 or self.num_steps % self.window_size:
            raise LongtakeError(
                f"{self.num_steps} steps with {self.window_size} chunks in flight: use a multiple of "
                f"{self.window_size} steps, so that every stage has as many"
            )
        if self.cfg_number not in (1, 3) or (self.distill and self.cfg_number != 1):
            raise LongtakeError(
                f"cfg_number {self.cfg_number}: a base model takes 3 (three-way guidance) or 1, a distilled one 1"
            )
        if self.noise2clean_kvrange and self.num_steps % len(self.noise2clean_kvrange):
            raise LongtakeError(
                f"{len(self.noise2clean_kvrange)} KV ranges for {self.num_steps} steps: their number must divide it"
            )
        if len({len(self.cfg_t_range), len(self.prev_chunk_scales), len(self.text_scales)}) > 1:
            raise LongtakeError("cfg_t_range, prev_chunk_scales and text_scales must be of one length")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> MagiSettings:
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**given)

    @classmethod
    def published(cls, path: Path) -> tuple[MagiSettings, dict[str, Any], dict[str, Any]]:
        """Settings, model configuration and the rest of the run-time part of one of the authors' own config files.

        Raises LongtakeError for a file that is none, or of a variant that is not supported."""
        try:
            whole = json.loads(path.read_text())
            model, run, engine = (dict(whole[f"{part}_config"]) for part in ("model", "runtime", "engine"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LongtakeError(f"{path}: not a MAGI-1 configuration ({error})") from error
        if model.get("gated_linear_unit") or model.get("half_channel_vae"):
            raise LongtakeError(f"{path}: MAGI-1 24B is not supported, use a 4.5B checkpoint")
        if engine.get("fp8_quant"):
            raise LongtakeError(f"{path}: fp8 weights are not supported, use the base or distill checkpoint")
        given = {**run, "distill": engine.get("distill", False)}
        if "distill_nearly_clean_chunk_threshold" in engine:
            given["nearly_clean_after"] = engine["distill_nearly_clean_chunk_threshold"]
        return cls.of(given), model, run

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    # --- times ------------------------------------------------------------------------------------------------------

    @property
    def stage_steps(self) -> int:
        """Steps after which a new chunk enters."""
        return self.num_steps // self.window_size

    def times(self) -> tuple[float, ...]:
        """The num_steps + 1 times, in fp32 as the model sees them: the 0.3 of even schedules is a hair above 0.3."""
        return tuple(times(self.num_steps, self.shift).tolist())

    def intervals(self) -> tuple[float, ...]:
        """Relative size of each step: 12 steps skip every third index of 16, all others are even."""
        return (2.0, 1.0, 1.0) * (self.num_steps // 3) if self.num_steps == 12 else (1.0,) * self.num_steps

    def step_size(self, step: int) -> float | None:
        """The distilled model's second time input at denoising step `step`; a clean pass has the step's of the chunks
        it runs with."""
        if not self.distill:
            return None
        return 2 * 4 / self.intervals()[step] if self.num_steps == 12 else 2 * self.num_steps / 4

    def nearly_clean_at(self, t: float) -> bool:
        """Whether the oldest chunk in flight, at time `t`, is also run alone."""
        return self.distill and self.nearly_clean and t > self.nearly_clean_after

    # --- guidance and visibility ------------------------------------------------------------------------------------

    def guidance(self, t: float) -> tuple[float, float]:
        """(p, τ) at time `t`: v = (1 − p)·alone + (p − τ)·history + τ·history and text."""
        at = max(i for i, start in enumerate(self.cfg_t_range) if i == 0 or t >= start)
        return self.prev_chunk_scales[at], self.text_scales[at]

    def kv_range(self, step: int) -> int | None:
        """How many chunks, itself included, a chunk sees at denoising step `step`; None: all."""
        ranges = self.noise2clean_kvrange
        if not ranges:
            return None
        return ranges[min(step, self.num_steps - 1) // (self.num_steps // len(ranges))]

    def clean_range(self, given: bool = False) -> int | None:
        """The same for the pass over a finished chunk, or over one that is given."""
        if not given and not self.noise2clean_kvrange:
            return None
        if self.clean_chunk_kvrange > 0:
            return self.clean_chunk_kvrange
        return self.noise2clean_kvrange[-1] if self.noise2clean_kvrange else UNLIMITED_CLEAN


def times(num_steps: int, shift: float = 3.0) -> Tensor:
    """Times [num_steps + 1] in fp32 from noise (0) to data (1)."""
    if num_steps == 12:  # three of every four of the 16-step table's intervals, the first one double
        index = torch.tensor([i for i in range(17) if i % 4 != 1])
        return times(16, shift)[index]
    y = torch.linspace(0, 1, num_steps + 1) ** 2
    return y / (shift - (shift - 1) * y)


BASE_4_5B = MagiSettings()
DISTILL_4_5B = MagiSettings(num_steps=16, distill=True, cfg_number=1)

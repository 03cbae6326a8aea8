"""UniPC (order 2, bh2, predicting x0) for one chunk, by diffusers' own scheduler.

SkyReels-V2 keeps one scheduler per latent frame. The frames of a chunk step together and every operation is elementwise
with scalar coefficients, so one scheduler per chunk computes the same bits.

The published pipelines (SkyReels-V2's and diffusers') hand the scheduler a view of the latents and write its answer
into the same memory. The scheduler remembers that view as the first step's starting point, so the first corrector
starts from where that step ended instead. `compat="upstream"` does the same; "fixed" is UniPC as it was meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from ..errors import LongtakeError

_NUMBERS = ("lower_order_nums", "this_order", "_step_index")


class UniPC:
    """`levels` are shifted noise levels σ, noisiest first, the last one 0."""

    def __init__(self, levels: Sequence[float], compat: str = "fixed") -> None:
        if levels[-1] != 0:
            raise LongtakeError(f"UniPC ends at noise level 0, not at {levels[-1]}")
        # shift 1 leaves the levels as they are
        scheduler: Any = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
        )
        scheduler.set_timesteps(sigmas=np.array(levels[:-1], dtype=np.float64))
        scheduler.set_begin_index(0)  # timesteps are whole numbers and may repeat: count, do not look them up
        self.scheduler, self.compat = scheduler, compat

    def step(self, velocity: Tensor, x: Tensor) -> Tensor:
        at = self.scheduler.step_index or 0
        out = self.scheduler.step(velocity, self.scheduler.timesteps[at], x, return_dict=False)[0]
        if at == 0 and self.compat == "upstream":
            self.scheduler.last_sample = out
        return out

    def skip(self) -> None:
        """The next step is of first order again, and nothing is corrected: the outputs of before are of another way."""
        s = self.scheduler
        s._step_index = (s.step_index or 0) + 1
        s.model_outputs, s.last_sample, s.lower_order_nums = [None] * len(s.model_outputs), None, 0

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        s = self.scheduler
        held = {"last": s.last_sample, **{f"output{i}": x for i, x in enumerate(s.model_outputs)}}
        numbers = {name: getattr(s, name, None) for name in _NUMBERS}
        return {name: x for name, x in held.items() if x is not None}, numbers

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        s = self.scheduler
        s.last_sample = tensors.get("last")
        s.model_outputs = [tensors.get(f"output{i}") for i in range(len(s.model_outputs))]
        for name in _NUMBERS:
            if meta[name] is not None:
                setattr(s, name, meta[name])

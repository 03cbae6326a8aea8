"""Triton kernels for what the history does between two layers: gather and rotate, and attention that reads a quantised
past where it lies. Each says the same as PyTorch operations in `history/`, which run wherever Triton does not.

Nothing here imports Triton until a history is told to use it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import LongtakeError

if TYPE_CHECKING:
    from ..rope import RotaryTable

KERNELS = ("triton",)
FP8_CAPABILITY = (8, 9)  # the first CUDA devices that convert fp8 themselves


def check(kernels: str | None, device: torch.device, history_dtype: str | None = None) -> bool:
    """Whether kernels are asked for. Raises LongtakeError, with advice, if they cannot run on `device`."""
    if kernels is None:
        return False
    if kernels not in KERNELS:
        raise LongtakeError(f"kernels {kernels!r}: use one of {', '.join(KERNELS)}, or leave it out for PyTorch alone")
    if find_spec("triton") is None:
        raise LongtakeError("kernels='triton' needs the triton package: pip install triton, or leave kernels out")
    from triton import knobs

    if knobs.runtime.interpret:
        return True
    if device.type != "cuda":
        raise LongtakeError(f"kernels='triton' needs a CUDA device, this model is on {device.type}: leave kernels out")
    if history_dtype == "fp8" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise LongtakeError(
            f"kernels='triton' reads fp8 on devices of capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or later: "
            "use history_dtype='int8', or leave kernels out"
        )
    return True


def gather_rotate(
    source: Tensor, scale: Tensor | None, rows: Tensor, phases: Tensor | None, rotary: RotaryTable, out: Tensor
) -> None:
    """Rows of `source` [B, R, H, D], times their `scale` [B, R, H], turned by `phases`, into `out` [B, n, H, D].

    `rows` [n] and `phases` [n, P, 2], or per take [B, n] and [B, n, 1, P, 2]; phases None: not turned (values).
    """
    from .gather import launch

    launch(source, scale, rows, phases, rotary, out)


def attend_history(
    q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], rows: Tensor, phases: Tensor,
    rotary: RotaryTable, k_tail: Tensor, v_tail: Tensor,
) -> Tensor:  # fmt: skip
    """Attention of rotated q [B, Nq, Hq, D] to the rows [n] of a quantised store, turned by phases [n, P, 2], and to
    the tail [B, m, Hk, D], which is rotated already. `keys` and `values` are codes [B, R, Hk, D] with scales
    [B, R, Hk]. The output is of q's dtype."""
    from .quantised_attention import launch

    return launch(q, keys, values, rows, phases, rotary, k_tail, v_tail)

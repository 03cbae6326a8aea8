"""Quantised storage forms of a history: int8, and fp8 (e4m3), the keys or values of each token and head under a scale
of their own.

    scale = max |x| / largest,   code = round(x / scale),   x ≈ code · scale       over the channels of a token's head

Keys are quantised as they are stored, before rotation, so a code never depends on where a policy puts its token. A
scale is fp32: in bf16 it alone would be off by 0.4 %, as much as an int8 code is of the largest channel. What is not
finite stays so, in its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LongtakeError

SCALE_BYTES = 4


@dataclass(frozen=True)
class Quantised:
    """One storage form: codes lie in memory as `codes`, and are read as `number`."""

    name: str
    codes: torch.dtype
    number: torch.dtype
    largest: float

    def head_bytes(self, head_dim: int) -> int:
        """Bytes of one token's keys, or values, of one head: its codes and their scale."""
        return head_dim * self.codes.itemsize + SCALE_BYTES

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [..., D] and scales [...] of x [..., D]."""
        x = x.float()
        scale = x.abs().amax(-1) / self.largest
        scaled = x / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        scaled = scaled.clamp_(-self.largest, self.largest)  # a scale that was rounded down
        codes = scaled.round_().to(self.codes) if self.codes == self.number else scaled.to(self.number).view(self.codes)
        return codes, scale

    def unpack(self, codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """What codes [..., D] and scales [...] stand for, written into `out` [..., D]; a code is exact in every dtype
        of `out`, its product with the scale is rounded once."""
        return out.copy_(codes.view(self.number)).mul_(scale.unsqueeze(-1))


FORMS = {
    form.name: form
    for form in (
        Quantised("int8", torch.int8, torch.int8, 127.0),
        # bytes in memory: indexing and copying know no fp8 on some devices, conversion they all know
        Quantised("fp8", torch.uint8, torch.float8_e4m3fn, 448.0),
    )
}


def storage_form(history_dtype: str | None) -> Quantised | None:
    """The form of a name; None keeps keys and values as they are computed. Raises LongtakeError for another name."""
    if history_dtype is None:
        return None
    if history_dtype not in FORMS:
        raise LongtakeError(
            f"history_dtype {history_dtype!r}: use one of {', '.join(FORMS)}, or leave it out to keep the model's dtype"
        )
    return FORMS[history_dtype]

"""Rolling-Forcing's anchor (arXiv 2509.25161) as far as it is a KV policy: the first frames stand right before the
working frames at every chunk, instead of ever further away.

The method itself denoises five chunks at once at staggered noise levels, behind the anchor and at most three cached
frames: 21 frames of keys. With chunks denoised one by one the same 21 frames are the anchor, 15 of history and the
chunk. Its clean pass, which puts the anchor at position 0 and then loses it, is not imitated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .sliding_window import SlidingWindow


@dataclass(frozen=True)
class RollingForcing(SlidingWindow):
    """An anchor of 3 frames packed against the newest frames; 21 frames in all."""

    frames: int = 21
    sink: int = 3
    positions: str = "slots"  # what is recent lies without a gap before the chunk, so only the anchor moves

    name: ClassVar[str] = "rolling-forcing"

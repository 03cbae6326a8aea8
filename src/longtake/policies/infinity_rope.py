"""Infinity-RoPE (arXiv 2511.20649), training-free: a small window at slots, so that no position ever exceeds it; on a
new prompt the window is flushed down to the first frame and the last two, and for a hard cut the first chunk of the new
scene stands far off in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .sliding_window import SlidingWindow


@dataclass(frozen=True)
class InfinityRope(SlidingWindow):
    """One sink frame and the newest five of history and chunk, at slots; a new prompt flushes."""

    frames: int = 6
    sink: int = 1
    positions: str = "slots"

    name: ClassVar[str] = "infinity-rope"
    prompt_switch: ClassVar[str] = "flush"

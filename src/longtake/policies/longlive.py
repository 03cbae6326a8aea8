"""LongLive (arXiv 2509.22622): the first frames for ever, a short window of the newest, and on a new prompt a recache:
the window's keys and values are computed anew from their latents under the new prompt.

The original recaches the whole window at once, so that its frames see each other in both directions, and throws the
first ones away again behind the sink; here the chunks are recached one after the other, as they were generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .sliding_window import SlidingWindow


@dataclass(frozen=True)
class LongLive(SlidingWindow):
    """A sink of 3 frames and a window of 12 in all, absolute positions; a new prompt recaches the window."""

    frames: int = 12
    sink: int = 3
    positions: str = "absolute"  # "slots" is its relative variant

    name: ClassVar[str] = "longlive"
    prompt_switch: ClassVar[str] = "recache"

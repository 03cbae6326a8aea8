"""What a new prompt does to a take's past: four named ways.

keep      nothing: the past stays as it was generated, and the new prompt has to win against it
recache   the chunks that are held get their keys and values anew from their latents, under the new prompt
          (LongLive, chunk by chunk)
flush     all but the take's beginning and its very end is forgotten (Infinity-RoPE; `KVPolicy.flush` says what)
cut       flush, and the first chunk of the new scene stands far off in time, as after a hard cut
"""

from __future__ import annotations

from .errors import LongtakeError

SWITCHES = ("keep", "recache", "flush", "cut")
CUT_FRAMES = 42  # Infinity-RoPE: three frames at 0, 1, 2, and the first chunk of a new scene at 45


def check_switch(mode: str) -> str:
    """The mode, if it is one. Raises LongtakeError."""
    if mode not in SWITCHES:
        raise LongtakeError(f"prompt switch {mode!r}: use one of {', '.join(SWITCHES)}")
    return mode

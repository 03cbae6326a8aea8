"""The sliding window as a list of frames from which the oldest is thrown away, one at a time."""

from collections.abc import Sequence


def window(spans: Sequence[int], frames: int, sink: int) -> list[list[int]]:
    """Frames seen by each chunk, when chunks of `spans` frames follow one another."""
    kept: list[int] = []
    seen = []
    for span in spans:
        while len(kept) + span > frames:
            kept.remove(min(f for f in kept if f >= sink))
        seen.append(list(kept))
        now = sum(spans[: len(seen) - 1])
        kept += range(now, now + span)
    return seen

"""Which videos travel inside a page: whole groups that are watched side by side, up to a size; others are linked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .files import Take
from .text import kept

CAP = 32 * 2**20  # bytes of MP4 within one page; base64 makes a third more of them


@dataclass
class Videos:
    """What the pages of one file hold, of at most `cap` bytes."""

    cap: int = CAP
    parts: list[str] = field(default_factory=list)  # of the page
    embedded: int = 0
    linked: int = 0
    bytes: int = 0  # of the embedded ones

    def add(self, groups: Iterable[list[Take]]) -> dict[str, dict[str, object]]:
        """How the page finds the video of each take, by key: `src` where it is linked. A group fits whole, or is
        linked whole: half of it would not be a comparison."""
        told: dict[str, dict[str, object]] = {}
        for group in groups:
            sizes = {take.key: take.video.stat().st_size for take in group if take.video is not None}
            fits = self.bytes + sum(sizes.values()) <= self.cap
            for take in group:
                if take.video is None:
                    continue
                told[take.key] = {"bytes": sizes[take.key]}
                if fits:
                    self.parts.append(kept(f"mp4-{take.key}", take.video.read_bytes()))
                    self.bytes += sizes[take.key]
                    self.embedded += 1
                else:
                    told[take.key]["src"] = f"cells/{take.key}/{take.video.name}"
                    self.linked += 1
        return told

    def sentence(self) -> str:
        """What a reader has to know before moving the file."""
        if not self.embedded and not self.linked:
            return "No videos: none were found beside this file when it was made."
        size, cap = f"{self.bytes / 2**20:.1f} MiB", f"{self.cap / 2**20:.3g} MiB"
        if not self.linked:
            return f"All {self.embedded} videos are inside this file ({size} of at most {cap})."
        return (
            f"{self.embedded} videos are inside this file ({size} of at most {cap}); {self.linked} more are links "
            "into the folder cells beside it, and play only while that folder stays there."
        )

"""The published families of checkpoints: how each is run, and how its files are named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LongtakeError

if TYPE_CHECKING:
    from ..base import HostConfig


@dataclass(frozen=True)
class Family:
    """How one published family of checkpoints is run. Frames are latent; timesteps are nominal, before `shift`."""

    ema: bool
    """Which of the file's two sets its authors sample from: `generator_ema` or `generator`."""
    chunk_frames: int = 3
    timesteps: tuple[int, ...] = (1000, 750, 500, 250)
    training_frames: int = 21
    window: int | None = None
    """Frames attended, sink and current chunk included; None: all that were generated."""
    sink: int = 0
    note: str | None = None
    skyreels: str | None = None
    """Of SkyReels-V2 diffusion forcing, the size: the transformer is Wan's with a frame-rate embedding (1.3B only)."""

    @property
    def host(self) -> str:
        return "wan" if self.skyreels is None else "skyreels"

    def config(self) -> HostConfig:
        """The settings a host runs it with."""
        if self.skyreels is not None:
            from ..skyreels import settings

            return settings(self.skyreels, {"num_layers": 30 if "1.3b" in self.skyreels else 40})
        from ..base import HostConfig  # comes with torch, which the table below does not need

        return HostConfig(
            causal=True, chunk_frames=self.chunk_frames, timesteps=self.timesteps,
            training_frames=self.training_frames, window=self.window, sink=self.sink,
        )  # fmt: skip


FAMILIES: dict[str, Family] = {
    "self-forcing": Family(ema=True),
    "causal-forcing": Family(ema=False),
    "causal-forcing-framewise": Family(
        ema=True,
        chunk_frames=1,
        note="the 1- and 2-step files use timesteps [1000] and [1000, 500] after a first chunk of 4 steps; "
        "longtake.json says 4 steps for every chunk",
    ),
    "longlive": Family(
        ema=False,
        training_frames=240,
        window=12,
        sink=3,
        note="longlive_base.pt alone was trained on 21 frames; the published model is base + lora.pt",
    ),
    "rolling-forcing": Family(
        ema=True,
        timesteps=(1000, 800, 600, 400, 200),
        training_frames=27,
        window=21,
        sink=3,
        note="trained to denoise five chunks at staggered noise levels; longtake.json runs one chunk at a time",
    ),
    "skyreels-v2-df-1.3b": Family(ema=False, skyreels="1.3b-540p"),
    "skyreels-v2-df-14b": Family(ema=False, skyreels="14b-540p"),
    "skyreels-v2-df-14b-720p": Family(ema=False, skyreels="14b-720p"),
}


def family_of(source: Path, family: str | None) -> tuple[str, Family]:
    """The family asked for, or the only one that the file's name spells out, or that its folder's and its own do."""
    known = ", ".join(FAMILIES)
    if family is not None:
        if family not in FAMILIES:
            raise LongtakeError(f"unknown family {family!r}; pass --family with one of {known}")
        return family, FAMILIES[family]
    path = source.absolute()
    for text in (path.name, f"{path.parent.name} {path.name}"):
        if len(found := _named_families(text)) == 1:
            return found[0], FAMILIES[found[0]]
    raise LongtakeError(f"the name {source.name} does not tell the family; pass --family with one of {known}")


def _named_families(text: str) -> list[str]:
    """Families that a file (and folder) name spells out. LongLive 2 is another model and is none of them."""
    text = re.sub(r"[-_. ]", "", text.lower())
    found = [name for name in ("self-forcing", "rolling-forcing") if name.replace("-", "") in text]
    if size := re.search(r"skyreelsv2df(13|14)b(540p|720p)?", text):
        found.append("skyreels-v2-df-1.3b" if size[1] == "13" else f"skyreels-v2-df-14b{'-720p' * (size[2] == '720p')}")
    if "longlive" in text and "longlive2" not in text:
        found.append("longlive")
    if "causalforcing" in text:
        kinds = {"chunkwise": "causal-forcing", "framewise": "causal-forcing-framewise"}
        found += [name for kind, name in kinds.items() if kind in text]
    return found

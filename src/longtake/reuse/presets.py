"""What "slow" and "fast" mean for each model: metric, warm-up, forced last step, rescaling and thresholds, as data.

Sources: FlowCache's shipped settings for MAGI-1 and SkyReels-V2. Its SkyReels polynomials are TeaCache's for Wan2.1,
highest degree first; they fall below zero outside the range they were fitted in, see `Rescale`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LongtakeError

POLYNOMIALS: dict[str, tuple[float, ...]] = {
    "identity": (1.0, 0.0),
    "wan2.1-1.3b": (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
    "wan2.1-14b": (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
    # fitted for the time embedding before its projection, which is not what "timestep" measures: published runs without
    # a long warm-up use them all the same
    "wan2.1-1.3b-embedding": (2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1),
    "wan2.1-14b-embedding": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
}


@dataclass(frozen=True)
class Preset:
    """`last`: "chunk" computes every chunk's last step, "take" only the last step of the whole take."""

    metric: str
    warmup: int
    last: str
    rescale: str
    slow: float
    fast: float
    tea_slow: float
    tea_fast: float

    def threshold(self, name: str, joint: bool = False) -> float:
        return {"slow": self.tea_slow, "fast": self.tea_fast}[name] if joint else getattr(self, name)


PRESETS: dict[str, Preset] = {
    # TeaCache's thresholds for MAGI-1 are not published: these give its reported FLOPs
    "magi": Preset("latent", 5, "take", "identity", 0.01, 0.015, 0.01, 0.02),
    "skyreels": Preset("timestep", 5, "chunk", "wan2.1-1.3b", 0.10, 0.15, 0.10, 0.15),
    "skyreels-14b": Preset("timestep", 5, "chunk", "wan2.1-14b", 0.10, 0.15, 0.10, 0.15),
    # 27 and 32 of 50 steps reused, the shares that SkyReels-V2's published FLOPs imply (TeaCache: as near as its rows
    # come in a take one window long): the middle of the thresholds that do, found by `longtake bench flowcache`
    "tiny-skyreels": Preset("timestep", 5, "chunk", "identity", 0.07496, 0.1108, 0.06642, 0.09527),
    # four steps that differ a lot: "slow" may skip one of them, "fast" two; latents are useless where noise is renewed
    "wan": Preset("timestep", 1, "chunk", "identity", 0.35, 0.8, 0.35, 0.8),
}


def preset(name: str) -> Preset:
    """Settings of a model; raises LongtakeError for one that has none."""
    if name not in PRESETS:
        raise LongtakeError(
            f"no reuse thresholds are known for {name or 'this model'!r} (known: {', '.join(PRESETS)}): give all of "
            "threshold=NUMBER, metric=, warmup=, last= and rescale="
        )
    return PRESETS[name]


def rescaled(change: float, polynomial: str, clamp: bool = True) -> float:
    """A change by a named polynomial. `clamp` keeps it from falling below zero: unclamped, a step that moves far can
    count as less than none, the accumulator falls, and everything after it is reused (as in the published code)."""
    value = 0.0
    for coefficient in POLYNOMIALS[polynomial]:
        value = value * change + coefficient
    return max(0.0, value) if clamp else value

"""What reuse and a compressed past change in the takes of a model of the world of lanes.

Two takes a seed, the same noise in every arm. Free: a take from nothing. Continued: the true beginning of a scene is
given, and of the actors that come back in what is generated it is read whether they are lawfully where they should be,
and look as they did. Each arm is compared with the take of the same seed that reuses and compresses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..errors import LongtakeError
from ..hosts.base import Host
from ..policies import FullHistory
from ..session import Session
from ..zoo import lanes, readback
from .compare.footage import FIRST_SEED, true_latents
from .compare.picture import psnr, ssim_map
from .compare.statistics import interval, mean, paired
from .flowcache_arms import Arm
from .flowcache_report import QualityRow, Rate

GIVEN = 3  # chunks of truth
GAPS = (1, 2, 4)  # latent frames an actor may be hidden for: it has to leave and come back within a window
READ = ("lawful", "colour", "texture")


def quality(
    host: Host, arms: Sequence[Arm], seeds: Sequence[int], progress: Callable[[int, int], None] = lambda n, of: None
) -> list[QualityRow]:
    """A row for every arm, whose reference must come before it. Raises LongtakeError for a model of another world."""
    if host.config.world != lanes.WORLD:
        raise LongtakeError(f"{host.name} was not trained on the world of lanes: its takes cannot be read back")
    rows = {arm.name: QualityRow(arm.name, arm.against, 0.0) for arm in arms}
    hits: dict[str, dict[str, dict[int, list[float]]]] = {a.name: {name: {} for name in READ} for a in arms}
    steps: dict[str, list[int]] = {arm.name: [0, 0] for arm in arms}
    for number, seed in enumerate(seeds):
        scene = lanes.scene(FIRST_SEED + seed, host.config.training_frames + 16, GAPS)
        videos: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        given = true_latents(host, scene, GIVEN * host.config.chunk_frames)
        for done, arm in enumerate(arms):
            row, free = rows[arm.name], _session(host, arm, scene, seed)
            videos[arm.name] = _frames(free), _continued(host, arm, scene, seed, given)
            steps[arm.name][0] += free.stats.reused
            steps[arm.name][1] += free.stats.reused + free.stats.forwards - free.stats.chunks
            if arm.name != arm.against:
                for video, base, noise, structure in zip(
                    videos[arm.name], videos[arm.against], (row.psnr, row.continued_psnr),
                    (row.ssim, row.continued_ssim), strict=True,
                ):  # fmt: skip
                    noise.append(psnr(video, base))
                    structure.append(float(ssim_map(video, base).mean()))
            for verdict in _verdicts(host, scene, videos[arm.name][1]):
                for name in READ:
                    hits[arm.name][name].setdefault(seed, []).append(float(getattr(verdict, name)))
            progress(number * len(arms) + done + 1, len(seeds) * len(arms))
    for arm in arms:
        row, (reused, of) = rows[arm.name], steps[arm.name]
        row.skipped = reused / of
        row.events = sum(map(len, hits[arm.name][READ[0]].values()))
        for name in READ if row.events else ():
            own, other = hits[arm.name][name], hits[arm.against][name]
            gap, between, _ = paired(own, other) if arm.name != arm.against else (0.0, (0.0, 0.0), 1.0)
            row.read[name] = Rate(mean(own), interval(own), gap, between)
    return list(rows.values())


def _session(host: Host, arm: Arm, scene: lanes.Scene, seed: int, *, window: bool = True) -> Session:
    """A take as long as a window. Without windows of its own it sees all that is given."""
    sampler = arm.sampler(host)
    if not window:
        sampler = replace(sampler, window=None, overlap=0)
    frames = host.geometry().pixel_frames(host.config.training_frames)
    return Session(
        host, arm.policy or FullHistory(), reuse=arm.reuse, prompt=scene.caption, seed=seed, num_frames=frames,
        sampler=sampler,
    )  # fmt: skip


def _continued(host: Host, arm: Arm, scene: lanes.Scene, seed: int, given: object) -> np.ndarray:
    take = _session(host, arm, scene, seed, window=False)
    take.extend(given)  # type: ignore[arg-type]
    return _frames(take)


def _frames(take: Session) -> np.ndarray:
    """uint8 [T, H, W, 3] of all that is generated."""
    return np.concatenate([np.asarray(chunk.frames) for chunk in take])


def _verdicts(host: Host, scene: lanes.Scene, video: np.ndarray) -> list[readback.Verdict]:
    """Of the returns in what was generated after the given chunks."""
    first = GIVEN * host.config.chunk_frames
    start = lanes.STRIDE * (first - 1) + 1
    found = (
        readback.judge(video, scene, start, event)
        for event in readback.returns(scene, first, host.config.training_frames)
    )
    return [verdict for verdict in found if verdict is not None]

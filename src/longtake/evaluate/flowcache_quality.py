"""What reuse and a compressed past change in the takes of a model of the world of lanes.

Two takes a seed, the same noise in every arm. Free: a take from nothing. Continued: the true beginning of a scene is
given, and of the actors that come back in what is generated it is read whether they are lawfully where they should be,
and look as they did. Each arm is compared with the take of the same seed that reuses and compresses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import LongtakeError
from ..hosts.base import Host
from ..policies import FullHistory
from ..session import Session
from ..zoo import lanes, readback
from .compare.footage import FIRST_SEED, true_latents
from .compare.picture import psnr, ssim_map
from .compare.statistics import interval, mean, paired
from .flowcache_arms import GIVEN, Arm
from .flowcache_compared import by_seed
from .flowcache_report import READ, QualityRow, Rate, known

GAPS = (1, 2, 4)  # latent frames an actor may be hidden for: it has to leave and come back within a window


def quality(
    host: Host, arms: Sequence[Arm], seeds: Sequence[int], progress: Callable[[int, int], None] = lambda n, of: None
) -> list[QualityRow]:
    """A row for every arm, whose reference must come before it. Raises LongtakeError for a model of another world."""
    if host.config.world != lanes.WORLD:
        raise LongtakeError(f"{host.name} was not trained on the world of lanes: its takes cannot be read back")
    rows = {arm.name: QualityRow(arm.name, arm.against, 0.0) for arm in arms}
    steps: dict[str, list[tuple[int, int]]] = {arm.name: [] for arm in arms}  # reused and all, free and continued
    for number, seed in enumerate(seeds):
        scene = lanes.scene(FIRST_SEED + seed, host.config.training_frames + 16, GAPS)
        videos: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        given = true_latents(host, scene, GIVEN * host.config.chunk_frames)
        for done, arm in enumerate(arms):
            row, takes = rows[arm.name], [_session(host, arm, scene, seed, continued=after) for after in (False, True)]
            takes[1].extend(given)
            videos[arm.name] = _frames(takes[0]), _frames(takes[1])
            steps[arm.name] += [(t.stats.reused, t.stats.reused + t.stats.forwards - t.stats.chunks) for t in takes]
            if arm.name != arm.against:
                for video, base, noise, structure in zip(
                    videos[arm.name], videos[arm.against], (row.psnr, row.continued_psnr),
                    (row.ssim, row.continued_ssim), strict=True,
                ):  # fmt: skip
                    noise.append(psnr(video, base))
                    structure.append(float(ssim_map(video, base).mean()))
            verdicts = _verdicts(host, scene, videos[arm.name][1])
            for name in READ:
                row.hits.setdefault(name, []).append([float(getattr(verdict, name)) for verdict in verdicts])
            progress(number * len(arms) + done + 1, len(seeds) * len(arms))
    for arm in arms:
        row = rows[arm.name]
        row.skipped, row.continued_skipped = (
            sum(reused for reused, _ in counts) / sum(of for _, of in counts)
            for counts in (steps[arm.name][::2], steps[arm.name][1::2])
        )
        for name in READ if row.events else ():
            own, other = (by_seed(rows[which].hits[name]) for which in (arm.name, arm.against))
            gap, between, p = paired(own, other) if arm.name != arm.against else (0.0, (0.0, 0.0), 1.0)
            row.read[name] = Rate(mean(own), known(interval(own)), gap, known(between), p)
    return list(rows.values())


def _session(host: Host, arm: Arm, scene: lanes.Scene, seed: int, *, continued: bool) -> Session:
    """A take as long as a window."""
    frames = host.geometry().pixel_frames(host.config.training_frames)
    return Session(
        host, arm.policy or FullHistory(), reuse=(continued and arm.continued) or arm.reuse, prompt=scene.caption,
        seed=seed, num_frames=frames, sampler=arm.sampler(host, continued=continued),
    )  # fmt: skip


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

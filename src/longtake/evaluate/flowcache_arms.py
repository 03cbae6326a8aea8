"""What `longtake bench flowcache` compares: reuse policies that skip a stated share of the steps, alone and with a
compressed past."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from ..geometry import Geometry
from ..hosts.base import Host
from ..policies import FlowCacheKV, KVPolicy
from ..reuse import FlowCacheReuse, ReusePolicy, ReuseRun, TeaCacheReuse, Turn
from ..samplers.stagger import Stagger

# Shares of a chunk's steps that the published FLOPs of SkyReels-V2 imply: nobody published decision logs.
SKIPPED = {"slow": 27 / 50, "fast": 32 / 50}
HALVINGS = 30  # of a threshold's bracket
KV_CHUNKS = 4  # two in flight, two of the past


@dataclass(frozen=True)
class Arm:
    """One way to make the takes. `lag` replaces the model's own, `against` names the arm it is compared with."""

    name: str
    reuse: ReusePolicy | None = None
    policy: KVPolicy | None = None
    lag: int | None = None
    against: str = "none"

    def sampler(self, host: Host) -> Stagger:
        sampler = Stagger.of(host.config)
        return sampler if self.lag is None else replace(sampler, lag=self.lag)


def arms(host: Host, geometry: Geometry, frames: int) -> list[Arm]:
    """Every arm for takes of `frames` latent frames, thresholds found by playing the rows of such a take.

    With half the steps as lag two chunks are in flight, so most of a window is past that can be compressed.
    """
    sampler = Stagger.of(host.config)
    share = lambda policy: skipped(policy, host, geometry, frames, sampler)
    found = [Arm("none")]
    flow = lambda threshold: FlowCacheReuse(threshold, "timestep", rescale="identity", warmup=5, last="chunk")
    tea = lambda threshold: TeaCacheReuse(threshold, "timestep", rescale="identity", warmup=5, last="chunk")
    for speed, target in SKIPPED.items():
        chunkwise = flow(calibrated(lambda at: share(flow(at)), target))
        joint = tea(calibrated(lambda at: share(tea(at)), share(chunkwise)))
        found += [
            Arm(f"flowcache {speed}", chunkwise),
            Arm(f"flowcache {speed}, carry update", replace(chunkwise, carry="update")),
            Arm(f"flowcache {speed}, carry residual", replace(chunkwise, carry="residual")),
            Arm(f"teacache as {speed}", joint),
        ]
    slow = next(arm.reuse for arm in found if arm.name == "flowcache slow")
    steps = len(host.timetable(sampler.steps)[0])
    wide = replace(Arm("none, two in flight"), lag=math.ceil(steps / 2))
    kv = FlowCacheKV(KV_CHUNKS)
    found += [
        wide,
        replace(wide, name="compressed", policy=kv, against=wide.name),
        replace(wide, name="flowcache slow, two in flight", reuse=slow, against=wide.name),
        replace(wide, name="flowcache slow, compressed", reuse=slow, policy=kv, against=wide.name),
    ]
    return found


def skipped(policy: ReusePolicy, host: Host, geometry: Geometry, frames: int, sampler: Stagger) -> float:
    """The share of steps that a policy reuses in a take of `frames` latent frames. Its metric must be "timestep": then
    its decisions hold nothing of the video, and no forward is needed."""
    timesteps, levels = host.timetable(sampler.steps)
    steps, chunks = len(timesteps), -(-frames // geometry.chunk_frames)
    matrix = sampler.layout(geometry, steps, frames)[0]
    run = ReuseRun(policy.for_model(host.reuse_preset), _feature(host))
    nothing, reused = torch.zeros(1), 0
    for row in range(matrix.rows(chunks)):
        at = {chunk: step for chunk in range(chunks) if (step := matrix.step(row, chunk)) is not None}
        turns = [
            Turn(c, k, steps, timesteps[k], levels[k], levels[k + 1], last=k == steps - 1 and c == chunks - 1)
            for c, k in at.items()
        ]
        for turn, computed in zip(turns, run.decide(turns, [nothing] * len(turns)), strict=True):
            if computed:
                run.keep(turn, nothing, nothing)
            reused += not computed
            if turn.index == steps - 1:
                run.finish(turn.chunk)
    return reused / (chunks * steps)


def calibrated(share: Callable[[float], float], target: float) -> float:
    """The threshold whose share comes nearest to `target`, of those that halving a bracket visits."""
    low, high = 0.0, 1e-3
    seen: dict[float, float] = {}
    while (last := seen.setdefault(high, share(high))) < target and high < 1e6:
        low, high = high, 2 * high
    for _ in range(HALVINGS if last >= target else 0):
        middle = (low + high) / 2
        if seen.setdefault(middle, share(middle)) < target:
            low = middle
        else:
            high = middle
    return min(seen, key=lambda threshold: (abs(seen[threshold] - target), threshold))


def _feature(host: Host) -> Callable[[str, torch.Tensor | None, float], torch.Tensor]:
    """The host's timestep feature, each computed once."""
    held = _timestep_features(host)
    return lambda metric, latents, timestep: held(timestep)


@cache
def _timestep_features(host: Host) -> Callable[[float], torch.Tensor]:
    return cache(lambda timestep: host.feature("timestep", None, timestep))

"""What `longtake bench flowcache` compares: reuse policies that skip a stated share of the steps, alone and with a
compressed past."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from ..geometry import Geometry
from ..hosts.base import Host
from ..policies import FlowCacheKV, KVPolicy
from ..reuse import FlowCacheReuse, NoReuse, ReusePolicy, ReuseRun, TeaCacheReuse, Turn
from ..samplers.stagger import Stagger

# Shares of a chunk's steps that the published FLOPs of SkyReels-V2 imply: nobody published decision logs.
SKIPPED = {"slow": 27 / 50, "fast": 32 / 50}
HALVINGS = 60  # of a threshold's bracket, at most …
FINE = 1e-6  # … until it is so narrow, relatively
LIMIT = 1e6  # no threshold beyond
KV_CHUNKS = 4  # two in flight, two of the past
GIVEN = 3  # chunks of truth that continued takes begin with


@dataclass(frozen=True)
class Arm:
    """One way to make the takes. `lag` replaces the model's own, `against` names the arm it is compared with.
    `continued` is the reuse of takes that continue given chunks, where it is another: a joint decision skips another
    share of other rows, and is set to skip the same one."""

    name: str
    reuse: ReusePolicy | None = None
    continued: ReusePolicy | None = None
    policy: KVPolicy | None = None
    lag: int | None = None
    against: str = "none"

    def sampler(self, host: Host, *, continued: bool = False) -> Stagger:
        """A continued take has no windows of its own: it sees all that is given."""
        sampler = Stagger.of(host.config)
        sampler = sampler if self.lag is None else replace(sampler, lag=self.lag)
        return replace(sampler, window=None, overlap=0) if continued else sampler


def arms(host: Host, geometry: Geometry, frames: int) -> list[Arm]:
    """Every arm for takes of `frames` latent frames, thresholds found by playing the rows of such a take.

    With half the steps as lag two chunks are in flight, so most of a window is past that can be compressed.
    """
    found = [Arm("none")]
    free, after = (found[0].sampler(host, continued=continued) for continued in (False, True))
    rest = max(frames - GIVEN * geometry.chunk_frames, geometry.chunk_frames)
    share = lambda policy: skipped(policy, host, geometry, frames, free)
    share_after = lambda policy: skipped(policy, host, geometry, rest, after)
    flow = lambda threshold: FlowCacheReuse(threshold, "timestep", rescale="identity", warmup=5, last="chunk")
    tea = lambda threshold: TeaCacheReuse(threshold, "timestep", rescale="identity", warmup=5, last="chunk")
    for speed, target in SKIPPED.items():
        chunkwise = flow(calibrated(lambda at: share(flow(at)), target))
        joint = tea(calibrated(lambda at: share(tea(at)), share(chunkwise)))
        joint_after = tea(calibrated(lambda at: share_after(tea(at)), share_after(chunkwise)))
        found += [
            Arm(f"flowcache {speed}", chunkwise),
            Arm(f"flowcache {speed}, carry update", replace(chunkwise, carry="update")),
            Arm(f"flowcache {speed}, carry residual", replace(chunkwise, carry="residual")),
            Arm(f"teacache as {speed}", joint, joint_after),
        ]
    slow = next(arm.reuse for arm in found if arm.name == "flowcache slow")
    steps = len(host.timetable(free.steps)[0])
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
    rows = []
    for row in range(matrix.rows(chunks)):
        at = {chunk: step for chunk in range(chunks) if (step := matrix.step(row, chunk)) is not None}
        rows.append([
            Turn(c, k, steps, timesteps[k], levels[k], levels[k + 1], last=k == steps - 1 and c == chunks - 1)
            for c, k in at.items()
        ])  # fmt: skip
    run = _run(host)
    run.policy = policy.for_model(host.reuse_preset)
    decided = run.ahead(rows)
    assert decided is not None
    return sum(decision.reused for row in decided for decision in row) / (chunks * steps)


def calibrated(share: Callable[[float], float], target: float) -> float:
    """A threshold whose share comes nearest to `target`, in the middle of all that have that share: shares go by whole
    steps, and on the edge between two of them rounding would decide."""
    known = cache(share)
    low, high = 0.0, 1e-3
    while known(high) < target and high < LIMIT:
        low, high = high, 2 * high
    below, reached = (high, high) if known(high) < target else _edge(lambda at: known(at) < target, low, high)
    nearest = min((below, reached), key=lambda at: (abs(known(at) - target), at))
    found = known(nearest)
    first = 0.0 if known(0.0) >= found else _edge(lambda at: known(at) < found, 0.0, nearest)[1]
    over = max(nearest, 1e-3)
    while known(over) <= found and over < LIMIT:
        over *= 2
    last = _edge(lambda at: known(at) <= found, nearest, over)[0] if known(over) > found else 2 * first
    middle = (first + last) / 2
    return middle if known(middle) == found else nearest


def _edge(before: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Where `before`, true at `low` and not at `high`, ends: the last place before it and the first behind, as near as
    halving brings them."""
    for _ in range(HALVINGS):
        if high - low <= FINE * high:
            break
        middle = (low + high) / 2
        low, high = (middle, high) if before(middle) else (low, middle)
    return low, high


@cache
def _run(host: Host) -> ReuseRun:
    """A take that never begins: it remembers how far timesteps are from each other."""
    return ReuseRun(NoReuse(), host.feature)

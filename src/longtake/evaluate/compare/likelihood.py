"""How likely a model that draws codes holds true ones: the measure of protocol L, in nats a code, less is better.

A frame of nothing but masks stands behind the past; one forward says what the past alone makes of each of its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import LongtakeError
from ...geometry import Geometry
from ...hosts.base import Host
from ...samplers.base import Sampler, Sampling
from ...samplers.masked import MaskedSampler
from ...samplers.one_by_one import OneByOne
from ...session import Session
from ...zoo import lanes
from ...zoo.tiny_lumos_clips import actors_at

RETURNED = 3  # latent frames of a visit in which an actor counts as just returned


class Asking(Sampler):
    """Draws nothing: asks `own` how likely the codes `truth` [1, 1, 1, h, w] of the chunk are, and hands them out."""

    commits_last = False
    reuses = False

    def __init__(self, own: MaskedSampler, truth: Tensor) -> None:
        self.own, self.truth, self.schedule = own, truth, own.schedule
        self.nats = torch.empty(0)  # [h, w], once asked

    def noise(self, generators: Sequence[torch.Generator]) -> Any:
        return self.own.noise(generators)

    def sample(self, chunk: Sampling) -> Tensor:
        self.nats = -self.own.log_likelihood(chunk, self.truth)[0, 0, 0].cpu()
        return self.truth

    def commit_input(self, x0: Tensor, geometry: Geometry, stream: str, given: bool = False) -> tuple[Tensor, float]:
        return self.own.commit_input(x0, geometry, stream, given)

    def sound(self, x0: Tensor) -> Tensor:
        return self.own.sound(x0)


def check(host: Host, name: str) -> None:
    """Raise LongtakeError for a model that cannot be asked."""
    if not host.codes:
        raise LongtakeError(f"{name} draws no codes, so it cannot say how likely one is: protocol L is for tiny-lumos")


def nats(twin: Session, truth: Tensor) -> tuple[np.ndarray, int]:
    """What each code of the next frame `truth` [1, 1, 1, h, w] costs, [h, w], and how many tokens were attended to;
    the take ends with it."""
    assert isinstance(twin.sampler, MaskedSampler) and isinstance(twin.rollout, OneByOne)
    asking = Asking(twin.sampler, truth.to(twin.host.device))
    twin.rollout.sampler = asking
    tokens = next(twin).stats.attended_tokens
    return asking.nats.numpy(), tokens


@dataclass(frozen=True)
class Back:
    """An actor's codes in the first frames after it has come back."""

    lane: int
    visit: int
    gap: int  # latent frames behind the pillar
    age: int  # from the last sight to the return
    repainted: bool
    in_sink: bool


class Account:
    """What the codes of frames have cost, by what they show."""

    def __init__(self, scene: lanes.Scene) -> None:
        self.scene = scene
        self.scenery: list[float] = []  # a frame's mean, without actors
        self.seen: list[float] = []  # an actor's mean in a frame, once it is in view for `RETURNED`
        self._back: dict[Back, list[float]] = {}  # the same in the frames before that, by return

    def add(self, frame: int, costs: np.ndarray) -> None:
        """Costs [h, w] of latent frame `frame`."""
        scenery = np.ones(costs.shape, bool)
        for number, rows in enumerate(np.split(np.arange(len(costs)), lanes.LANES)):
            lane = self.scene.lanes[number]
            here = actors_at(lane, (frame,))[0].numpy()
            if lane is None or not here.any():
                continue
            scenery[rows] &= ~here
            cost = float(costs[rows][here].mean())
            k = next(k for k, visit in enumerate(lane.visits) if visit.start <= frame < visit.end)
            if frame - lane.visits[k].start >= RETURNED:
                self.seen.append(cost)
            elif k:
                self._back.setdefault(_back(lane, number, k), []).append(cost)
        self.scenery.append(float(costs[scenery].mean()))

    def as_dict(self) -> dict[str, Any]:
        rounded = lambda values: [round(value, 4) for value in values]
        events = [{**asdict(back), "nats": round(float(np.mean(costs)), 4)} for back, costs in self._back.items()]
        return {"events": events, "seen": rounded(self.seen), "scenery": rounded(self.scenery)}


def _back(lane: lanes.Lane, number: int, k: int) -> Back:
    last, start = lane.visits[k - 1], lane.visits[k].start
    repainted = lane.paint is not None and lane.paint < last.end
    gap = start - last.end
    return Back(number, k, gap, gap + 1, repainted, lane.visits[0].start < lanes.SINK)

"""What both stages of tiny-lumos learn with, and how their minutes are counted."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from longtake.zoo.muon import Muon
from longtake.zoo.stages import PAUSE_SECONDS, Stage


def optimizers(
    module: torch.nn.Module, outer: Sequence[str], rate: float
) -> Callable[[list[torch.nn.Parameter]], list[torch.optim.Optimizer]]:
    """What a stage over `module` learns with: Muon, but AdamW for vectors and for names with a part that is `outer`."""
    others = {id(p) for name, p in module.named_parameters() if p.ndim < 2 or any(part in name for part in outer)}
    return lambda parameters: [
        Muon([p for p in parameters if id(p) not in others], lr=rate),
        torch.optim.AdamW([p for p in parameters if id(p) in others], lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def own_minutes(stage: Stage, device: str) -> Iterator[float]:
    """The turns of a stage, with its minutes counted in the CPU time of this thread: a machine that is busy with other
    work makes a training last longer, and its schedule does not end early. On a GPU they are those of the clock."""
    if torch.device(device).type != "cpu":
        yield from stage
        return
    wall, own = time.monotonic(), time.thread_time()
    for share in stage:
        yield share
        now, used = time.monotonic(), time.thread_time()
        stage.used -= max(0.0, min(now - wall, PAUSE_SECONDS) - (used - own))  # the stage is about to add the former
        wall, own = now, used

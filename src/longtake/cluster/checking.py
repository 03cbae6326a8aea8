"""What is wrong with a batch's lines as they stand: all that shows without reading a weight or fetching a byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LongtakeError
from .jobs import Job, Line
from .results import found

if TYPE_CHECKING:
    from ..planner import ModelShape


def check(lines: Sequence[Line], file: Path, folder: Path) -> None:
    """Raise a LongtakeError that names every wrong line of `file`: what cannot be read, an unknown model, policy or
    key, a size its model does not have, an id that names another take in `folder`. What needs the model itself (its
    weights, a Hub id that has to be fetched, a policy that does not suit it) shows when the take is made."""
    wrong: list[str] = []
    shape_of = cache(_shape)  # many lines name one model
    for line in lines:
        try:
            if line.job is None:
                raise LongtakeError(line.problem or "it cannot be read")
            found(folder, line.job)
            _check_size(line.job, shape_of(line.job.model))
        except LongtakeError as error:
            wrong.append(f"line {line.number}: {error}")
    if wrong:
        some = "a line is" if len(wrong) == 1 else f"{len(wrong)} lines are"
        raise LongtakeError(f"{file}: {some} wrong, so nothing was started. {'; '.join(wrong)}")


def _check_size(job: Job, shape: ModelShape | None) -> None:
    height, width = job.height_width
    if shape is None or height is None or width is None:
        return
    from ..planner import PlanRequest
    from ..planner.lumos import UNIT, LumosShape
    from ..planner.wan_sizes import WanSizes

    unit = shape.unit() if isinstance(shape, WanSizes) else UNIT if isinstance(shape, LumosShape) else 1
    PlanRequest(model=job.model, size=(width, height), chunks=1).pixels(shape, unit)


def _shape(model: str) -> ModelShape | None:
    """The sizes of a model that is here; None where they are not to be had without it."""
    from ..hosts.base import CONFIG_NAME, HostConfig
    from ..hosts.loading import find
    from ..planner.folders import shape_of

    folder = find(model)
    if folder is None or not (folder / CONFIG_NAME).exists():
        return None
    try:
        return shape_of(folder, model, asdict(HostConfig.read(folder)), 4)
    except LongtakeError:  # a family that is not planned from its folder
        return None

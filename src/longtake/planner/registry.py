"""Named models, found in the modules of their families."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from ..errors import LongtakeError
from .request import ModelShape, PlanRequest

FAMILIES = ("lumos", "magi", "skyreels", "wan")  # modules of this package


class Family(Protocol):
    """What a family's module holds."""

    SHAPES: Mapping[str, ModelShape]

    def plan(self, request: PlanRequest) -> dict[str, Any]:
        """The costs of the take as JSON values. Raises LongtakeError for what the family cannot do."""


def families() -> dict[str, Family]:
    return {name: cast(Family, import_module(f".{name}", __package__)) for name in FAMILIES}


def models() -> dict[str, ModelShape]:
    """Every named shape, by name."""
    return {name: shape for family in families().values() for name, shape in family.SHAPES.items()}


def plan(request: PlanRequest) -> dict[str, Any]:
    """The costs of `request`: `model` and `family`, and what the family counts. Raises LongtakeError."""
    for name, family in families().items():
        if request.model in family.SHAPES:
            return {"model": request.model, "family": name, **family.plan(request)}
    raise LongtakeError(f"no model {request.model!r} to plan for; known: {', '.join(sorted(models()))}")

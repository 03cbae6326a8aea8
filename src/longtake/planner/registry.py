"""Named models, found in the modules of their families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from ..errors import LongtakeError
from .anatomy import Anatomy, Forward
from .request import ModelShape, PlanRequest

FAMILIES = ("lumos", "magi", "skyreels", "wan")  # modules of this package


class Family(Protocol):
    """What a family's module holds."""

    SHAPES: Mapping[str, ModelShape]

    def plan(self, request: PlanRequest) -> dict[str, Any]:
        """The costs of the take as JSON values. Raises LongtakeError for what the family cannot do."""

    def anatomy(self, request: PlanRequest) -> Anatomy:
        """What a session of this request is made of, for its bytes."""

    def forwards(self, request: PlanRequest) -> Iterator[Forward]:
        """Every forward of the take, for its work."""


def families() -> dict[str, Family]:
    return {name: cast(Family, import_module(f".{name}", __package__)) for name in FAMILIES}


def models() -> dict[str, ModelShape]:
    """Every named shape, by name."""
    return {name: shape for family in families().values() for name, shape in family.SHAPES.items()}


def family_of(request: PlanRequest) -> tuple[str, Family]:
    """Name and module of the family that knows the model, or the shape that is given. Raises LongtakeError."""
    for name, family in families().items():
        kinds = {type(shape) for shape in family.SHAPES.values()}
        if type(request.shape) in kinds if request.shape is not None else request.model in family.SHAPES:
            return name, family
    raise LongtakeError(f"no model {request.model!r} to plan for; known: {', '.join(sorted(models()))}")


def plan(request: PlanRequest) -> dict[str, Any]:
    """What the family counts of `request`, with `model` and `family`. Raises LongtakeError."""
    name, family = family_of(request)
    return {"model": request.model, "family": name, **family.plan(request)}

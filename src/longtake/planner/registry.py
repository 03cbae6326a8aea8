"""Named models, found in the modules of their families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from ..errors import LongtakeError
from .anatomy import Anatomy, Forward
from .request import ModelShape, PlanRequest


class Family(Protocol):
    """What a family's module holds."""

    SHAPES: Mapping[str, ModelShape]

    def plan(self, request: PlanRequest) -> dict[str, Any]:
        """The costs of the take as JSON values. Raises LongtakeError for what the family cannot do."""

    def anatomy(self, request: PlanRequest) -> Anatomy:
        """What a session of this request is made of, for its bytes."""

    def forwards(self, request: PlanRequest) -> Iterator[Forward]:
        """Every forward of the take, for its work."""


@cache
def families() -> dict[str, Family]:
    """The modules of this package that list named shapes, by name."""
    package = import_module(__package__)
    found = {name: import_module(f".{name}", __package__) for _, name, _ in iter_modules(package.__path__)}
    return {name: cast(Family, module) for name, module in found.items() if hasattr(module, "SHAPES")}


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

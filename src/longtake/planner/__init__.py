"""What a take will cost, by arithmetic: tokens, bytes and FLOPs of a model's shapes under a policy, without a model.

One module per model family. Each lists its named shapes in `SHAPES` and answers `plan(request) -> dict`; registering a
family is one word in `registry.FAMILIES`.
"""

from .registry import FAMILIES, models, plan
from .request import ModelShape, PlanRequest

__all__ = ["FAMILIES", "ModelShape", "PlanRequest", "models", "plan"]

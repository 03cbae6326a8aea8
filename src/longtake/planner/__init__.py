"""What a take will cost, by arithmetic: tokens, bytes, FLOPs and seconds of a model's shapes under a policy, without a
model.

One module per model family. Each lists its named shapes in `SHAPES`, counts with `plan(request) -> dict`, says what a
session is made of with `anatomy(request)` and which forwards there are with `forwards(request)`; a module of this
package that lists `SHAPES` is a family. Bytes of a history are `footprint`'s, which a server's admission asks too.
"""

from .answer import Room, answer, memory
from .footprint import HistoryBytes, history_bytes, largest
from .registry import families, models, plan
from .request import ModelShape, PlanRequest
from .runnable import runnable
from .speed import CARDS, Ceilings, ceilings

__all__ = [
    "CARDS",
    "Ceilings",
    "HistoryBytes",
    "ModelShape",
    "PlanRequest",
    "Room",
    "answer",
    "ceilings",
    "families",
    "history_bytes",
    "largest",
    "memory",
    "models",
    "plan",
    "runnable",
]

"""The memory of a take: block table, preallocated store, view."""

from .history import RESIDENCIES, History
from .view import LayerView

__all__ = ["RESIDENCIES", "History", "LayerView"]

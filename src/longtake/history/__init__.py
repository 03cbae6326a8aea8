"""The memory of a take: block table, preallocated store, view."""

from .history import RESIDENCIES, History
from .store import HistoryFull
from .view import LayerView

__all__ = ["RESIDENCIES", "History", "HistoryFull", "LayerView"]

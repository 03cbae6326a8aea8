"""The memory of a take: block table, preallocated store, view."""

from .history import RESIDENCIES, History
from .quantised import FORMS, storage_form
from .view import LayerView

__all__ = ["FORMS", "RESIDENCIES", "History", "LayerView", "storage_form"]

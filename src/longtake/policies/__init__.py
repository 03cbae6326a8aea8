"""KV policies, one file per method: what of the past is kept and seen."""

from .base import KVPolicy
from .full_history import FullHistory
from .registry import available, build, describe, parse
from .sliding_window import SlidingWindow

__all__ = ["FullHistory", "KVPolicy", "SlidingWindow", "available", "build", "describe", "parse"]

"""Reuse policies, one file per method: which forwards of a chunk are computed."""

from .base import NoReuse, ReusePolicy, ReuseState

__all__ = ["NoReuse", "ReusePolicy", "ReuseState"]

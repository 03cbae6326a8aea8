"""Reuse policies, one file per method: which forwards of a chunk are computed."""

from .base import CARRIES, METRICS, Decision, NoReuse, ReusePolicy, ReuseState, Turn
from .flowcache import FlowCacheReuse
from .metric import Change
from .presets import POLYNOMIALS, PRESETS, Preset
from .registry import available, build, describe, parse
from .replay import ReplayReuse, read_log, write_log
from .run import ReuseRun
from .teacache import TeaCacheReuse

__all__ = [
    "CARRIES", "METRICS", "POLYNOMIALS", "PRESETS", "Change", "Decision", "FlowCacheReuse", "NoReuse", "Preset",
    "ReplayReuse", "ReusePolicy", "ReuseRun", "ReuseState", "TeaCacheReuse", "Turn", "available", "build", "describe",
    "parse", "read_log", "write_log",
]  # fmt: skip

"""KV policies, one file per method: what of the past is kept and seen."""

from .base import KVPolicy
from .equal_budget import LastFrames, SinkWindow, Uniform
from .flowcache_kv import FlowCacheKV
from .full_history import FullHistory
from .kv_range import KVRange
from .packcache import PackCache
from .packforcing import PackForcing
from .registry import available, build, describe, parse
from .sliding_window import SlidingWindow

__all__ = [
    "FlowCacheKV",
    "FullHistory",
    "KVPolicy",
    "KVRange",
    "LastFrames",
    "PackCache",
    "PackForcing",
    "SinkWindow",
    "SlidingWindow",
    "Uniform",
    "available",
    "build",
    "describe",
    "parse",
]

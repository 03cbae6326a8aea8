"""KV policies, one file per method: what of the past is kept and seen."""

from .base import KVPolicy
from .deep_forcing import DeepForcing
from .dummy_forcing import DummyForcing
from .equal_budget import LastFrames, SinkWindow, Uniform
from .flowcache_kv import FlowCacheKV
from .full_history import FullHistory
from .infinity_rope import InfinityRope
from .kv_range import KVRange
from .longlive import LongLive
from .packcache import PackCache
from .packforcing import PackForcing
from .registry import available, build, describe, parse
from .rolling_forcing import RollingForcing
from .sliding_window import SlidingWindow

__all__ = [
    "DeepForcing",
    "DummyForcing",
    "FlowCacheKV",
    "FullHistory",
    "InfinityRope",
    "KVPolicy",
    "KVRange",
    "LastFrames",
    "LongLive",
    "PackCache",
    "PackForcing",
    "RollingForcing",
    "SinkWindow",
    "SlidingWindow",
    "Uniform",
    "available",
    "build",
    "describe",
    "parse",
]

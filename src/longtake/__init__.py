"""longtake: autoregressive video generation of any length in bounded memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# names → module: `import longtake` stays cheap, torch and diffusers load with the first name that needs them
_HOME = {
    "Session": "session", "generate": "session", "Chunk": "chunk", "ChunkStats": "chunk",
    "enable": "enabling", "Stagger": "samplers.stagger",
    "MaskedSampler": "samplers.masked",
    "load": "hosts.loading", "Geometry": "geometry", "Mp4Writer": "video", "read_image": "video",
    "KVPolicy": "policies", "FullHistory": "policies", "SlidingWindow": "policies", "PackCache": "policies",
    "FlowCacheKV": "policies",
    "PackForcing": "policies", "LastFrames": "policies", "SinkWindow": "policies", "Uniform": "policies",
    "DeepForcing": "policies", "DummyForcing": "policies", "InfinityRope": "policies", "LongLive": "policies",
    "RollingForcing": "policies",
    "Compressor": "compressors", "DualBranch": "compressors", "LowResolution": "compressors",
    "MeanPool": "compressors", "load_compressor": "compressors",
    "Plan": "plan", "Entry": "plan", "Choose": "plan", "Fuse": "plan", "Drop": "plan",
    "Block": "plan", "BlockTable": "plan", "Signals": "plan", "HistoryShape": "plan",
    "ReusePolicy": "reuse", "NoReuse": "reuse", "FlowCacheReuse": "reuse", "TeaCacheReuse": "reuse",
    "ReplayReuse": "reuse",
    "LongtakeError": "errors", "NonFiniteError": "errors", "PlanError": "errors",
}  # fmt: skip

__all__ = sorted(_HOME)
__version__ = "0.1.0"

if TYPE_CHECKING:
    from .chunk import Chunk, ChunkStats
    from .compressors import Compressor, DualBranch, LowResolution, MeanPool, load_compressor
    from .enabling import enable
    from .errors import LongtakeError, NonFiniteError, PlanError
    from .geometry import Geometry
    from .hosts.loading import load
    from .plan import Block, BlockTable, Choose, Drop, Entry, Fuse, HistoryShape, Plan, Signals
    from .policies import (
        DeepForcing,
        DummyForcing,
        FlowCacheKV,
        FullHistory,
        InfinityRope,
        KVPolicy,
        LastFrames,
        LongLive,
        PackCache,
        PackForcing,
        RollingForcing,
        SinkWindow,
        SlidingWindow,
        Uniform,
    )
    from .reuse import FlowCacheReuse, NoReuse, ReplayReuse, ReusePolicy, TeaCacheReuse
    from .samplers.masked import MaskedSampler
    from .samplers.stagger import Stagger
    from .session import Session, generate
    from .video import Mp4Writer, read_image


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longtake' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

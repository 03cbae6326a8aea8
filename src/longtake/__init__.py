"""longtake: autoregressive video generation of any length in bounded memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# names → module: `import longtake` stays cheap, torch and diffusers load with the first name that needs them
_HOME = {
    "Chunk": "chunk", "ChunkStats": "chunk", "Session": "session", "generate": "session",
    "load": "hosts.loading",
    "FullHistory": "policies", "KVPolicy": "policies", "SlidingWindow": "policies",
    "NoReuse": "reuse", "ReusePolicy": "reuse",
    "Geometry": "geometry", "LongtakeError": "errors", "NonFiniteError": "errors",
}  # fmt: skip

__all__ = sorted(_HOME)
__version__ = "0.1.0"

if TYPE_CHECKING:
    from .chunk import Chunk, ChunkStats
    from .errors import LongtakeError, NonFiniteError
    from .geometry import Geometry
    from .hosts.loading import load
    from .policies import FullHistory, KVPolicy, SlidingWindow
    from .reuse import NoReuse, ReusePolicy
    from .session import Session, generate


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longtake' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)

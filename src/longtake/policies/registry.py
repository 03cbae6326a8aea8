"""KV policies by name: for the command line, for snapshots, for tables. A policy registers by being a subclass."""

from __future__ import annotations

from ..named import Registry, describe
from .base import KVPolicy

__all__ = ["available", "build", "describe", "parse"]

_REGISTRY = Registry(KVPolicy, "policy")  # type: ignore[type-abstract]
available, build, parse = _REGISTRY.available, _REGISTRY.build, _REGISTRY.parse

"""Compressors by name or folder, as the command line has them."""

from __future__ import annotations

from pathlib import Path

from ..errors import LongtakeError
from ..named import Registry
from .base import Compressor
from .reading import load_compressor

REGISTRY: Registry[Compressor] = Registry(Compressor, "compressor")  # type: ignore[type-abstract]


def parse(spec: str) -> Compressor:
    """`low-resolution` or `mean-pool`, with options as `name:where=raster`, or the folder of a trained one.

    Raises LongtakeError for an unknown name or option, and for a folder that holds no compressor."""
    names = ", ".join(sorted(REGISTRY.available()))
    if not spec.strip():
        raise LongtakeError(f"an empty name is no compressor: give {names}, or the folder of a trained one")
    if Path(spec).expanduser().is_dir():
        return load_compressor(spec)
    if spec.partition(":")[0] in REGISTRY.available():
        return REGISTRY.parse(spec)
    raise LongtakeError(f"no compressor {spec!r}: give {names}, or the folder of a trained one")

"""Compressors by name or folder, as the command line has them."""

from __future__ import annotations

from pathlib import Path

from ..errors import LongtakeError
from ..named import Registry
from .base import Compressor
from .dual_branch import DualBranch

REGISTRY: Registry[Compressor] = Registry(Compressor, "compressor")  # type: ignore[type-abstract]


def parse(spec: str) -> Compressor:
    """`low-resolution` or `mean-pool`, with options as `name:where=raster`, or the folder of a trained one.

    Raises LongtakeError for an unknown name or option, and for a folder that holds no compressor."""
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        if spec.partition(":")[0] in REGISTRY.available():
            return REGISTRY.parse(spec)
        names = ", ".join(sorted(REGISTRY.available()))
        raise LongtakeError(f"no compressor {spec!r}: give {names}, or the folder of a trained one")
    if not (folder / "config.json").exists() and (folder / "compressor").is_dir():
        folder = folder / "compressor"  # what `longtake train compressor --out` wrote
    try:
        trained, report = DualBranch.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:  # loaders raise anything from OSError to SafetensorError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LongtakeError(f"{folder} holds no compressor: {first}") from error
    if absent := report["missing_keys"]:  # diffusers would go on with random values in their place
        raise LongtakeError(f"{folder} lacks {len(absent)} of its weights, {sorted(absent)[0]} among them")
    return trained.requires_grad_(False).eval()

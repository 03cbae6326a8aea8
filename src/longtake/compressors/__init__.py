"""Compressors: a chunk's latents and pixels in, a few tokens in patch-embedding space out."""

from .base import CARRIES, POSITIONS, STRIDE, Compressor, Embedder, TakeState
from .dual_branch import DualBranch
from .encoding import StreamingEncoder
from .low_resolution import LowResolution
from .mean_pool import MeanPool
from .naming import parse
from .reading import load_compressor

__all__ = [
    "CARRIES", "POSITIONS", "STRIDE", "Compressor", "DualBranch", "Embedder", "LowResolution", "MeanPool",
    "StreamingEncoder", "TakeState", "load_compressor", "parse",
]  # fmt: skip

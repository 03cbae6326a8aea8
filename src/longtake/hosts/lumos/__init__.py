"""Lumos-1 (arXiv 2507.08801): text, image and video as one token sequence, decoded frame by frame."""

from .host import Lumos
from .model import LumosConfig, LumosForVideoGeneration
from .sequence import LumosGeometry, Vocabulary
from .tokenizer import VideoTokenizer

__all__ = ["Lumos", "LumosConfig", "LumosForVideoGeneration", "LumosGeometry", "VideoTokenizer", "Vocabulary"]

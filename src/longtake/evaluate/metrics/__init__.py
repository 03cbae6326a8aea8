"""Measures of videos: small pure functions on uint8 frames [T, H, W, 3], and what they mean.

A clip of any length is measured piece by piece (`Meter`), so that no take is too long for memory.
"""

from .definitions import DEFINITIONS, Definition
from .meter import Meter

__all__ = ["DEFINITIONS", "Definition", "Meter"]

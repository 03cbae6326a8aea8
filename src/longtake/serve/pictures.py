"""A first image as clients send it."""

from __future__ import annotations

import base64
import binascii
import io
import tempfile
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import LongtakeError
from ..geometry import Geometry
from ..video import read_image
from .settings import Settings

_FORMATS = ("PNG", "JPEG", "WEBP")


def first_image(encoded: str, geometry: Geometry, settings: Settings) -> Tensor:
    """Base64 of a PNG, JPEG or WebP to float [3, H, W] in [−1, 1], cropped to the take's size.

    Raises LongtakeError for anything else; the size is read from the header before a pixel is decoded."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise LongtakeError("image: send the file's bytes in base64, without a data: prefix") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                width, height = picture.size
    except Exception as error:  # Pillow's readers raise a dozen types for damaged files
        raise LongtakeError("image: not a PNG, JPEG or WebP file") from error
    if width * height > settings.max_image_pixels:
        raise LongtakeError(f"image of {width}x{height}: at most {settings.max_image_pixels} pixels are read")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        path.write_bytes(data)
        try:
            pixels = read_image(path, (geometry.height, geometry.width))
        except LongtakeError as error:
            raise LongtakeError("image: damaged, or not a PNG, JPEG or WebP file") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1

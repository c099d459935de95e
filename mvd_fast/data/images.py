"""What an image file is, and its pixels: everything that touches image formats outside DALI (Pillow)."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mvd_fast.data.media import BadFile

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Facts of an image file, from its header."""

    width: int
    height: int
    codec: str


# What a complete file of a format ends with, within its last bytes (some writers append padding).
IMAGE_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
ENDING_WITHIN = 4096


def probe_image(data: np.ndarray) -> ImageInfo:
    """Facts of an encoded image, uint8 [size]. Raises BadFile: not an image, or cut off."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            (width, height), codec = image.size, image.format or ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadFile(f"is not a readable image ({type(error).__name__})") from error
    ending = IMAGE_ENDINGS.get(codec)
    if ending and ending not in data[-ENDING_WITHIN:].tobytes():
        raise BadFile(f"is truncated: the {codec} end marker is missing")
    return ImageInfo(width, height, codec)


def decode_image(data: np.ndarray) -> np.ndarray:
    """An encoded image as RGB, uint8 [H, W, 3], by Pillow. Raises BadFile when it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadFile(f"cannot be decoded ({str(error).lower()})") from error

"""What an image file is, and its pixels: everything that touches image formats outside DALI (Pillow)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mvd_fast.data.containers import BadFile

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# Formats that DALI decodes to the same pixels as `decode_image` does, up to 8 bits a channel and in no inks (DALI takes
# 16-bit PNG to 8 bits with another rounding). It does not scale PNM's maxval, averages TIFF's alpha with its grey, and
# has no GIF.
DALI_FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP"})

JPEG_START, PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
PNG_DEPTH = 24  # byte of a PNG that holds its bits per channel
# A byte 0xff and what names a segment; not 0xff00 (a stuffed byte of the scan) and not a restart marker.
JPEG_SEGMENT = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
JPEG_END, JPEG_WITHOUT_LENGTH = 0xD9, 0x01

# Tags of TIFF, and values of them.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, UNSIGNED = 0, 1


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Facts of an image file, from its header. `is_plain`: DALI shows the same pixels as `decode_image`."""

    width: int
    height: int
    codec: str
    is_plain: bool


def probe_image(data: np.ndarray) -> ImageInfo:
    """Facts of an encoded image, uint8 [size]. Raises BadFile: not an image, cut off, or pixels without a known range.

    Bytes behind the end of a JPEG or PNG (a motion photo's video, other pictures, padding) do not matter.
    """
    image = _opened(data, "is not a readable image")
    _require_known_range(image)
    plain = image.format in DALI_FORMATS and image.mode != "CMYK" and not _is_deep_png(data)
    if data[: len(JPEG_START)].tobytes() == JPEG_START:
        _require_jpeg_end(data)
    elif data[: len(PNG_START)].tobytes() == PNG_START:
        _require_png_end(data)
    return ImageInfo(*image.size, image.format or "", plain)


def decode_image(data: np.ndarray) -> np.ndarray:
    """An encoded image as RGB, uint8 [H, W, 3], by Pillow. Raises BadFile when it cannot be decoded.

    Black and white of the file's range become 0 and 255, whatever its depth. Alpha is dropped and orientation tags stay
    unused, as in the field's image folders. Of several pictures in one file the first is taken.
    """
    image = _opened(data, "cannot be decoded", load=True)
    _require_known_range(image)
    if image.mode.startswith("I"):
        return np.repeat(_grey(image)[..., None], 3, axis=2)
    if image.mode == "P":  # transparency that comes with a palette makes a direct conversion warn
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _opened(data: np.ndarray, failure: str, load: bool = False) -> Image.Image:
    """The image by its header, with `load` its pixels, too."""
    try:
        image = Image.open(io.BytesIO(data))
        if load:
            image.load()
    except Image.UnidentifiedImageError as error:
        raise BadFile(f"{failure} (Pillow knows no such format or pixels)") from error
    except Exception as error:  # damage makes Pillow raise TypeError, RuntimeError, SyntaxError, ...
        raise BadFile(f"{failure} ({str(error).lower() or type(error).__name__})") from error
    return image


def _require_known_range(image: Image.Image) -> None:
    """Floats, signed numbers and 32-bit ones may mean anything: which of them are black and white, no header says."""
    tags = _tiff_tags(image)
    if image.mode == "F":
        pixels = "floating-point"
    elif max(tags.get(SAMPLE_FORMAT, (UNSIGNED,))) != UNSIGNED:
        pixels = "signed"
    elif image.mode == "I" and tags:
        pixels = "32-bit"
    else:
        return
    raise BadFile(f"has {pixels} pixels, whose black and white are not known; store it with 8 or 16 bits a channel")


def _grey(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] of an image with more than 8 bits of grey: scaled, not clipped."""
    tags = _tiff_tags(image)
    white = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1  # Pillow scales 16-bit PNM to this, too
    values = np.asarray(image).astype(np.uint32)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    return ((values * 255 + white // 2) // white).astype(np.uint8)


def _tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    return getattr(image, "tag_v2", {})


def _is_deep_png(data: np.ndarray) -> bool:
    return data[: len(PNG_START)].tobytes() == PNG_START and data[PNG_DEPTH] > 8


def _require_jpeg_end(data: np.ndarray) -> None:
    """Goes from segment to segment: the end marker of a thumbnail inside of one, or of what follows, is not the end."""
    at = 2
    while segment := JPEG_SEGMENT.search(data, at):
        at, code = segment.end(), segment[0][1]
        if code == JPEG_END:
            return
        if code != JPEG_WITHOUT_LENGTH:
            at += int.from_bytes(data[at : at + 2].tobytes(), "big")
    raise BadFile("is truncated: the JPEG end marker is missing")


def _require_png_end(data: np.ndarray) -> None:
    at = len(PNG_START)
    while at + 8 <= data.size:
        length, kind = int.from_bytes(data[at : at + 4].tobytes(), "big"), data[at + 4 : at + 8].tobytes()
        if kind == b"IEND":
            return
        if not kind.isalpha():
            raise BadFile("is damaged: a PNG chunk has no name")
        at += 12 + length
    raise BadFile("is truncated: the PNG end chunk is missing")

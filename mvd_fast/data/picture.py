"""How a decoder's picture is shown: square pixels, upright, RGB by its own matrix and range, as players show it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import Interpolation, VideoReformatter

# libswscale's SWS_FULL_CHR_H_INT and SWS_ACCURATE_RND: with them PyAV's colours equal DALI's CPU decoder bit for bit.
# Without them chroma is upsampled to the nearest pixel, and edges of saturated colours are off by up to a third.
COLOUR_CONVERSION = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

# Matrices (ITU-T H.273, table 4) that libswscale knows: RGB, BT.709, none stated (taken as BT.601, as FFmpeg does),
# FCC, BT.601 in its two names, SMPTE 240M, BT.2020.
MATRICES = frozenset({0, 1, 2, 4, 5, 6, 7, 9})
BT601 = frozenset({2, 5, 6})
FULL_RANGE = 2
DALI_FORMATS = frozenset({"yuv420p", "yuv422p", "yuvj420p", "yuvj422p"})

MOST_STRETCHED = 10  # times; a pixel aspect ratio beyond that is no camera's
MOST_SKEWED = 0.02  # of a turn by a multiple of 90 degrees


def _unnamed(cls: type[Type], value: int) -> Type:
    member = object.__new__(cls)
    member._name_, member._value_ = f"UNNAMED_{value}", value
    return member


# PyAV 18.1 has no names for FFmpeg's latest kinds of side data (EXIF among them), and of a frame that has such it reads
# none at all.
Type._missing_ = classmethod(_unnamed)


class UnknownPicture(ValueError):
    """A picture that cannot be shown rightly; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Presentation:
    """`scaled`: width and height of the picture with square pixels, before it is turned: first transposed, then
    mirrored from left to right, then upside down."""

    scaled: tuple[int, int]
    is_transposed: bool = False
    is_mirrored: bool = False
    is_upside_down: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as shown."""
        return self.scaled[::-1] if self.is_transposed else self.scaled

    @property
    def turns(self) -> bool:
        return self.is_transposed or self.is_mirrored or self.is_upside_down

    def rgb(self, frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
        """The frame as shown, uint8 [H, W, 3]; one of another size is resized. Raises UnknownPicture."""
        if frame.colorspace not in MATRICES:
            raise UnknownPicture(f"has colours in a matrix that is not supported (number {frame.colorspace} of H.273)")
        width, height = self.scaled
        try:
            converted = converter.reformat(frame, width, height, "rgb24", interpolation=COLOUR_CONVERSION, threads=1)
        except (av.FFmpegError, ValueError) as error:
            raise UnknownPicture(f"has colours that cannot be converted ({frame.format.name}: {error})") from error
        return self._turned(converted.to_ndarray())

    def _turned(self, pixels: np.ndarray) -> np.ndarray:
        if self.is_transposed:
            pixels = pixels.transpose(1, 0, 2)
        return pixels[:: -1 if self.is_upside_down else 1, :: -1 if self.is_mirrored else 1]


def presentation(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> Presentation:
    """Of a file, from its first frame and its pixels' width : height. Raises UnknownPicture.

    The frame keeps its height and gets the width that square pixels give it, then it is turned as its display matrix
    says (ISO/IEC 14496-12, 8.2.2).
    """
    aspect = pixel_aspect or Fraction(1)
    if not Fraction(1, MOST_STRETCHED) <= aspect <= MOST_STRETCHED:
        raise UnknownPicture(f"has pixels of {aspect.numerator}:{aspect.denominator}, which no player can show")
    return Presentation((max(1, round(frame.width * aspect)), frame.height), *_turn(frame))


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transposed, mirrored, upside down) of the display matrix: x' = a x + c y, y' = b x + d y."""
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    straight, across = abs(a) + abs(d), abs(b) + abs(c)
    if min(straight, across) > MOST_SKEWED * max(straight, across):
        raise UnknownPicture(f"is turned by {abs(frame.rotation)} degrees; only multiples of 90 can be shown")
    return (True, c < 0, b < 0) if across > straight else (False, a < 0, d < 0)


def is_plain(frame: av.VideoFrame) -> bool:
    """Whether DALI's decoder shows the frame's colours rightly: it takes all for BT.601, and range from the format."""
    is_full = frame.format.name.startswith("yuvj")
    return (
        frame.format.name in DALI_FORMATS and frame.colorspace in BT601 and is_full == (frame.color_range == FULL_RANGE)
    )

"""H.264 streams of kinds that no encoder here writes: bits put together by hand (ITU-T H.264, 7.3).

Pictures are uncompressed (I_PCM), so every kind of order, field and marking is a matter of headers alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import av
import numpy as np

IDR, OTHER, SPS, PPS, RECOVERY = 5, 1, 7, 8, 6
FRAME, TOP, BOTTOM = None, 0, 1
ORDER_BITS = 8  # of pic_order_cnt_lsb and of frame_num


class Bits:
    """A string of bits that grows at its end."""

    def __init__(self) -> None:
        self.text = ""

    def u(self, count: int, value: int) -> Bits:
        self.text += f"{value:0{count}b}" if count else ""
        return self

    def ue(self, *values: int) -> Bits:
        """Unsigned exponential-Golomb numbers."""
        for value in values:
            self.u(2 * (value + 1).bit_length() - 1, value + 1)
        return self

    def closed(self) -> bytes:
        """With the stop bit, in whole bytes."""
        text = self.text + "1"
        text += "0" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big")


def unit(kind: int, content: bytes, is_reference: bool = True) -> bytes:
    """A NAL unit behind a start code."""
    escaped = re.sub(b"\0\0(?=[\0-\3])", b"\0\0\3", content)
    return b"\0\0\0\1" + bytes([kind | 0x60 * is_reference]) + escaped


def parameter_sets(width: int, height: int, has_fields: bool = False, references: int = 4) -> bytes:
    """Main profile, no VUI: nothing says how many frames have to wait to be put in order."""
    rows = height // 16 // (1 + has_fields)
    sps = Bits().u(24, 77 << 16 | 30).ue(0, ORDER_BITS - 4, 0, ORDER_BITS - 4, references).u(1, 1)
    sps.ue(width // 16 - 1, rows - 1).u(1, not has_fields)
    if has_fields:
        sps.u(1, 0)
    sps.u(1, 1).u(1, 0).u(1, 0)
    pps = Bits().ue(0, 0).u(2, 0).ue(0, 0, 0).u(3, 0).ue(0, 0, 0).u(3, 0b100)
    return unit(SPS, sps.closed()) + unit(PPS, pps.closed())


@dataclass(frozen=True)
class Picture:
    """A coded frame or field: its slice's header. `order`: of showing, in fields, from the last IDR picture on."""

    frame_number: int
    order: int
    is_idr: bool = False
    is_reference: bool = True
    field: int | None = FRAME
    has_fields: bool = False  # whether the stream may have any
    drops_earlier: bool = False  # no_output_of_prior_pics_flag of an IDR picture
    forgets_all: bool = False  # memory management operation 5: as an IDR picture, but not marked as one

    def coded(self, pixels: np.ndarray) -> bytes:
        """The picture with these pixels, uint8 [H, W, 3] RGB, of the whole frame; a field takes its own lines."""
        bits = Bits().ue(0, 7, 0).u(ORDER_BITS, self.frame_number % 2**ORDER_BITS)
        if self.has_fields:
            bits.u(1, self.field is not FRAME)
            if self.field is not FRAME:
                bits.u(1, self.field)
        if self.is_idr:
            bits.ue(0)
        bits.u(ORDER_BITS, self.order % 2**ORDER_BITS)
        if self.is_idr:
            bits.u(2, 2 * self.drops_earlier)
        elif self.is_reference:
            bits.u(1, self.forgets_all)
            if self.forgets_all:
                bits.ue(5, 0)
        bits.ue(0, 1)  # the quantiser's change; no deblocking
        lines = pixels if self.field is FRAME else pixels[self.field :: 2]
        return unit(IDR if self.is_idr else OTHER, _macroblocks(bits, lines), self.is_reference)


def _macroblocks(header: Bits, pixels: np.ndarray) -> bytes:
    planes = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").to_ndarray(format="yuv420p")
    height, width = pixels.shape[:2]
    sides = [planes[:height], *planes[height:].reshape(2, height // 2, width // 2)]
    tiles = []
    for side, size in zip(sides, (16, 8, 8), strict=True):
        cut = side.reshape(height // 16, size, width // 16, size).swapaxes(1, 2)
        tiles.append(cut.reshape(-1, size * size))
    content = np.concatenate(tiles, axis=1)
    header.ue(25)
    header.u(-len(header.text) % 8, 0)
    first = int(header.text, 2).to_bytes(len(header.text) // 8, "big")
    later = int(Bits().ue(25).u(7, 0).text, 2).to_bytes(2, "big")
    return first + later.join(tile.tobytes() for tile in content) + b"\x80"


def recovery_point() -> bytes:
    """The note that decoding may begin here."""
    message = Bits().ue(0).u(4, 0b1000).closed()
    return unit(RECOVERY, bytes([6, len(message)]) + message + b"\x80")

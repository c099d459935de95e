"""What a packet shows, read from its own bits: a container's flags and time stamps are no facts of the decoder.

`reader(codec, extradata)` gives an object whose `look(packet)` says how many frames the decoder shows for each packet
and whether decoding may begin there. Where the bits do not settle that, `is_certain` turns false: then only decoding
the file from its start tells which frame is which. Codecs without a reader (MPEG-1, -2 and -4 with their open groups,
packed B-frames and null packets, Theora, WMV, ...) are never certain.

Sources: ITU-T H.264 (7.3), H.265 (7.3), RFC 6386 (VP8, 9.1), the VP9 bitstream specification 0.7 (6.2, annex B), the
AV1 bitstream specification (5.3 to 5.9).
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import lru_cache
from typing import NamedTuple, Protocol

Bytes = bytes | memoryview


class Shown(NamedTuple):
    """What a packet is to the decoder.

    frames: how many frames it shows. entry: a decoder that begins here shows the same frames as one that began at the
    start of the file, except `leading` ones. leading: how many of its frames are shown before the entry that precedes
    it in the file; a decoder that begins at that entry leaves them out. picture: size and colours, where the packet
    states them.
    """

    frames: int
    entry: bool = False
    leading: int = 0
    picture: tuple[int, ...] = ()


class Reader(Protocol):
    """Reads the packets of one stream, in the file's order."""

    is_certain: bool

    def look(self, packet: Bytes) -> Shown: ...


def reader(codec: str, extradata: Bytes | None, intra_only: bool) -> Reader | None:
    """The reader of a stream; None for codecs of which only the decoder knows what a packet shows.

    `codec`: FFmpeg's name. `extradata`: the stream's, with parameter sets. `intra_only`: every packet is a whole frame.
    """
    if codec in READERS:
        return READERS[codec](bytes(extradata or b""))
    return IntraReader(b"") if intra_only else None


class Bits:
    """A big-endian bit string that is read from its front; past its end it gives zeros."""

    def __init__(self, data: Bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def u(self, count: int) -> int:
        """An unsigned number of `count` bits."""
        self._left -= count
        value = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return value & ((1 << count) - 1)

    def ue(self) -> int:
        """An unsigned exponential-Golomb number (H.264, 9.1)."""
        zeros = 0
        while self._left > 0 and not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)

    def se(self) -> int:
        """A signed exponential-Golomb number."""
        number = self.ue()
        return (number + 1) // 2 if number % 2 else -(number // 2)


class IntraReader:
    """Codecs in which every packet is one frame that needs no other."""

    def __init__(self, extradata: bytes) -> None:
        self.is_certain = True

    def look(self, packet: Bytes) -> Shown:
        return Shown(1, entry=True)

    def has_picture(self, packet: Bytes) -> bool:
        return True


class MjpegReader(IntraReader):
    """Motion JPEG: the frame header (ITU-T T.81, B.2.2) tells the picture's size and its components' sampling. Not
    certain where the size changes: a decoder that begins at a lower picture than the container's takes it for a field.
    """

    def __init__(self, extradata: bytes) -> None:
        super().__init__(extradata)
        self._size: tuple[int, ...] = ()

    def look(self, packet: Bytes) -> Shown:
        header = _jpeg_header(packet)
        if any(header[1:3]) and any(header[3:5]):  # of a damaged header nothing follows
            self.is_certain = self.is_certain and self._size in ((), header[1:5])
            self._size = header[1:5]
        return Shown(1, entry=True, picture=header)


def _jpeg_header(packet: Bytes) -> tuple[int, ...]:
    """Bit depth, height and width in two bytes each, number of components, and their identity and sampling."""
    at = 2
    while at + 9 < len(packet) and packet[at] == 0xFF:
        marker = packet[at + 1]
        length = int.from_bytes(packet[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return tuple(packet[at + 4 : at + 2 + length])
        at += 2 + length if marker != 0xFF else 1
    return ()


class Vp8Reader(IntraReader):
    """VP8: a frame may be hidden (an alternate reference); a key frame replaces all that is remembered."""

    def look(self, packet: Bytes) -> Shown:
        is_key, is_shown = not packet[0] & 1, packet[0] >> 4 & 1
        return Shown(is_shown, entry=is_key and bool(is_shown), picture=tuple(packet[6:10]) if is_key else ())


class Vp9Reader(IntraReader):
    """VP9: a packet may be a superframe of several frames, hidden ones among them."""

    def look(self, packet: Bytes) -> Shown:
        shown, entry, picture = 0, False, ()
        for number, frame in enumerate(_vp9_frames(packet)):
            bits = Bits(frame[:24])
            if bits.u(2) != 2:
                self.is_certain = False
                return Shown(0)
            profile = bits.u(1) | bits.u(1) << 1
            if profile == 3:
                bits.u(1)
            if bits.u(1):  # shows an earlier frame again
                shown += 1
                continue
            is_key, is_shown, is_resilient = not bits.u(1), bits.u(1), bits.u(1)
            shown += is_shown
            if is_key:
                entry = entry or (number == 0 and bool(is_shown))
                picture = _vp9_picture(bits, profile)
            elif _vp9_may_resize(bits, is_shown, is_resilient, profile):
                picture = (*picture, -1)  # another size than a key frame's, or one that is not followed up here
        return Shown(shown, entry, picture=picture)


def _vp9_frames(packet: Bytes) -> list[Bytes]:
    """The frames of a superframe, or the packet itself."""
    marker = packet[-1]
    count, size = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = 2 + count * size
    if marker & 0xE0 != 0xC0 or len(packet) < index or packet[-index] != marker:
        return [packet]
    frames, at = [], 0
    for number in range(count):
        place = len(packet) - index + 1 + number * size
        length = int.from_bytes(packet[place : place + size], "little")
        if length:
            frames.append(packet[at : at + length])
        at += length
    return frames


def _vp9_picture(bits: Bits, profile: int) -> tuple[int, ...]:
    """Of a key frame: bit depth, colour space, range, subsampling, width, height."""
    bits.u(24)  # sync code
    depth = bits.u(1) if profile >= 2 else 0
    space = bits.u(3)
    if space != 7:
        colours = (bits.u(1), bits.u(3) if profile in (1, 3) else 0)
    else:
        colours = (1, bits.u(1) if profile in (1, 3) else 0)
    return depth, space, *colours, bits.u(16), bits.u(16)


def _vp9_may_resize(bits: Bits, is_shown: int, is_resilient: int, profile: int) -> bool:
    """Whether a frame that is no key frame gives a size of its own instead of a reference's."""
    is_intra = 0 if is_shown else bits.u(1)
    if not is_resilient:
        bits.u(2)
    if is_intra:
        return True
    bits.u(8 + 3 * 4)  # which references are refreshed and used
    return not any(bits.u(1) for _ in range(3))


class Av1Reader:
    """AV1: a packet is a temporal unit of several frames, hidden ones and repeats of earlier ones among them."""

    def __init__(self, extradata: bytes) -> None:
        self.is_certain = True
        self._is_still, self._sequence = False, b""
        self._is_configured = len(extradata) > 4  # av1C with a sequence header

    def look(self, packet: Bytes) -> Shown:
        shown, entry, has_sequence, first = 0, False, self._is_configured, True
        for kind, layer, content in _obus(packet):
            if kind == 1:
                has_sequence = True
                self.is_certain = self.is_certain and self._sequence in (b"", bytes(content))
                self._is_still, self._sequence = bool(content[0] >> 3 & 1), bytes(content)
            if layer:
                self.is_certain = False  # which layers are shown is up to the decoder
            if kind not in (3, 6):  # a frame header, or a frame
                continue
            bits = Bits(content[:2])
            if self._is_still:
                shown, entry = shown + 1, True
            elif bits.u(1):
                shown += 1
            else:
                frame_type, is_shown = bits.u(2), bits.u(1)
                shown += is_shown
                entry = entry or (first and has_sequence and frame_type == 0 and bool(is_shown))
            first = False
        return Shown(shown, entry)


def _obus(packet: Bytes) -> Iterator[tuple[int, int, Bytes]]:
    """(type, spatial layer, content) of the units of a packet; redundant headers have a type of their own."""
    at = 0
    while at < len(packet):
        header = packet[at]
        has_extension, has_size = header >> 2 & 1, header >> 1 & 1
        layer = packet[at + 1] >> 3 & 3 if has_extension and at + 1 < len(packet) else 0
        at += 1 + has_extension
        size = len(packet) - at
        if has_size:
            size = shift = 0
            while at < len(packet):
                byte, at = packet[at], at + 1
                size, shift = size | (byte & 0x7F) << shift, shift + 7
                if not byte & 0x80:
                    break
        yield header >> 3 & 15, layer, packet[at : at + size]
        at += size


class _NalReader:
    """What H.264 and H.265 share: units behind start codes, or behind their length as the extradata says."""

    def __init__(self, extradata: bytes) -> None:
        self.is_certain = True
        self._sets: dict[tuple[int, int], bytes] = {}  # (unit type, number) of parameter sets
        self._length_size = 0
        has_lengths = extradata[:1] == b"\1"
        if has_lengths:
            self._length_size = (extradata[self._SIZE_AT] & 3) + 1 if len(extradata) > self._SIZE_AT else 4
        for unit in self._stored_sets(extradata) if has_lengths else _between_start_codes(extradata):
            self._keep_set(unit)

    _SIZE_AT: int

    def _stored_sets(self, extradata: bytes) -> Iterator[bytes]:
        raise NotImplementedError

    def _keep_set(self, unit: Bytes) -> None:
        raise NotImplementedError

    def _units(self, packet: Bytes) -> Iterator[Bytes]:
        if not self._length_size:
            yield from _between_start_codes(bytes(packet))
            return
        at = 0
        while at + self._length_size < len(packet):
            length = int.from_bytes(packet[at : at + self._length_size], "big")
            at += self._length_size
            if not length or at + length > len(packet):
                self.is_certain = False
                return
            yield packet[at : at + length]
            at += length

    def has_picture(self, packet: Bytes) -> bool:
        """Whether anything of a picture is in it, or what cannot be read; else nothing is lost where a decoder refuses
        it."""
        units = list(self._units(packet))
        unread = len(packet) - sum(self._length_size + len(unit) for unit in units) if self._length_size else not units
        return unread > 0 or any(self._is_slice(unit) for unit in units)

    def _is_slice(self, unit: Bytes) -> bool:
        raise NotImplementedError

    def _keep(self, kind: int, number: int, unit: bytes) -> None:
        """A parameter set; one that changes in mid-stream may change the size, and what is still shown before it."""
        if self._sets.setdefault((kind, number), unit) != unit:
            self.is_certain = False


def _between_start_codes(data: bytes) -> Iterator[bytes]:
    start = data.find(b"\0\0\1")
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        unit = data[start + 3 : end if end >= 0 else len(data)].rstrip(b"\0")
        if unit:
            yield unit
        start = end


def _without_escapes(unit: Bytes) -> bytes:
    return bytes(unit).replace(b"\0\0\3", b"\0\0")


class _Sps(NamedTuple):
    """What of H.264's sequence parameter set is needed to read an IDR slice's header, and the order of frames."""

    frame_number_bits: int
    order_type: int  # pic_order_cnt_type: with 2, frames are shown in the order of decoding
    order_bits: int
    has_order_deltas: bool
    has_planes: bool
    is_progressive: bool
    has_reorder_limit: bool


class _Pps(NamedTuple):
    """Likewise of the picture parameter set; `sps` is the number of its sequence parameter set."""

    sps: int
    has_bottom_order: bool
    has_groups: bool
    has_redundant: bool


HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})


class H264Reader(_NalReader):
    """H.264: decoding begins at IDR pictures alone. Not certain: fields, B-frames without a stated reorder limit, IDR
    pictures that throw earlier ones away, parameter sets that change, more than one picture in a packet."""

    _SIZE_AT = 4

    def _is_slice(self, unit: Bytes) -> bool:
        return unit[0] & 31 in (1, 2, 3, 4, 5, 20)

    _order = 0  # the last picture's place in the order of showing, its lower bits

    def _stored_sets(self, extradata: bytes) -> Iterator[bytes]:
        at = 5
        for mask in (31, 255):  # sequence parameter sets, then picture parameter sets
            count, at = (extradata[at] & mask if at < len(extradata) else 0), at + 1
            for _ in range(count):
                length = int.from_bytes(extradata[at : at + 2], "big")
                yield extradata[at + 2 : at + 2 + length]
                at += 2 + length

    def _keep_set(self, unit: Bytes) -> None:
        kind = unit[0] & 31
        if kind == 7:
            self._keep(7, Bits(_without_escapes(unit[4:12])).ue(), bytes(unit))
        elif kind == 8:
            self._keep(8, Bits(unit[1:5]).ue(), bytes(unit))

    def look(self, packet: Bytes) -> Shown:
        pictures, is_idr = 0, False
        for unit in self._units(packet):
            kind = unit[0] & 31
            if kind in (7, 8):
                self._keep_set(unit)
            elif kind in (1, 5):
                head = Bits(_without_escapes(unit[1:48]))
                first, slice_type, number = head.ue(), head.ue() % 5, head.ue()
                pictures += first == 0
                is_idr = is_idr or kind == 5
                self._judge(head, number, slice_type, kind == 5)
            elif kind in (2, 3, 4):  # data partitions
                self.is_certain = False
        self.is_certain = self.is_certain and pictures <= 1
        return Shown(pictures, entry=is_idr)

    def _judge(self, head: Bits, number: int, slice_type: int, is_idr: bool) -> None:
        """Turns uncertain where this slice does so; `head` stands behind its parameter set's number."""
        found = self._sets.get((8, number))
        pps = _h264_pps(found) if found else None
        found = self._sets.get((7, pps.sps)) if pps else None
        sps = _h264_sps(found) if found else None
        if sps is None or pps is None or not sps.is_progressive or pps.has_groups:
            self.is_certain = False
        else:
            may_reorder = sps.order_type != 2 and (slice_type == 1 or self._goes_back(copy(head), sps, is_idr))
            is_guessed = may_reorder and not sps.has_reorder_limit
            if is_guessed or (is_idr and _drops_earlier_frames(head, sps, pps)):
                self.is_certain = False

    def _goes_back(self, head: Bits, sps: _Sps, is_idr: bool) -> bool:
        """Whether a picture is shown before one that precedes it in the file: not only B-frames are put in order."""
        if sps.order_type == 1:
            return sps.has_order_deltas
        head.u(2 * sps.has_planes + sps.frame_number_bits)
        if is_idr:
            head.ue()
        order = head.u(sps.order_bits)
        step = (order - self._order) % (1 << sps.order_bits)
        self._order = order
        return not is_idr and step >= 1 << sps.order_bits - 1


@lru_cache(maxsize=64)
def _h264_pps(unit: bytes) -> _Pps:
    bits = Bits(_without_escapes(unit[1:]))
    bits.ue()
    sps = bits.ue()
    bits.u(1)
    has_bottom, has_groups = bool(bits.u(1)), bits.ue() > 0
    bits.ue(), bits.ue(), bits.u(3), bits.se(), bits.se(), bits.se(), bits.u(2)
    return _Pps(sps, has_bottom, has_groups, bool(bits.u(1)))


@lru_cache(maxsize=64)
def _h264_sps(unit: bytes) -> _Sps:
    profile, bits = unit[1], Bits(_without_escapes(unit[4:]))
    bits.ue()
    has_planes = False
    if profile in HIGH_PROFILES:
        chroma = bits.ue()
        has_planes = chroma == 3 and bool(bits.u(1))
        bits.ue(), bits.ue(), bits.u(1)
        if bits.u(1):
            for number in range(12 if chroma == 3 else 8):
                if bits.u(1):
                    _skip_scaling_list(bits, 16 if number < 6 else 64)
    frame_number_bits = bits.ue() + 4
    order_type, order_bits, has_deltas = bits.ue(), 0, False
    if order_type == 0:
        order_bits = bits.ue() + 4
    elif order_type == 1:
        has_deltas = not bits.u(1)
        bits.se(), bits.se()
        for _ in range(min(bits.ue(), 255)):
            bits.se()
    bits.ue(), bits.u(1), bits.ue(), bits.ue()
    is_progressive = bool(bits.u(1))
    if not is_progressive:
        bits.u(1)
    bits.u(1)
    if bits.u(1):
        bits.ue(), bits.ue(), bits.ue(), bits.ue()
    has_limit = bool(bits.u(1)) and _states_reorder_limit(bits)
    return _Sps(frame_number_bits, order_type, order_bits, has_deltas, has_planes, is_progressive, has_limit)


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.se()) % 256
        last = following or last


def _states_reorder_limit(bits: Bits) -> bool:
    """Whether H.264's usability information (E.1) has a bitstream restriction."""
    if bits.u(1) and bits.u(8) == 255:  # pixel aspect ratio
        bits.u(32)
    if bits.u(1):  # overscan
        bits.u(1)
    if bits.u(1):  # colours
        bits.u(4)
        if bits.u(1):
            bits.u(24)
    if bits.u(1):  # chroma location
        bits.ue(), bits.ue()
    if bits.u(1):  # timing
        bits.u(65)
    has_buffering = [bool(bits.u(1)) and _skip_hrd(bits) for _ in range(2)]
    if any(has_buffering):
        bits.u(1)
    bits.u(1)
    return bool(bits.u(1))


def _skip_hrd(bits: Bits) -> bool:
    count = min(bits.ue(), 31) + 1
    bits.u(8)
    for _ in range(count):
        bits.ue(), bits.ue(), bits.u(1)
    bits.u(20)
    return True


def _drops_earlier_frames(head: Bits, sps: _Sps, pps: _Pps) -> bool:
    """no_output_of_prior_pics_flag of an IDR slice (7.3.3); `head` stands behind its parameter set's number."""
    head.u(2 * sps.has_planes)
    head.u(sps.frame_number_bits)
    head.ue()
    if sps.order_type == 0:
        head.u(sps.order_bits)
    has_delta = sps.order_type == 0 or (sps.order_type == 1 and sps.has_order_deltas)
    if sps.order_type == 1 and has_delta:
        head.se()
    if has_delta and pps.has_bottom_order:
        head.se()
    if pps.has_redundant:
        head.ue()
    return bool(head.u(1))


# Unit types of H.265 (table 7-1).
RASL, BLA, IDR, CRA, END_OF_SEQUENCE, END_OF_STREAM = (8, 9), (16, 17, 18), (19, 20), 21, 36, 37


class HevcReader(_NalReader):
    """H.265: decoding begins at IDR and CRA pictures; a CRA's leading pictures are shown before it and left out then.

    Not certain: pictures that are not shown (pic_output_flag), ones that throw earlier ones away, broken links, ends of
    sequences, parameter sets that change, a stream whose first picture is a CRA with leading pictures.
    """

    _SIZE_AT = 21

    def _is_slice(self, unit: Bytes) -> bool:
        return unit[0] >> 1 & 63 < 32

    def __init__(self, extradata: bytes) -> None:
        self._seen = 0  # pictures
        self._begins_open = False
        super().__init__(extradata)

    def _stored_sets(self, extradata: bytes) -> Iterator[bytes]:
        at = 23
        for _ in range(extradata[22] if len(extradata) > 22 else 0):
            count, at = int.from_bytes(extradata[at + 1 : at + 3], "big"), at + 3
            for _ in range(count):
                length = int.from_bytes(extradata[at : at + 2], "big")
                yield extradata[at + 2 : at + 2 + length]
                at += 2 + length

    def _keep_set(self, unit: Bytes) -> None:
        kind = unit[0] >> 1 & 63
        if len(unit) > 2 and not _hevc_layer(unit) and kind in (33, 34):
            # Of sequence parameter sets there is one: their number stands behind what is not read here.
            bits = Bits(_without_escapes(unit[2:8]))
            number = bits.ue() if kind == 34 else 0
            self._keep(kind, number, bytes(unit))
            if kind == 34:
                bits.ue(), bits.u(1)
                self.is_certain = self.is_certain and not bits.u(1)  # output_flag_present_flag

    def look(self, packet: Bytes) -> Shown:
        pictures, kind_of_picture = 0, 0
        for unit in self._units(packet):
            kind = unit[0] >> 1 & 63
            if kind in (END_OF_SEQUENCE, END_OF_STREAM):  # two bytes long
                self.is_certain = False
            if len(unit) < 3 or _hevc_layer(unit):
                continue
            if 32 <= kind <= 34:
                self._keep_set(unit)
            elif kind < 32 and unit[2] >> 7:  # the first slice of a picture
                pictures, kind_of_picture = pictures + 1, kind
                self._judge(kind, unit)
        entry = kind_of_picture in (*IDR, CRA) and pictures == 1
        return Shown(pictures, entry, leading=pictures if kind_of_picture in RASL else 0)

    def _judge(self, kind: int, unit: Bytes) -> None:
        drops_earlier = 16 <= kind <= 23 and unit[2] >> 6 & 1
        if kind in BLA or (drops_earlier and self._seen):
            self.is_certain = False
        if not self._seen:
            self._begins_open = kind == CRA
        elif 16 <= kind <= 21:
            self._begins_open = False
        if kind in RASL and self._begins_open:
            self.is_certain = False
        self._seen += 1


def _hevc_layer(unit: Bytes) -> int:
    return (unit[0] & 1) << 5 | unit[1] >> 3


READERS = {
    "mjpeg": MjpegReader,
    "vp8": Vp8Reader,
    "vp9": Vp9Reader,
    "av1": Av1Reader,
    "h264": H264Reader,
    "hevc": HevcReader,
}

"""What happens to videos on their way: packets lost, shown again, hidden, packed or at other times; edit lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import av
from numbered_videos import RATE

Change = Callable[[list[av.Packet]], Iterable[av.Packet]]


def key_flags(flag: bool) -> Change:
    """Every packet says that decoding may begin there (or none does); the bits know better."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        for packet in packets:
            packet.is_keyframe = flag
        return packets

    return change


def without(first: int, last: int) -> Change:
    """Packets `first` to `last` - 1 are lost."""
    return lambda packets: packets[:first] + packets[last:]


def broken(number: int, change: Callable[[bytes], bytes]) -> Change:
    """The content of one packet is changed."""
    return lambda packets: [
        copied(packet, change(bytes(packet))) if i == number else packet for i, packet in enumerate(packets)
    ]


def at_times(time_of: Callable[[int], int]) -> Change:
    """Packet i, in a stream without B-frames, gets the time `time_of(i)`, in frames."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = round(time_of(number) / RATE / packet.time_base)
        return packets

    return change


def later(seconds: float, from_packet: int = 0) -> Change:
    """The clock jumps by so much, at a packet."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        for packet in packets[from_packet:]:
            packet.pts += round(seconds / packet.time_base)
            packet.dts += round(seconds / packet.time_base)
        return packets

    return change


def copied(packet: av.Packet, content: bytes, frames_later: int = 0) -> av.Packet:
    """Another content at another time."""
    new = av.Packet(content)
    new.time_base, new.is_keyframe = packet.time_base, packet.is_keyframe
    shift = round(frames_later / RATE / packet.time_base)
    new.pts, new.dts, new.duration = packet.pts + shift, packet.dts + shift, packet.duration
    return new


EXIF = b"\xff\xe1\0\x22Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x01\0\0\0\0\0\0"  # orientation 1


def with_exif(packets: list[av.Packet]) -> list[av.Packet]:
    """The JPEGs of a stream say how they were taken, as those of cameras and of pictures that were joined do."""
    return [copied(packet, bytes(packet)[:2] + EXIF + bytes(packet)[2:]) for packet in packets]


def hidden(*numbers: int) -> Change:
    """These packets of a VP8 stream show nothing (RFC 6386, 9.1: show_frame)."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        return [
            copied(packet, bytes([bytes(packet)[0] & ~0x10]) + bytes(packet)[1:]) if number in numbers else packet
            for number, packet in enumerate(packets)
        ]

    return change


def shown_again(at: Sequence[int], slot: int) -> Change:
    """Before each of these packets of a VP9 stream, one that shows reference `slot` again (show_existing_frame)."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        changed: list[av.Packet] = []
        for number, packet in enumerate(packets):
            if number in at:
                again = copied(packet, bytes([0b10001000 | slot]), len(changed) - number)
                again.is_keyframe = False
                changed.append(again)
            changed.append(copied(packet, bytes(packet), len(changed) - number))
        return changed

    return change


NOT_CODED = b"\0\0\1\xb6" + bytes([0b01010000, 0b01011111])  # vop_coded 0, at 25 frames a second


def packed(packets: list[av.Packet]) -> list[av.Packet]:
    """MPEG-4 with one B-frame between others, as DivX packs it: B-frames behind the frame that they wait for, and
    an empty frame (vop_coded 0) where they stood."""
    changed: list[av.Packet] = []
    for packet in packets:
        content = bytes(packet)
        at = content.index(b"\0\0\1\xb6")
        if not changed:
            content = content[:at] + b"\0\0\1\xb2DivX503b1393p" + content[at:]
        if content[at + 4] >> 6 == 2:  # a B-frame
            changed[-1] = copied(changed[-1], bytes(changed[-1]) + content)
            content = NOT_CODED
        changed.append(copied(packet, content))
    for number, packet in enumerate(changed):
        packet.pts = packet.dts = changed[0].dts + round(number / RATE / packet.time_base)
    return changed


def timed(shown: Sequence[int], delay: int = 0, of_each: int = 1) -> Change:
    """Packet i is shown as frame `shown[i // of_each]`; it is decoded `delay` frames before its own place."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        for number, packet in enumerate(packets):
            packet.pts = round(shown[number // of_each] / RATE / packet.time_base)
            packet.dts = round((number / of_each - delay) / RATE / packet.time_base)
            packet.duration = round(1 / RATE / packet.time_base)
        return packets

    return change


def merged(groups: Sequence[range]) -> Change:
    """Packets of a group become one, at the first one's time."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        return [copied(packets[group[0]], b"".join(bytes(packets[i]) for i in group)) for group in groups]

    return change


def in_turn(*changes: Change) -> Change:
    def change(packets: list[av.Packet]) -> Iterable[av.Packet]:
        for step in changes:
            packets = list(step(packets))
        return packets

    return change


def nal_units(content: bytes) -> list[bytes]:
    """The units of a packet of MP4 or Matroska, without their lengths."""
    units = []
    while content:
        size = int.from_bytes(content[:4], "big")
        units.append(content[4 : 4 + size])
        content = content[4 + size :]
    return units


def with_units(change_units: Callable[[int, list[bytes]], list[bytes]]) -> Change:
    """The units of each packet changed: `change_units(number, units)`."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        changed = []
        for number, packet in enumerate(packets):
            units = change_units(number, nal_units(bytes(packet)))
            changed.append(copied(packet, b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)))
        return changed

    return change


def ended_before(kind: int, end: bytes) -> Change:
    """HEVC: the unit `end` before every packet but the first that has a unit of this kind."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        kinds = [{unit[0] >> 1 for unit in nal_units(bytes(packet))} for packet in packets] + [set()]
        ended = with_units(lambda number, units: [*units, end] if kind in kinds[number + 1] else units)
        return list(ended(packets))

    return change


def with_empty_frames(*numbers: int) -> Change:
    """Before each of these packets of an MPEG-4 stream one that is not coded: it shows nothing."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        changed: list[av.Packet] = []
        for number, packet in enumerate(packets):
            if number in numbers:
                changed.append(copied(packet, NOT_CODED, len(changed) - number))
            changed.append(copied(packet, bytes(packet), len(changed) - number))
        return changed

    return change


# ---- what may happen to a file's bytes ----


def transport_packets(data: bytes) -> list[bytes]:
    return [data[at : at + 188] for at in range(0, len(data), 188)]


def with_edits(mp4: bytes, edits: Sequence[tuple[float, float]]) -> bytes:
    """An MP4, its index at the end, that plays these parts, (start, length) in seconds; a start of -1 is a pause."""
    movie = mp4.rindex(b"moov") - 4
    assert movie + int.from_bytes(mp4[movie : movie + 4], "big") == len(mp4)
    old = mp4.rindex(b"edts") - 4
    old_size = int.from_bytes(mp4[old : old + 4], "big")
    scale = _time_scale(mp4, b"mdhd")
    rows = [
        round(length * _time_scale(mp4, b"mvhd")).to_bytes(4, "big")
        + (round(start * scale) if start >= 0 else -1).to_bytes(4, "big", signed=True)
        + (1).to_bytes(2, "big") + bytes(2)
        for start, length in edits
    ]  # fmt: skip
    table = bytes(4) + len(rows).to_bytes(4, "big") + b"".join(rows)
    new = _box(b"edts", _box(b"elst", table))
    changed = bytearray(mp4[:old] + new + mp4[old + old_size :])
    for box in (movie, mp4.rindex(b"trak", 0, old) - 4):
        size = int.from_bytes(mp4[box : box + 4], "big") + len(new) - old_size
        changed[box : box + 4] = size.to_bytes(4, "big")
    return bytes(changed)


def _box(name: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + name + content


def _time_scale(mp4: bytes, box: bytes) -> int:
    at = mp4.rindex(box) + 4
    assert mp4[at] == 0, "version 0"
    return int.from_bytes(mp4[at + 12 : at + 16], "big")

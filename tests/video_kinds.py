"""`VIDEOS`: files of as many kinds as there are, with the numbers that their frames say (see numbered_videos.py).

Codec x container x B-frames x key-frame spacing x where the clock starts and what happened on the way. What a file
shows was compared with the ffmpeg command (5.1, `-fps_mode passthrough`) when it was added. It differs in two kinds:
of HEVC that begins between two key frames FFmpeg 5.1 shows grey pictures first, where the FFmpeg 8 of PyAV shows
nothing, and joined Theora streams end for it after the first one unless it has a single thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h264_by_hand as h264
from numbered_videos import (
    CASES,
    FRAMES,
    H264,
    H264_B,
    H264_OPEN,
    HEIGHT,
    MPEG2_CLOSED,
    RATE,
    SCENES,
    VP8,
    VP9,
    WIDTH,
    X265,
    encode,
    in_greys,
    numbered,
    picture,
    remux,
)
from packet_changes import (
    Change,
    at_times,
    broken,
    ended_before,
    hidden,
    in_turn,
    key_flags,
    later,
    merged,
    packed,
    shown_again,
    timed,
    transport_packets,
    with_edits,
    with_empty_frames,
    with_exif,
    with_units,
    without,
)


@dataclass(frozen=True)
class Video:
    """A file: `write` makes it; `shown`: the numbers of the frames that it shows (-1: a frame that says none)."""

    write: Callable[[Path], object]
    shown: Sequence[int] = range(FRAMES)
    width: int = WIDTH  # as shown


def _hevc(parameters: str) -> dict[str, str]:
    return {"preset": "ultrafast", "x265-params": f"{X265}:{parameters}"}


def _av1(parameters: str, key_every: int = 12) -> tuple[str, dict[str, Any]]:
    return "libsvtav1", {"preset": 8, "g": key_every, "svtav1-params": f"lp=1:{parameters}"}


def coded(encoder: str, options: dict[str, Any] | None = None, *formats: str, **more: Any) -> Video:
    """A file of FRAMES numbers."""
    first, count = more.get("first", 0), len(more.get("frames", range(FRAMES)))
    return Video(lambda path: encode(path, encoder, options, *formats, **more), range(first, first + count))


def _made(video: Video, ending: str, use: Callable[[Path], Any]) -> Any:
    """What `use` makes of a video written with another ending."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"source.{ending}"
        video.write(source)
        return use(source)


def moved(video: Video, ending: str, *change: Change, shown: Sequence[int] | None = None, **more: Any) -> Video:
    """A video, first written with `ending`, with its packets changed."""
    return Video(
        lambda path: _made(video, ending, lambda source: remux(source, path, *change, **more)),
        video.shown if shown is None else shown,
    )


def edited(video: Video, ending: str, change: Callable[[bytes], bytes], shown: Sequence[int] | None = None) -> Video:
    """A video with its bytes changed."""
    return Video(
        lambda path: path.write_bytes(_made(video, ending, lambda source: change(source.read_bytes()))),
        video.shown if shown is None else shown,
    )


def stored(shown: Sequence[int], name: str = "") -> Video:
    """A file of tests/data/cases."""
    return Video(lambda path: path.write_bytes((CASES / (name or path.name)).read_bytes()), shown)


def joined(*videos: Video, ending: str) -> Video:
    """Files one behind the other, as `cat` does it."""
    return Video(
        lambda path: path.write_bytes(b"".join(_made(video, ending, Path.read_bytes) for video in videos)),
        [number for video in videos for number in video.shown],
    )


def _lost(first: int, last: int) -> Callable[[bytes], bytes]:
    """Without transport packets `first` to `last` - 1."""
    return lambda data: data[: 188 * first] + data[188 * last :]


def _zeroed(data: bytes) -> bytes:
    """40 bytes in the middle are zeros."""
    middle = len(data) // 2
    return data[:middle] + bytes(40) + data[middle + 40 :]


def _doubled(data: bytes) -> bytes:
    return b"".join(packet * (1 + (number % 17 == 3)) for number, packet in enumerate(transport_packets(data)))


def _hand_coded(pictures: Iterable[tuple[int, h264.Picture]], has_fields: bool = False) -> Video:
    """An H.264 stream of (number that it says, picture) in the order of coding."""

    def write(path: Path) -> None:
        sets = h264.parameter_sets(WIDTH, HEIGHT, has_fields)
        path.write_bytes(sets + b"".join(coded.coded(picture(number)) for number, coded in pictures))

    pictures = list(pictures)
    return Video(write, sorted({number for number, _ in pictures}))


def _in_groups(order: Sequence[int], groups: int = 4, **of_idr: Any) -> Iterable[tuple[int, h264.Picture]]:
    """Groups that begin with an IDR picture; then frames in this order. A frame is a reference if a later one is coded
    before it."""
    size = len(order)
    for group in range(groups):
        frame_number = 0
        for place, number in enumerate(order):
            is_idr = place == 0
            is_reference = is_idr or all(number > other for other in order[:place])
            extra = of_idr if is_idr and group else {}
            yield group * size + number, h264.Picture(frame_number, 2 * number, is_idr, is_reference, **extra)
            frame_number += is_reference


def _in_fields(frames: int = FRAMES, group: int = 10) -> Iterable[tuple[int, h264.Picture]]:
    for number in range(frames):
        place = number % group
        for parity in (h264.TOP, h264.BOTTOM):
            is_idr = place == 0 and parity == h264.TOP
            yield number, h264.Picture(place, 2 * place + parity, is_idr, field=parity, has_fields=True)


def _forgetting(frames: int = FRAMES, group: int = 10) -> Iterable[tuple[int, h264.Picture]]:
    """Groups that begin with a picture that forgets all before it, but is no IDR picture."""
    for number in range(frames):
        place = number % group
        if place == 0 and number:
            yield number, h264.Picture(group, 2 * group, forgets_all=True)
        else:
            yield number, h264.Picture(place, 2 * place, is_idr=number == 0)


REORDERED = (0, 3, 1, 2, 6, 4, 5, 9, 7, 8)
DEEP = (0, 4, 2, 1, 3, 8, 6, 5, 7, 9)
# A depth that the decoder learns too late: it drops a frame.
TOO_DEEP = (0, 4, 1, 2, 3, 5, 9, 6, 8, 7)
IN_ORDER_OF_CODING = [group + place for group in range(0, FRAMES, 10) for place in REORDERED]
IN_TOO_DEEP_ORDER = [group + place for group in range(0, FRAMES, 10) for place in TOO_DEEP]
PAIRS = [range(first, first + 2) for first in range(0, 2 * FRAMES, 2)]
LAST_28 = range(12, FRAMES)
LAST_16 = range(24, FRAMES)
HIDDEN = (5, 6, 17, 39)
WITHOUT_HIDDEN = [number for number in range(FRAMES) if number not in HIDDEN]
WITHOUT_LEADING = [number for number in range(FRAMES) if number not in (9, 10, 11, 21, 22, 23, 33, 34, 35)]
ENDED = [*range(7), *range(12, 19), *range(24, 31), *range(36, FRAMES)]  # an end drops what is still to be shown
DROPPED = [number for number in range(FRAMES) if number not in (10, 11, 22, 23, 34, 35)]
SHOWN_AGAIN = (3, 4, 12, 20, 36)

X264 = coded("libx264", H264)
X264_B = coded("libx264", H264_B)
LONG = numbered(200)
IN_GREYS = [in_greys(number) for number in range(FRAMES)]
X264_LONG = coded("libx264", H264_B, frames=LONG[:120])
X264_OPEN = coded("libx264", H264_OPEN)
X265_CLOSED = coded("libx265", _hevc("open-gop=0:keyint=12"))
X265_SHORT = coded("libx265", _hevc("open-gop=0:keyint=4:min-keyint=1"))
X265_OPEN = coded("libx265", _hevc("open-gop=1:keyint=12"))
MPEG4_B = coded("mpeg4", {"g": 12, "bf": 2})
MPEG4_ONE_B = coded("mpeg4", {"g": 12, "bf": 1})
MPEG2_B = coded("mpeg2video", {"g": 12, "bf": 2})
MJPEG = coded("mjpeg", {}, "yuvj420p")
LIBVPX = coded("libvpx", VP8)
LIBVPX_VP9 = coded("libvpx-vp9", VP9)
BY_HAND = _hand_coded(_in_groups(REORDERED))
BY_HAND_TOO_DEEP = replace(_hand_coded(_in_groups(TOO_DEEP)), shown=[n for n in range(FRAMES) if n != 7])
BY_HAND_DROPS = _hand_coded(_in_groups(REORDERED, drops_earlier=True))
BY_HAND_FORGETS = _hand_coded(_forgetting())
BY_HAND_FIELDS = _hand_coded(_in_fields(), has_fields=True)


def _as_broken_link(number: int, units: list[bytes]) -> list[bytes]:
    """HEVC: clean random access pictures in mid-stream become broken links: their leading pictures are not shown."""
    return [bytes([0x20]) + unit[1:] if unit[0] >> 1 == 21 and number else unit for unit in units]


def _as_dropping(number: int, units: list[bytes]) -> list[bytes]:
    """HEVC: refreshes in mid-stream throw away what is still to be shown (no_output_of_prior_pics_flag)."""
    return [
        unit[:2] + bytes([unit[2] | 0x40]) + unit[3:] if unit[0] >> 1 in (19, 20) and number else unit for unit in units
    ]


def _cut_by_edits(*edits: tuple[float, float], shown: Sequence[int]) -> Video:
    """An MP4 with B-frames and an edit list; times in frames, from the first frame on. A start of -3 is a pause."""
    rows = [((start + 2) / RATE if start >= 0 else -1, length / RATE) for start, length in edits]
    return edited(X264_B, "mp4", lambda mp4: with_edits(mp4, rows), shown)


H264_VIDEOS = {
    "h264_every_1.mp4": coded("libx264", H264 | {"g": 1}),
    "h264_every_12.mp4": X264,
    "h264_every_250.mkv": coded("libx264", H264 | {"g": 250}),
    "h264_every_4.mp4": coded("libx264", H264 | {"g": 4}),
    "h264_b_every_5.ts": coded("libx264", H264_B | {"g": 5}),
    "h264_b_every_12.mp4": coded("libx264", H264_B, sound=True),
    "h264_b_every_250.mov": coded("libx264", H264_B | {"g": 250}),
    "h264_b.mkv": coded("libx264", H264_B, sound=True),
    "h264_b.avi": X264_B,
    "h264_b_every_250.avi": coded("libx264", H264_B | {"g": 250}),
    "h264_b.flv": X264_B,
    "h264_b.3gp": X264_B,
    "h264_b.ts": coded("libx264", H264_B, sound=True),
    "h264_b.m2ts": coded("libx264", H264_B, container={"mpegts_m2ts_mode": "1"}),
    "h264_b.wmv": X264_B,
    "h264_b.h264": X264_B,
    "h264_pyramid.mp4": coded("libx264", {"preset": "veryfast", "g": 24, "bf": 7, "x264-params": SCENES}),
    "h264_pyramid.avi": coded("libx264", {"preset": "veryfast", "g": 24, "bf": 7, "x264-params": SCENES}),
    "h264_open.mp4": X264_OPEN,
    "h264_open.mkv": X264_OPEN,
    "h264_open.ts": X264_OPEN,
    "h264_open.avi": X264_OPEN,
    "h264_open_every_6.mkv": coded("libx264", H264_OPEN | {"g": 6}),
    "h264_long.mp4": coded("libx264", H264_B, frames=LONG),
    "h264_long.ts": coded("libx264", H264_B, frames=LONG),
    "h264_long.flv": coded("libx264", H264_B, frames=LONG),
    "h264_long.wmv": coded("libx264", H264_B, frames=LONG),
    "h264_long_live.mkv": coded("libx264", H264_B, frames=LONG, container={"live": "1"}),
    "h264_long_wraps.ts": coded("libx264", H264_B, frames=LONG, container={"output_ts_offset": "95439"}),
    "h264_long_joined.ts": joined(X264_LONG, X264_LONG, ending="ts"),
    "h264_intra_refresh.mp4": coded("libx264", H264 | {"preset": "veryfast", "x264-params": "intra-refresh=1"}),
    "h264_intra_refresh.ts": coded("libx264", H264 | {"preset": "veryfast", "x264-params": "intra-refresh=1"}),
    "h264_interlaced.mp4": coded("libx264", H264_B | {"preset": "veryfast", "x264-params": f"{SCENES}:tff=1"}),
    "h264_fake_interlaced.ts": coded("libx264", H264_B | {"x264-params": f"{SCENES}:fake-interlaced=1"}),
    "h264_four_slices.mp4": coded("libx264", H264_B | {"x264-params": f"{SCENES}:slices=4"}),
    "h264_lossless_444.mkv": coded("libx264", H264_B | {"qp": 0}, "yuv444p"),
    "h264_10_bit.mp4": coded("libx264", H264_B, "yuv420p10le"),
    "h264_fragments.mp4": coded("libx264", H264_B, container={"movflags": "frag_keyframe+empty_moov"}),
    "h264_negative_offsets.mp4": coded("libx264", H264_B, container={"movflags": "negative_cts_offsets"}),
    "h264_no_edit_list.mp4": coded("libx264", H264_B, container={"use_editlist": "0"}),
    "h264_live.mkv": coded("libx264", H264_B, container={"live": "1"}),
    "h264_zlib.mkv": stored(range(FRAMES)),
    "h264_from_10_s.mp4": coded("libx264", H264_B, start=10),
    "h264_from_10_s.mkv": coded("libx264", H264_B, start=10),
    "h264_from_1000_s.ts": coded("libx264", H264_B, start=1000),
    "h264_clock_wraps.ts": coded("libx264", H264_B, container={"output_ts_offset": "95442.3"}),
    "h264_2000_a_second.mkv": coded("libx264", H264_B, rate=2000),
    "h264_2000_a_second.flv": coded("libx264", H264, rate=2000),
    "h264_all_called_key.mp4": moved(X264_B, "mp4", key_flags(True)),
    "h264_all_called_key.mkv": moved(X264_B, "mp4", key_flags(True)),
    "h264_all_called_key.avi": moved(X264_B, "avi", key_flags(True)),
    "h264_all_called_key.wmv": moved(X264_OPEN, "mp4", key_flags(True)),
    "h264_none_called_key.mkv": moved(X264_B, "mp4", key_flags(False)),
    "h264_equal_times.mkv": moved(X264, "mp4", at_times(lambda i: i // 2 * 2)),
    "h264_gaps.avi": moved(X264, "avi", at_times(lambda i: 3 * i)),
    "h264_varying_rate.mp4": moved(X264, "mp4", at_times(lambda i: i + 4 * max(0, i - 20))),
    "h264_clock_jumps.ts": moved(X264_B, "ts", later(100, 20)),
    "h264_clock_jumps.mkv": moved(X264_B, "mp4", later(100, 20)),
    "h264_end_of_stream.mkv": moved(
        X264_OPEN, "mp4", with_units(lambda number, units: [*units, b"\x0a"] if number in (11, 20) else units)
    ),
    "h264_delimiters.mkv": moved(X264_B, "mp4", with_units(lambda number, units: [b"\x09\xf0", *units])),
    "h264_joined.ts": joined(X264_B, coded("libx264", H264_OPEN, first=100, start=-1), ending="ts"),
    "h264_joined.h264": joined(X264_B, X264_OPEN, ending="h264"),
    "h264_joined.mkv": joined(X264_B, X264_B, ending="mkv"),
    "h264_first_of_two.flv": edited(X264_B, "flv", lambda data: 2 * data),
    "h264_mid_group.ts": edited(X264_B, "ts", lambda data: data[188 * 14 :], LAST_28),
    "h264_mid_group.mkv": moved(X264_B, "mp4", without(0, 4), shown=LAST_28),
    "h264_mid_group.mp4": moved(X264_B, "mp4", without(0, 4), shown=LAST_28),
    "h264_mid_group.avi": moved(X264_B, "avi", without(0, 4), shown=LAST_28),
    "h264_open_mid_group.ts": moved(X264_OPEN, "ts", without(0, 16), shown=LAST_16),
    "h264_doubled_packets.ts": edited(X264_B, "ts", _doubled, [*range(17), *range(16, 26), *range(25, FRAMES)]),
    "h264_by_hand.h264": BY_HAND,
    "h264_by_hand.mp4": moved(BY_HAND, "h264", timed(IN_ORDER_OF_CODING, 2)),
    "h264_by_hand.avi": moved(BY_HAND, "h264", timed(range(FRAMES))),
    "h264_by_hand_all_called_key.mkv": moved(BY_HAND, "h264", in_turn(timed(IN_ORDER_OF_CODING, 2), key_flags(True))),
    "h264_by_hand_deep.h264": _hand_coded(_in_groups(DEEP)),
    "h264_by_hand_too_deep.h264": BY_HAND_TOO_DEEP,
    "h264_by_hand_too_deep.ts": moved(BY_HAND_TOO_DEEP, "h264", timed(IN_TOO_DEEP_ORDER, 4)),
    "h264_by_hand_drops_earlier.h264": BY_HAND_DROPS,
    "h264_by_hand_drops_earlier.mkv": moved(BY_HAND_DROPS, "h264", timed(IN_ORDER_OF_CODING, 2)),
    "h264_by_hand_drops_earlier.avi": moved(BY_HAND_DROPS, "h264", timed(range(FRAMES))),
    "h264_by_hand_forgets_all.h264": BY_HAND_FORGETS,
    "h264_by_hand_forgets_all.mkv": moved(BY_HAND_FORGETS, "h264", in_turn(timed(range(FRAMES)), key_flags(True))),
    "h264_fields.h264": BY_HAND_FIELDS,
    "h264_fields.ts": moved(BY_HAND_FIELDS, "h264", timed(range(FRAMES), 1, of_each=2)),
    "h264_fields.mp4": moved(BY_HAND_FIELDS, "h264", in_turn(timed(range(FRAMES), 0, 2), merged(PAIRS))),
    "h264_fields_apart.mkv": moved(BY_HAND_FIELDS, "h264", timed(range(FRAMES), 1, of_each=2)),
    "h264_fields_apart.avi": moved(BY_HAND_FIELDS, "h264", timed(range(2 * FRAMES))),
    "h264_cut_start.mp4": _cut_by_edits((10, 30), shown=range(10, FRAMES)),
    "h264_cut_end.mp4": _cut_by_edits((0, 20), shown=range(20)),
    "h264_two_parts.mp4": _cut_by_edits((5, 10), (20, 10), shown=[*range(5, 15), *range(20, 30)]),
    "h264_part_twice.mp4": _cut_by_edits((10, 10), (10, 10), shown=2 * [*range(10, 20)]),
    "h264_parts_swapped.mp4": _cut_by_edits((20, 10), (0, 10), shown=[*range(20, 30), *range(10)]),
    "h264_after_a_pause.mp4": _cut_by_edits((-3, 10), (0, 20), shown=range(20)),
}

HEVC_VIDEOS = {
    "hevc_closed.mp4": X265_CLOSED,
    "hevc_open.mp4": X265_OPEN,
    "hevc_open.mkv": X265_OPEN,
    "hevc_open.ts": X265_OPEN,
    "hevc_open.hevc": X265_OPEN,
    "hevc_open_every_5.mkv": coded("libx265", _hevc("open-gop=1:keyint=5:min-keyint=5")),
    "hevc_open_long.ts": coded("libx265", _hevc("open-gop=1:keyint=12"), frames=LONG),
    "hevc_drops_earlier.mp4": moved(X265_CLOSED, "mp4", with_units(_as_dropping), shown=DROPPED),
    "hevc_joined.hevc": joined(X265_OPEN, X265_OPEN, ending="hevc"),
    "hevc_every_250.mkv": coded("libx265", _hevc("keyint=250")),
    "hevc_radl.mp4": coded("libx265", _hevc("open-gop=0:radl=2:keyint=12")),
    "hevc_deep.mp4": coded("libx265", _hevc("bframes=7:rc-lookahead=15:keyint=20")),
    "hevc_intra_refresh.mp4": coded("libx265", _hevc("intra-refresh=1:keyint=12")),
    "hevc_10_bit.mp4": coded("libx265", _hevc("keyint=12"), "yuv420p10le"),
    "hevc_all_called_key.mkv": moved(X265_OPEN, "mp4", key_flags(True)),
    "hevc_broken_links.mkv": moved(X265_OPEN, "mp4", with_units(_as_broken_link), shown=WITHOUT_LEADING),
    "hevc_broken_links.mp4": moved(X265_OPEN, "mp4", with_units(_as_broken_link), shown=WITHOUT_LEADING),
    "hevc_end_of_stream.mkv": moved(X265_OPEN, "mp4", ended_before(21, b"\x48\x01"), shown=ENDED),
    "hevc_mid_group.ts": moved(X265_OPEN, "ts", without(0, 5), shown=LAST_28),
    "hevc_mid_group.mp4": moved(X265_OPEN, "mp4", without(0, 5), shown=LAST_28),
    "hevc_closed_mid_group.ts": moved(X265_SHORT, "ts", without(0, 5), shown=range(8, FRAMES)),
    "hevc_closed_mid_group.mp4": moved(X265_SHORT, "mp4", without(0, 1), shown=range(4, FRAMES)),
    "hevc_from_open_group.mkv": moved(X265_OPEN, "mp4", without(0, 12), shown=LAST_16),
    "hevc_joined.ts": joined(X265_OPEN, X265_OPEN, ending="ts"),
}

MPEG_VIDEOS = {
    "mpeg4_every_1.mp4": coded("mpeg4", {"g": 1}),
    "mpeg4_b.avi": MPEG4_B,
    "mpeg4_b_every_250.avi": coded("mpeg4", {"g": 250, "bf": 2}),
    "mpeg4_b.mp4": coded("mpeg4", {"g": 12, "bf": 2}, sound=True),
    "mpeg4_b.mkv": MPEG4_B,
    "mpeg4_b.mov": MPEG4_B,
    "mpeg4_b.m4v": MPEG4_B,
    "mpeg4_packed.avi": moved(MPEG4_ONE_B, "avi", packed),
    "mpeg4_packed.mkv": moved(MPEG4_ONE_B, "avi", packed),
    "mpeg4_packed.mp4": moved(MPEG4_ONE_B, "avi", packed),
    "packed_b_frames.avi": stored([*range(57), 58]),
    "packed_in_mkv.mkv": stored([*range(57), 58]),
    "xvid_qpel.avi": stored([*range(57), 58]),
    "mpeg4_interlaced.mp4": coded("mpeg4", {"g": 12, "bf": 2, "flags": "+ildct+ilme"}),
    "mpeg4_partitions.3gp": coded("mpeg4", {"g": 12, "data_partitioning": 1}),
    "mpeg4_not_coded.mp4": moved(coded("mpeg4", {"g": 12}), "mp4", with_empty_frames(5, 17)),
    "mpeg4_not_coded.avi": moved(coded("mpeg4", {"g": 12}), "mp4", with_empty_frames(5, 17)),
    "mpeg4_joined.avi": joined(MPEG4_B, MPEG4_B, ending="avi"),
    "mpeg2_open.mpg": coded("mpeg2video", {"g": 12, "bf": 2}, sound=True),
    "mpeg2_open.ts": MPEG2_B,
    "mpeg2_open.mkv": MPEG2_B,
    "mpeg2_open.avi": MPEG2_B,
    "mpeg2_open.mp4": MPEG2_B,
    "mpeg2_open.mxf": MPEG2_B,
    "mpeg2_open.m2v": MPEG2_B,
    "mpeg2_every_3.ts": coded("mpeg2video", {"g": 3, "bf": 2}),
    "mpeg2_closed.ts": coded("mpeg2video", MPEG2_CLOSED),
    "mpeg2_closed.mov": coded("mpeg2video", MPEG2_CLOSED),
    "mpeg2_interlaced.vob": coded("mpeg2video", {"g": 12, "bf": 2, "flags": "+ildct+ilme"}),
    "mpeg2_every_1.mpg": coded("mpeg2video", {"g": 1}),
    "mpeg2_mid_group.ts": moved(MPEG2_B, "ts", without(0, 5), shown=LAST_28),
    "mpeg2_joined.vob": joined(MPEG2_B, MPEG2_B, ending="vob"),
    "mpeg1.mpg": coded("mpeg1video", {"g": 12, "bf": 2}),
    "mpeg1.avi": coded("mpeg1video", {"g": 12, "bf": 2}),
}

VPX_VIDEOS = {
    "vp8.webm": LIBVPX,
    "vp8.avi": LIBVPX,
    "vp8_alpha.webm": coded("libvpx", VP8 | {"auto-alt-ref": 0}, "yuva420p"),
    "vp8_two_pass.webm": stored(range(60)),
    "vp8_hidden.webm": moved(LIBVPX, "webm", hidden(*HIDDEN), shown=WITHOUT_HIDDEN),
    "vp8_hidden.avi": moved(LIBVPX, "webm", hidden(*HIDDEN), shown=WITHOUT_HIDDEN),
    "vp8_hidden_key.mkv": moved(LIBVPX, "webm", hidden(12, 13), shown=[*range(12), *range(14, FRAMES)]),
    "vp8_all_called_key.mkv": moved(LIBVPX, "webm", key_flags(True)),
    "vp8_mid_group.webm": moved(LIBVPX, "webm", without(0, 5), shown=LAST_28),
    "vp9.webm": LIBVPX_VP9,
    "vp9.mp4": LIBVPX_VP9,
    "vp9.ivf": LIBVPX_VP9,
    "vp9_two_pass.webm": stored(range(60)),
    "vp9_layers.webm": stored(range(60)),
    "vp9_every_4.webm": coded("libvpx-vp9", VP9 | {"g": 4}),
    "vp9_long.webm": coded("libvpx-vp9", VP9, frames=LONG),
    "vp9_every_250.mkv": coded("libvpx-vp9", VP9 | {"g": 250}),
    "vp9_all_called_key.webm": moved(LIBVPX_VP9, "webm", key_flags(True)),
    "vp9_shown_again.webm": moved(
        LIBVPX_VP9, "webm", shown_again(SHOWN_AGAIN, 2),
        shown=[0, 1, 2, 0, 3, 0, *range(4, 12), 0, *range(12, 20), 12, *range(20, 36), 24, *range(36, 40)],
    ),
    "vp9_shown_again.mp4": moved(
        LIBVPX_VP9, "webm", shown_again(SHOWN_AGAIN, 1),
        shown=[0, 1, 2, 0, 3, 0, *range(4, 12), 6, *range(12, 20), 18, *range(20, 36), 30, *range(36, 40)],
    ),
    "vp9_mid_group.webm": moved(LIBVPX_VP9, "webm", without(0, 5), shown=LAST_28),
    "vp9_joined.webm": joined(LIBVPX_VP9, LIBVPX_VP9, ending="webm"),
    "av1.mp4": coded(*_av1("hierarchical-levels=3")),
    "av1.obu": coded(*_av1("hierarchical-levels=3")),
    "av1_joined.obu": joined(*2 * [coded(*_av1("hierarchical-levels=3"))], ending="obu"),
    "av1_long.mp4": coded(*_av1("hierarchical-levels=4", 20), frames=LONG),
    "av1_libaom.mkv": stored(range(60)),
    "av1_resilient.mp4": stored(range(60)),
    "av1_rav1e.mp4": stored(range(60)),
    "av1_every_250.mkv": coded(*_av1("hierarchical-levels=5", 250)),
    "av1_forward_key.mkv": coded(*_av1("hierarchical-levels=4:irefresh-type=1", 16)),
    "av1_all_called_key.mkv": moved(coded(*_av1("hierarchical-levels=4", 16)), "mp4", key_flags(True)),
    "av1_overlays.webm": coded(*_av1("enable-overlays=1", 16)),
    "av1_low_delay.mp4": coded(*_av1("pred-struct=1")),
}  # fmt: skip

OTHER_VIDEOS = {
    "mjpeg.avi": MJPEG,
    "mjpeg.mov": coded("mjpeg", {}, "yuvj422p"),
    "mjpeg_gaps.avi": moved(MJPEG, "avi", at_times(lambda i: 2 * i)),
    "mjpeg_joined.avi": joined(MJPEG, MJPEG, ending="avi"),
    "ffv1.mkv": coded("ffv1", {"g": 12}),
    "ffv1.avi": coded("ffv1", {"g": 12}, "yuv444p"),
    "prores.mov": coded("prores_ks", {}, "yuv422p10le"),
    "png.mov": coded("png", {}, "rgb24"),
    "animation.mov": coded("qtrle", {"g": 12}, "rgb24"),
    "huffyuv.avi": coded("huffyuv", {}, "yuv422p"),
    "raw.y4m": coded("wrapped_avframe", {}, "yuv420p"),
    "mjpeg.mjpeg": MJPEG,
    "mjpeg_exif.mov": moved(MJPEG, "avi", with_exif),
    "raw.avi": coded("rawvideo", {}, "yuv420p"),
    "raw_palette.avi": coded("rawvideo", {}, "pal8", frames=IN_GREYS),
    "raw_palette.mov": coded("rawvideo", {}, "pal8", frames=IN_GREYS),
    "cinepak.avi": coded("cinepak", {"g": 12}, "rgb24"),
    "screen.avi": coded("zmbv", {"g": 12}, "bgr0"),
    "screen.flv": coded("flashsv", {"g": 12}, "bgr24"),
    "svq1.mov": coded("svq1", {"g": 12}, "yuv410p"),
    "theora_gop12.ogv": stored(range(60)),
    "theora_joined.ogv": joined(*2 * [stored(range(60), "theora_gop12.ogv")], ending="ogv"),
    "wmv2.wmv": coded("wmv2", {"g": 12}, sound=True),
    "wmv1.avi": coded("wmv1", {"g": 12}),
    "msmpeg4.avi": coded("msmpeg4", {"g": 12}),
    "flv1.flv": coded("flv", {"g": 12}),
    "h263.3gp": replace(coded("h263", {"g": 12}), width=140),  # its pixels are 12:11
    "rv20.rm": coded("rv20", {"g": 12}),
    "pictures.gif": coded("gif", {}, "rgb8"),
    "joined_clock_set_back.ts": stored([*range(40), *range(100, 140)]),
    "h264_b_frames.avi": stored(range(60)),
}

AS_DECODED = ()  # what is shown is known only from decoding: pictures made up for lost ones

DAMAGED_VIDEOS = {
    "h264_lost_packets.mp4": moved(X264_B, "mp4", without(15, 18), shown=AS_DECODED),
    "h264_lost_packets.ts": moved(X264_B, "ts", without(15, 18), shown=AS_DECODED),
    "h264_lost_bytes.ts": edited(X264_B, "ts", _lost(40, 43), AS_DECODED),
    "h264_two_in_a_packet.mkv": moved(
        X264, "mp4", merged([*(range(i, i + 1) for i in range(10)), range(10, 12), range(12, 13)]), shown=AS_DECODED
    ),
    "h264_cut_off.ts": edited(X264_B, "ts", lambda data: data[:-700], AS_DECODED),
    "h264_cut_off.mkv": edited(X264_B, "mkv", lambda data: data[:-300], AS_DECODED),
    "h264_cut_off.flv": edited(X264_B, "flv", lambda data: data[:-200], AS_DECODED),
    "h264_cut_off.avi": edited(X264_B, "avi", lambda data: data[:-1900], AS_DECODED),
    "h264_zeros.mp4": edited(X264_B, "mp4", _zeroed, AS_DECODED),
    "h264_wrong_length.mkv": moved(X264_B, "mp4", broken(15, lambda unit: b"\0\x7f" + unit[2:]), shown=AS_DECODED),
    "h264_no_unit.mp4": moved(X264_B, "mp4", broken(15, lambda unit: bytes(len(unit))), shown=AS_DECODED),
    "hevc_only_length.mkv": moved(X265_OPEN, "mp4", broken(15, lambda unit: unit[:4]), shown=AS_DECODED),
    "hevc_lost_packets.mkv": moved(
        X265_OPEN, "mp4", without(15, 18), shown=[*range(13), 14, 16, *6 * [-1], *range(24, FRAMES)]
    ),
    "mpeg4_lost_packets.avi": moved(MPEG4_B, "avi", without(15, 18), shown=AS_DECODED),
    "mpeg4_mid_group.avi": moved(MPEG4_B, "avi", without(0, 5), shown=AS_DECODED),
    "mpeg4_cut_off.avi": edited(MPEG4_B, "avi", lambda data: data[:-1800], AS_DECODED),
    "mpeg2_cut_off.mpg": edited(MPEG2_B, "mpg", lambda data: data[:-700], AS_DECODED),
    "mpeg2_lost_bytes.ts": edited(MPEG2_B, "ts", _lost(40, 43), AS_DECODED),
    "vp8_lost_packets.webm": moved(LIBVPX, "webm", without(12, 15), shown=AS_DECODED),
    "vp9_lost_packets.webm": moved(LIBVPX_VP9, "webm", without(15, 18), shown=AS_DECODED),
    "vp9_lost_key.webm": moved(LIBVPX_VP9, "webm", without(12, 13), shown=AS_DECODED),
    "av1_lost_packets.mkv": moved(coded(*_av1("hierarchical-levels=3")), "mkv", without(14, 15), shown=AS_DECODED),
    "mjpeg_zeros.avi": edited(MJPEG, "avi", _zeroed, range(FRAMES)),
}

VIDEOS = H264_VIDEOS | HEVC_VIDEOS | MPEG_VIDEOS | VPX_VIDEOS | OTHER_VIDEOS

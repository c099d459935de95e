"""A video file's facts and its frames, decoded outside DALI.

Frame i is the i-th frame that a decoder shows which gets every packet of the file in order, as the `ffmpeg` command
does. Where the packets' own bits settle which frames they show (mvd_fast.data.packets), decoding begins at the entry
nearest to the wanted frames and counts from there; where they do not, files are counted by decoding them once, and
every clip is decoded from the file's start.
"""

from __future__ import annotations

import io
import itertools
import sys
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import VideoReformatter

from mvd_fast.data import packets
from mvd_fast.data.containers import VIDEO_EXTENSIONS, BadFile, demuxed, opened, video_stream
from mvd_fast.data.picture import Presentation, UnknownPicture, is_plain, presentation

__all__ = [
    "DALI_CPU_CODECS",
    "DALI_GPU_CODECS",
    "VIDEO_EXTENSIONS",
    "BadFile",
    "VideoInfo",
    "decode_frames",
    "excerpt",
    "probe_video",
    "require_decodable",
]

DALI_CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})  # others need NVDEC or PyAV
DALI_GPU_CODECS = DALI_CPU_CODECS | {"h264", "hevc", "av1"}

# Formats without presentation times; what FFmpeg gives out as such is made up.
CLOCKLESS = frozenset({"avi", "asf", "h264", "hevc", "obu", "m4v", "mpegvideo", "mjpeg", "rawvideo"})

# Those in which a packet's place in the file tells when it is shown, give or take the decoder's delay: gaps are real.
PLACED = frozenset({"avi", "asf"})

# What comes with one packet and holds for those behind it: a decoder that begins there would not have it.
OF_ALL_THAT_FOLLOW = ("new_extradata", "palette")

MISSING_SHARE = 0.05  # of the promised duration or frames; containers round, so less than that is no truncation
MISSING_FRAMES = 2
JUMP = 0.25  # seconds
ENTRIES_APART = 12  # frames; closer entries gain little and take memory for every file of a run

# An entry: the first frame it shows, its place among the stream's packets, and what it is recognised by after a seek.
ENTRY = np.dtype([("frame", "i4"), ("packet", "i4"), ("pts", "i8"), ("dts", "i8"), ("pos", "i8"), ("size", "i8")])
UNKNOWN = -(2**63)  # in place of a missing pts, dts or pos


@dataclass(frozen=True, slots=True, eq=False)
class VideoInfo:
    """Facts of a video file. `width`, `height`: as shown, upright and with square pixels.

    fps: frames a second on average, 0 where unknown. key_frames: how many frames decoding may begin at.
    is_certain: the packets settle which frames they show; else decoding always begins at the file's start.
    is_steady: besides, every packet shows one frame, at a time of its own. in_order: and in the order of the file.
    is_plain: no turn, no stretching, one size, and colours that DALI's decoder shows rightly.
    times: float64 [frames], each frame's second, where the frame rate varies. start: the first frame's second; None
    where the file has no clock, or one that is set back.
    """

    frames: int
    fps: float
    codec: str
    pixel_format: str
    shown: Presentation
    entries: np.ndarray
    key_frames: int
    is_certain: bool
    is_steady: bool
    in_order: bool
    is_plain: bool
    start: float | None
    times: np.ndarray | None

    @property
    def width(self) -> int:
        return self.shown.size[0]

    @property
    def height(self) -> int:
        return self.shown.size[1]

    @property
    def key_every(self) -> float:
        """Mean distance between the frames that decoding may begin at."""
        return self.frames / max(1, self.key_frames)

    def suits_dali(self, codecs: frozenset[str]) -> bool:
        """Whether DALI's decoder for these codecs shows this file as it is shown here."""
        return self.codec in codecs and self.is_plain and self.is_steady

    def entry_before(self, frame: int) -> np.void:
        """The last entry at or before a frame."""
        return self.entries[max(0, int(np.searchsorted(self.entries["frame"], frame, side="right")) - 1)]

    def frame_at(self, second: float) -> int | None:
        """The frame at a second of the file, by the frames' own times; None beyond its ends or without a clock."""
        if self.times is not None:
            number = int(np.abs(self.times - second).argmin())
            return number if abs(self.times[number] - second) <= np.diff(self.times).max() else None
        if self.start is None or not self.fps:
            return None
        number = round((second - self.start) * self.fps)
        return max(number, 0) if -1 <= number < self.frames else None  # sound may begin a little earlier

    @property
    def length(self) -> str:
        """How long it lasts, in words."""
        if self.start is None or not self.fps:
            return "has no clock, or one that is set back"
        return f"lasts {self.frames / self.fps:.1f} s"


def probe_video(path: str) -> VideoInfo:
    """Facts of a video file: every packet is looked at, and the first frame is decoded.

    Where the packets do not settle which frames they show, every frame is decoded, to count them.
    Raises BadFile: not a video, no frames, truncated or damaged.
    """
    with opened(path) as container:
        scan = _Scan(container)
        for packet in demuxed(container):
            scan.add(packet)
        scan.finish()
        return scan.info(scan.shown_times() if scan.is_certain else _decoded_times(path))


@dataclass
class _Scan:
    """What the packets of a file add up to."""

    container: av.container.InputContainer
    packets: int = 0
    shown: int = 0  # frames, by the packets
    steady: bool = True
    in_order: bool = True
    first: av.VideoFrame | None = None
    entries: list[tuple[int, ...]] = field(default_factory=list)
    key_frames: int = 0
    times: list[int | None] = field(default_factory=list)  # pts of what is shown; without a clock dts
    places: list[int | None] = field(default_factory=list)  # dts of all packets, of formats in PLACED
    pictures: set[tuple[int, ...]] = field(default_factory=set)
    end: float = 0.0  # seconds, over all streams
    last: int | None = None  # dts
    jumps: bool = False
    tick: Fraction = Fraction(0)  # seconds of a unit of time stamps

    def __post_init__(self) -> None:
        self.stream = video_stream(self.container)
        self.context = self.stream.codec_context
        self.codec = self.context.codec
        self.reader = packets.reader(self.codec.canonical_name, self.context.extradata, self.codec.intra_only)
        self.is_certain = self.reader is not None
        self.is_clockless = self.container.format.name in CLOCKLESS
        self.is_placed = self.container.format.name in PLACED
        self.has_clock = not self.is_clockless
        # Without a clock times are made up in the file's order, whatever the order of showing.
        self.in_order = self.has_clock or self.codec.canonical_name not in ("h264", "hevc")

    def add(self, packet: av.Packet) -> None:
        if packet.pts is not None:
            self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != self.stream.index:
            return
        if self.first is None:
            with suppress(av.FFmpegError):  # before the first key frame
                self.first = next(iter(self.context.decode(packet)), None)
        if self.is_certain:
            self._look(packet)
        if self.is_placed:
            self.places.append(packet.dts)
        if packet.dts is not None:
            self.has_clock = self.has_clock and (self.last is None or packet.dts >= self.last)
            # Where the clock jumps between frames that are put in order, their times do not tell the order.
            self.jumps = self.jumps or (self.last is not None and (packet.dts - self.last) * packet.time_base > JUMP)
            self.last = packet.dts
        self.tick = packet.time_base
        self.packets += 1

    def _look(self, packet: av.Packet) -> None:
        try:
            found = self.reader.look(memoryview(packet))
        except IndexError:  # shorter than what it says it holds
            found = packets.Shown(0)
            self.is_certain = False
        frames = 0 if packet.is_discard else found.frames
        self.steady = self.steady and frames == 1 and not found.leading
        self.in_order = self.in_order and packet.pts is not None and (not self.times or packet.pts > self.times[-1])
        if found.entry:
            self._enter(packet)
        elif found.leading and self.entries and frames:  # shown before the entry, which they follow in the file
            self.entries[-1] = (self.entries[-1][0] + frames, *self.entries[-1][1:])
        is_independent = not any(packet.has_sidedata(kind) for kind in OF_ALL_THAT_FOLLOW)
        self.is_certain = self.is_certain and self.reader.is_certain and bool(self.entries) and is_independent
        self.times += [packet.dts if self.is_clockless else packet.pts] * frames
        self.shown += frames
        self.pictures |= {found.picture} if found.picture else set()

    def _enter(self, packet: av.Packet) -> None:
        self.key_frames += 1
        known = (UNKNOWN if value is None else value for value in (packet.pts, packet.dts, packet.pos))
        entry = (self.shown, self.packets, *known, packet.size)
        if len(self.entries) > 1 and self.shown - self.entries[-2][0] < ENTRIES_APART:
            self.entries.pop()  # the one between is passed over; the last one stays, as its leading frames follow
        self.entries.append(entry)

    def finish(self) -> None:
        """Raises BadFile where the file has no frames, or clearly less than its header promises."""
        if not self.packets:
            raise BadFile("has a video stream but no frames")
        self._require_complete()
        if self.first is None:
            with suppress(av.FFmpegError):
                self.first = next(iter(self.context.decode(None)), None)
        if self.first is None:
            raise BadFile("has no frame that can be decoded")
        self.is_certain = self.is_certain and self.shown > 0
        self.has_clock = self.has_clock and None not in self.times and len(set(self.times)) == len(self.times)

    def _require_complete(self) -> None:
        rate, start = self.stream.average_rate, self.container.start_time or 0
        frames = self.packets
        if rate and self.last is not None:  # packets of frames that only repeat may be left out of the file
            frames = max(frames, round((self.last * self.tick - Fraction(start, av.time_base)) * rate) + 1)
        # An edit list leaves frames out: the index has it in it, the number in the header has not.
        indexed = len(self.stream.index_entries) if self.container.format.name.startswith("mov") else 0
        most = indexed or self.stream.frames
        if most - frames > max(MISSING_FRAMES, MISSING_SHARE * most):
            raise BadFile(f"is truncated: {frames} frames of the {most} its header promises")
        promised, there = self._promised_seconds(), self.end - min(0.0, start / av.time_base)
        if rate and self.end and promised - there > max(MISSING_FRAMES / float(rate), MISSING_SHARE * promised):
            raise BadFile(f"is truncated: {there:.2f} s of the {promised:.2f} s its header promises")

    def _promised_seconds(self) -> float:
        """Of all streams, by the header; 0 where it does not say.

        AVI counts its frames, and has the length of sound that begins late with a silence that is not there. ASF has
        one length for all streams, which FFmpeg adds to where the last one begins.
        """
        if self.container.format.name == "avi":
            return 0.0
        whole = (self.container.duration or 0) / av.time_base
        own = [float(stream.duration * stream.time_base) for stream in self.container.streams if stream.duration]
        return min(whole, max(own, default=whole))

    def shown_times(self) -> list[float | None]:
        """Of every frame, in seconds, as they are shown."""
        if not (self.has_clock or self.is_placed) or None in self.times:
            return [None] * self.shown
        return [float(time * self.tick) for time in sorted(self.times)]

    def info(self, times: list[float | None]) -> VideoInfo:
        frame, stream = self.first, self.stream
        try:
            shown = presentation(frame, stream.sample_aspect_ratio)
            shown.rgb(frame, VideoReformatter())
        except UnknownPicture as error:
            raise BadFile(str(error)) from error
        if not times:
            raise BadFile("has no frame that can be decoded")
        fps, start, own = self._clock(times)
        certain = self.is_certain
        begin = (0, 0, UNKNOWN, UNKNOWN, UNKNOWN, 0)
        is_whole = shown.scaled == (frame.width, frame.height) and not shown.turns and len(self.pictures) <= 1
        return VideoInfo(
            frames=len(times),
            fps=fps,
            codec=sys.intern(self.codec.canonical_name),
            pixel_format=sys.intern(frame.format.name),
            shown=shown,
            entries=np.array(self.entries if certain else [begin], dtype=ENTRY),
            key_frames=self.key_frames if certain else 1,
            is_certain=certain,
            is_steady=certain and self.steady and (self.in_order or (self.has_clock and not self.jumps)),
            in_order=self.in_order,
            is_plain=is_whole and is_plain(frame),
            start=start,
            times=own,
        )

    def _clock(self, times: list[float | None]) -> tuple[float, float | None, np.ndarray | None]:
        """Frames a second, the first frame's second, and every frame's where the rate varies."""
        rate, has_gaps = float(self.stream.average_rate or 0.0), self.is_placed and self._has_gaps()
        if has_gaps and None not in times:
            delay = min(times) - float(self.places[0] * self.tick)
            times = [time - delay for time in sorted(times)]  # some decoders hand them out in the file's order
        if self.is_clockless and not (has_gaps and _ascends(times)):
            return rate, 0.0 if rate else None, None
        if not _ascends(times):
            return rate, None, None
        seconds = np.array(times) - (self.container.start_time or 0) / av.time_base
        if (not rate or has_gaps) and len(times) > 1:
            rate = round((len(times) - 1) / (seconds[-1] - seconds[0]), 6)
        return rate, float(seconds[0]), seconds if _varies(seconds, rate) else None

    def _has_gaps(self) -> bool:
        """Whether packets are left out, as where a stream that varies was copied into AVI, or one of another rate."""
        if None in self.places:
            return False
        return _varies(np.array(self.places) * float(self.tick), float(self.stream.average_rate or 0.0))


def _ascends(times: list[float | None]) -> bool:
    return None not in times and all(late < after for late, after in itertools.pairwise(times))


def _varies(seconds: np.ndarray, rate: float) -> bool:
    """Whether some are half a frame or more away from where a constant rate would have them."""
    even = seconds[0] + np.arange(len(seconds)) / rate if rate else seconds
    return bool(np.abs(seconds - even).max() > 0.5 / rate) if rate else False


def _decoded_times(path: str) -> list[float | None]:
    """Seconds of all frames, by decoding every one."""
    with opened(path) as container:
        stream = video_stream(container)
        tick = stream.time_base
        frames = _shown(stream, demuxed(container, stream), may_begin_late=True)
        return [None if frame.pts is None or tick is None else float(frame.pts * tick) for frame, _ in frames]


def decode_frames(path: str, indices: np.ndarray, info: VideoInfo) -> np.ndarray:
    """Frames `indices` (any order, repeats allowed) of a video as shown: RGB uint8 [T, H, W, 3].

    `info` is `probe_video`'s. Raises BadFile when a wanted frame cannot be decoded, or is damaged.
    """
    wanted = {int(index) for index in indices}
    if wanted and not 0 <= min(wanted) <= max(wanted) < info.frames:
        beyond = max(wanted) if max(wanted) >= info.frames else min(wanted)
        raise BadFile(f"has no frame {beyond}: it has {info.frames}, from 0 to {info.frames - 1}")
    found = _decode(path, wanted, info) if wanted else {}
    if len(found) < len(wanted):
        raise BadFile(f"frame {min(wanted - found.keys())} of {info.frames} cannot be decoded")
    if not wanted:
        return np.zeros((0, info.height, info.width, 3), dtype=np.uint8)
    return np.stack([found[int(index)] for index in indices])


def _decode(path: str, wanted: set[int], info: VideoInfo) -> dict[int, np.ndarray]:
    """The wanted frames that can be decoded: frame index -> uint8 [H, W, 3]."""
    found: dict[int, np.ndarray] = {}
    entry, converter, last = info.entry_before(min(wanted)), VideoReformatter(), max(wanted)
    with _entered(path, entry) as (stream, following):
        clock: list[int] = []  # of the packets so far
        if info.is_steady:
            following = _timed(following, clock)
        frames = _shown(stream, following, may_begin_late=not info.is_certain)
        for count, (frame, is_damaged) in enumerate(frames):
            number = int(entry["frame"]) + count
            is_misplaced = info.is_steady and len(clock) > count and frame.pts != clock[count]
            if info.is_certain and (is_damaged or is_misplaced):
                break  # a frame may be missing, and the count be wrong
            if number in wanted and not is_damaged:
                try:
                    found[number] = info.shown.rgb(frame, converter)
                except UnknownPicture as error:
                    raise BadFile(str(error)) from error
            if number >= last:
                break
    return found


def _timed(following: Iterator[av.Packet], clock: list[int]) -> Iterator[av.Packet]:
    """The packets; `clock` keeps their times in ascending order."""
    for packet in following:
        if packet.pts is not None:
            insort(clock, packet.pts)
        yield packet


def _shown(
    stream: av.VideoStream, following: Iterator[av.Packet], may_begin_late: bool
) -> Iterator[tuple[av.VideoFrame, bool]]:
    """Frames as the decoder shows them, and whether each is damaged: by its own word, or as something before it, since
    the last key frame, could not be decoded.

    may_begin_late: what cannot be decoded before the first frame damages nothing (a recording that begins between two
    key frames).
    """
    is_damaged, has_begun = False, not may_begin_late
    if has_begun:
        # Frames whose references are lost are handed out, too, and say so: without them the others could not be
        # counted. Not before the first key frame: FFmpeg then loses whole IDR pictures of HEVC.
        stream.codec_context.flags |= Flags.output_corrupt
    for packet in itertools.chain(following, (None,)):
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError:
            is_damaged = is_damaged or (has_begun and _has_picture(stream, packet))
            continue
        for frame in frames:
            is_damaged, has_begun = is_damaged and not frame.key_frame, True
            yield frame, is_damaged or frame.is_corrupt


def _has_picture(stream: av.VideoStream, packet: av.Packet | None) -> bool:
    """Whether a picture is lost with a packet that a decoder refuses: demuxers may part messages from their picture."""
    context = stream.codec_context
    reader = packets.reader(context.codec.canonical_name, context.extradata, context.codec.intra_only)
    return packet is None or not hasattr(reader, "has_picture") or reader.has_picture(memoryview(packet))


@contextmanager
def _entered(path: str, entry: np.void) -> Iterator[tuple[av.VideoStream, Iterator[av.Packet]]]:
    """The stream, and its packets from an entry on."""
    with opened(path) as container:
        stream = video_stream(container)
        following = demuxed(container, stream) if not entry["packet"] else _sought(container, stream, entry)
        if following is not None:
            yield stream, following
            return
    with opened(path) as container:  # the container's own index does not lead there
        stream = video_stream(container)
        yield stream, itertools.islice(demuxed(container, stream), int(entry["packet"]), None)


def _sought(
    container: av.container.InputContainer, stream: av.VideoStream, entry: np.void
) -> Iterator[av.Packet] | None:
    """The packets from an entry on by a seek, which may end anywhere: the entry is recognised, or None."""
    target = int(entry["dts"] if entry["dts"] != UNKNOWN else entry["pts"])
    if target == UNKNOWN:
        return None
    try:
        container.seek(target, stream=stream)
    except av.FFmpegError:
        return None
    following = demuxed(container, stream)
    for packet in following:
        known = (UNKNOWN if value is None else value for value in (packet.pts, packet.dts, packet.pos))
        if tuple(entry)[2:] == (*known, packet.size):
            return itertools.chain((packet,), following)
        if packet.dts is not None and packet.dts > target:
            return None
    return None


def excerpt(path: str, indices: np.ndarray, info: VideoInfo) -> tuple[np.ndarray, np.ndarray]:
    """The part of a video that frames `indices` need, copied without decoding, for a decoder of DALI that it suits.

    Returns (a Matroska file, uint8 [bytes]; int32 [T], the indices counted from its first frame). It goes from the last
    entry before the first wanted frame to the last wanted one; where frames are not shown in the file's order, to the
    entry after it. DALI decodes every frame up to the last wanted one, and takes time stamps for the order.
    """
    first, last = int(indices.min()), int(indices.max())
    entry = info.entry_before(first)
    after = info.entries["packet"][info.entries["frame"] > last]
    if info.in_order:
        stop = last - int(entry["frame"]) + 1
    else:
        stop = int(after[0] - entry["packet"]) if len(after) else None
    with _entered(path, entry) as (stream, following):
        copied = _copied(stream, itertools.islice(following, stop), info.in_order)
    return copied, (indices - entry["frame"]).astype(np.int32)


def _copied(stream: av.VideoStream, following: Iterator[av.Packet], in_order: bool) -> np.ndarray:
    """A Matroska file, uint8 [bytes], of these packets; in order, they get times at equal distances."""
    written = io.BytesIO()
    with av.open(written, mode="w", format="matroska") as container:
        copy = container.add_stream_from_template(stream)
        for number, packet in enumerate(following):
            if in_order:
                packet.time_base = Fraction(1, 25)
                packet.pts, packet.dts, packet.duration = number, number, 1
            packet.stream = copy
            container.mux(packet)
    return np.frombuffer(written.getbuffer(), dtype=np.uint8)


def require_decodable(path: str, info: VideoInfo) -> None:
    """Decode the whole video as training would meet it, keeping nothing. Raises BadFile at the first damage."""
    count = 0
    with opened(path) as container:
        stream = video_stream(container)
        for frame, is_damaged in _shown(stream, demuxed(container, stream), may_begin_late=not info.is_certain):
            if is_damaged:
                raise BadFile(f"frame {count} of {info.frames} is damaged")
            del frame
            count += 1
    if count < info.frames:
        raise BadFile(f"only {count} of its {info.frames} frames can be decoded")
    if count > info.frames:
        raise BadFile(f"has {count} frames, more than the {info.frames} of its packets: re-encode it")

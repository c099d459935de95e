"""What a file is, and its frames: all that touches containers and codecs of videos outside DALI (PyAV)."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import Interpolation

from mvd_fast.errors import UserError

DALI_CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})  # others need NVDEC or PyAV
DALI_GPU_CODECS = DALI_CPU_CODECS | {"h264", "hevc", "av1", "mpeg4"}
PLAIN_FORMATS = frozenset({"yuv420p", "yuvj420p", "yuvj422p", "yuv422p"})  # 8-bit; the rest goes through PyAV

VIDEO_EXTENSIONS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp")

# libswscale's SWS_FULL_CHR_H_INT and SWS_ACCURATE_RND: with them PyAV's colours equal DALI's CPU decoder bit for bit.
# Without them chroma is upsampled to the nearest pixel, and edges of saturated colours are off by up to a third.
COLOUR_CONVERSION = Interpolation.BILINEAR | 0x2000 | 0x40000

MISSING_SHARE = 0.05  # of the promised duration or frames; containers round, so less than that is no truncation
MISSING_FRAMES = 2


class BadFile(UserError):
    """A file that cannot be used; the message is the reason, without the path."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Facts of a video file, from its container alone (nothing is decoded)."""

    frames: int
    fps: float
    width: int
    height: int
    codec: str
    pixel_format: str
    key_frames: int

    @property
    def key_every(self) -> float:
        """Mean distance between key frames, in frames."""
        return self.frames / max(1, self.key_frames)


def read_bytes(path: str) -> np.ndarray:
    """The file as uint8 [size]. Raises BadFile when it cannot be read or is empty."""
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror or error}") from error
    if data.size == 0:
        raise BadFile("is empty (0 bytes)")
    return data


def probe_video(data: np.ndarray) -> VideoInfo:
    """Facts of an encoded video, uint8 [size]. Raises BadFile: not a video, no frames, truncated or damaged."""
    with _opened(data) as container:
        stream = _video_stream(container)
        everything = _demux(container)
        packets = [packet for packet in everything if packet.stream_index == stream.index]
        if not packets:
            raise BadFile("has a video stream but no frames")
        damaged = sum(packet.is_corrupt for packet in packets)
        if damaged:
            raise BadFile(f"is damaged: {damaged} of {len(packets)} packets are incomplete")
        _require_complete(container, everything)
        context = stream.codec_context
        if not context.width or not context.height:
            raise BadFile("has a video stream without a picture size")
        return VideoInfo(
            frames=len(_shown(packets)),
            fps=float(stream.average_rate or 0.0),
            width=context.width,
            height=context.height,
            codec=sys.intern(context.codec.canonical_name),
            pixel_format=sys.intern(context.pix_fmt or ""),
            key_frames=sum(packet.is_keyframe for packet in packets),
        )


def decode_frames(data: np.ndarray, indices: np.ndarray, info: VideoInfo) -> np.ndarray:
    """Frames `indices` (any order, repeats allowed) of an encoded video as RGB: uint8 [T, H, W, 3].

    Decoding starts at the last key frame before the first wanted frame. Colours equal DALI's CPU decoder's.
    Raises BadFile when a wanted frame cannot be decoded.
    """
    wanted = {int(index) for index in indices}
    found = _decode(data, wanted, info, from_key_frame=True)
    if len(found) < len(wanted):  # odd timestamps, or a key frame that is none: count frames from the start
        found = _decode(data, wanted, info, from_key_frame=False)
    if len(found) < len(wanted):
        missing = min(wanted - found.keys())
        raise BadFile(f"frame {missing} of {info.frames} cannot be decoded")
    return np.stack([found[int(index)] for index in indices])


def trimmed(data: np.ndarray, indices: np.ndarray, info: VideoInfo) -> tuple[np.ndarray, np.ndarray]:
    """Only the part of an encoded video that frames `indices` need, copied without decoding.

    Returns (uint8 [bytes], int32 [T]): from the last key frame before the first wanted frame to the last wanted one,
    and the indices counted from there. DALI 2.4 decodes every frame from the start of the file to the last wanted one,
    so a clip late in a video is several times cheaper this way. Returns its arguments where there is nothing to cut
    off, or where packets are not in display order.
    """
    if info.key_frames <= 1:
        return data, indices
    with _opened(data) as container:
        stream = _video_stream(container)
        packets = _demux(container, stream)
        times = [packet.pts for packet in packets]
        first, last = int(indices.min()), int(indices.max())
        ordered = None not in times and all(time < after for time, after in itertools.pairwise(times))
        ordered = ordered and len(_shown(packets)) == len(packets)
        start = max((i for i, packet in enumerate(packets[: first + 1]) if packet.is_keyframe), default=0)
        if start == 0 or not ordered:
            return data, indices
        return _copied(stream, packets[start : last + 1]), indices - np.int32(start)


def _copied(stream: av.VideoStream, packets: list[av.Packet]) -> np.ndarray:
    """A Matroska file, uint8 [bytes], of these packets of a stream."""
    written, origin = io.BytesIO(), packets[0].pts
    with av.open(written, mode="w", format="matroska") as container:
        copy = container.add_stream_from_template(stream)
        for packet in packets:
            packet.pts = packet.dts = packet.pts - origin
            packet.stream = copy
            container.mux(packet)
    return np.frombuffer(written.getbuffer(), dtype=np.uint8)


def require_decodable(data: np.ndarray, info: VideoInfo) -> None:
    """Decode the whole video, keeping nothing. Raises BadFile at the first frame that fails."""
    count = 0
    with _opened(data) as container:
        stream = _video_stream(container)
        try:
            for frame in _frames(stream, _demux(container, stream)):
                if frame.is_corrupt:
                    break
                count += 1
        except av.FFmpegError:
            pass  # the count tells
    if count < info.frames:
        raise BadFile(f"only {count} of its {info.frames} frames can be decoded")


def _opened(data: np.ndarray) -> av.container.InputContainer:
    try:
        return av.open(io.BytesIO(data), mode="r", metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise BadFile(f"is not a readable video ({_reason(error)})") from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    kinds = sorted({stream.type for stream in container.streams})
    if not kinds:
        raise BadFile("is not a readable video (no streams found in it)")
    stream = container.streams.best("video")
    if stream is None:
        raise BadFile(f"has no video stream (only {', '.join(kinds)})")
    if stream.codec_context is None:
        raise BadFile("has a video stream in an unknown codec")
    stream.codec_context.thread_count = 1  # several files are handled at once instead
    return stream


def _demux(container: av.container.InputContainer, *streams: av.VideoStream) -> list[av.Packet]:
    """All packets, of these streams or of every one; nothing is decoded."""
    packets: list[av.Packet] = []
    try:
        packets.extend(packet for packet in container.demux(*streams) if packet.size)
    except (av.FFmpegError, IndexError) as error:
        raise BadFile(f"is damaged after {len(packets)} packets ({_reason(error)})") from error
    return packets


def _require_complete(container: av.container.InputContainer, packets: list[av.Packet]) -> None:
    """Raise BadFile when clearly less is there than the header promises. `packets` are those of every stream."""
    stream = _video_stream(container)
    frames = sum(packet.stream_index == stream.index for packet in packets)
    if stream.frames - frames > max(MISSING_FRAMES, MISSING_SHARE * stream.frames):
        raise BadFile(f"is truncated: {frames} frames of the {stream.frames} its header promises")
    timed = [packet for packet in packets if packet.pts is not None]
    if not container.duration or not stream.average_rate or not timed:
        return
    promised = container.duration / av.time_base
    end = max(float((packet.pts + (packet.duration or 0)) * packet.time_base) for packet in timed)
    there = end - min(0.0, (container.start_time or 0) / av.time_base)
    if promised - there > max(MISSING_FRAMES / float(stream.average_rate), MISSING_SHARE * promised):
        raise BadFile(f"is truncated: {there:.2f} s of the {promised:.2f} s its header promises")


def _shown(packets: list[av.Packet]) -> list[av.Packet]:
    """The packets that become frames: an edit list may drop the first ones after decoding."""
    return [packet for packet in packets if not packet.is_discard]


def _decode(data: np.ndarray, wanted: set[int], info: VideoInfo, from_key_frame: bool) -> dict[int, np.ndarray]:
    """The wanted frames that can be decoded: frame index -> uint8 [H, W, 3]."""
    found: dict[int, np.ndarray] = {}
    with _opened(data) as container:
        stream = _video_stream(container)
        packets = _demux(container, stream)
        start, index_of = _entry_point(packets, min(wanted)) if from_key_frame else (0, None)
        try:
            for count, frame in enumerate(_frames(stream, packets[start:])):
                index = count if index_of is None else index_of.get(frame.pts)
                if index in wanted and not frame.is_corrupt:
                    found[index] = _rgb(frame, info)
                    if len(found) == len(wanted):
                        break
        except av.FFmpegError:
            pass  # what is missing is named by the caller
    return found


def _entry_point(packets: list[av.Packet], first_wanted: int) -> tuple[int, dict[int, int] | None]:
    """The packet to start decoding at, and the map from timestamp to frame index (None: count frames from packet 0)."""
    times = [packet.pts for packet in _shown(packets)]
    if None in times or len(set(times)) < len(times):
        return 0, None
    order = sorted(times)
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe and (packet.pts or 0) <= order[first_wanted]]
    return max(keys, default=0), {time: index for index, time in enumerate(order)}


def _frames(stream: av.VideoStream, packets: list[av.Packet]) -> Iterator[av.VideoFrame]:
    """Frames in display order."""
    for packet in packets:
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)


def _rgb(frame: av.VideoFrame, info: VideoInfo) -> np.ndarray:
    return frame.to_ndarray(format="rgb24", width=info.width, height=info.height, interpolation=COLOUR_CONVERSION)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()

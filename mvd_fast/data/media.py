"""What a file is, and its frames: everything that touches containers and codecs outside DALI (PyAV and Pillow)."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

DALI_CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})  # others need NVDEC or PyAV
DALI_GPU_CODECS = DALI_CPU_CODECS - {"mjpeg"} | {"h264", "hevc", "av1", "mpeg4"}
PLAIN_FORMATS = frozenset({"yuv420p", "yuvj420p", "yuvj422p", "yuv422p"})  # 8-bit; the rest goes through PyAV

VIDEO_EXTENSIONS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# libswscale's SWS_FULL_CHR_H_INT and SWS_ACCURATE_RND: with them PyAV's colours equal DALI's CPU decoder bit for bit.
# Without them chroma is upsampled to the nearest pixel, and edges of saturated colours are off by up to a third.
COLOUR_CONVERSION = Interpolation.BILINEAR | 0x2000 | 0x40000

MISSING_SHARE = 0.05  # of the promised duration or frames; containers round, so less than that is no truncation
MISSING_FRAMES = 2


class BadFile(ValueError):
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


@dataclass(frozen=True)
class _Packets:
    times: list[int | None]
    keys: list[bool]
    end: float  # seconds
    damaged: int


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
        packets = _demux(container, stream)
        if not packets.times:
            raise BadFile("has a video stream but no frames")
        if packets.damaged:
            raise BadFile(f"is damaged: {packets.damaged} of {len(packets.times)} packets are incomplete")
        _require_complete(container, stream, packets)
        context = stream.codec_context
        if not context.width or not context.height:
            raise BadFile("has a video stream without a picture size")
        return VideoInfo(
            frames=len(packets.times),
            fps=float(stream.average_rate or 0.0),
            width=context.width,
            height=context.height,
            codec=sys.intern(context.codec.canonical_name),
            pixel_format=sys.intern(context.pix_fmt or ""),
            key_frames=sum(packets.keys),
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


def require_decodable(data: np.ndarray, info: VideoInfo) -> None:
    """Decode the whole video, keeping nothing. Raises BadFile at the first frame that fails."""
    count = 0
    with _opened(data) as container:
        stream = _video_stream(container)
        stream.codec_context.thread_count = 1
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    break
                count += 1
        except av.FFmpegError:
            pass  # the count tells
    if count < info.frames:
        raise BadFile(f"frame {count} of {info.frames} cannot be decoded")


def _opened(data: np.ndarray) -> av.container.InputContainer:
    try:
        return av.open(io.BytesIO(data), mode="r", metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise BadFile(f"is not a readable video ({_reason(error)})") from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        kinds = sorted({stream.type for stream in container.streams})
        raise BadFile(f"has no video stream (only {', '.join(kinds) or 'nothing'})")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadFile("has a video stream in an unknown codec")
    return stream


def _demux(container: av.container.InputContainer, stream: av.VideoStream) -> _Packets:
    """Timestamps and key frames of the video's packets, and where the last packet of any stream ends."""
    times: list[int | None] = []
    keys: list[bool] = []
    end, damaged = 0.0, 0
    try:
        for packet in container.demux():
            if not packet.size:
                continue
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index:
                times.append(packet.pts)
                keys.append(packet.is_keyframe)
                damaged += packet.is_corrupt
    except (av.FFmpegError, IndexError) as error:
        raise BadFile(f"is damaged after {len(times)} frames ({_reason(error)})") from error
    return _Packets(times, keys, end, damaged)


def _require_complete(container: av.container.InputContainer, stream: av.VideoStream, packets: _Packets) -> None:
    """Raise BadFile when clearly less is there than the header promises."""
    frames = len(packets.times)
    if stream.frames - frames > max(MISSING_FRAMES, MISSING_SHARE * stream.frames):
        raise BadFile(f"is truncated: {frames} frames of the {stream.frames} its header promises")
    if not container.duration or not stream.average_rate or packets.end <= 0:
        return
    start = (container.start_time or 0) / av.time_base
    promised, there = container.duration / av.time_base, packets.end - max(0.0, start)
    if promised - there > max(MISSING_FRAMES / float(stream.average_rate), MISSING_SHARE * promised):
        raise BadFile(f"is truncated: {there:.2f} s of the {promised:.2f} s its header promises")


def _decode(data: np.ndarray, wanted: set[int], info: VideoInfo, from_key_frame: bool) -> dict[int, np.ndarray]:
    """The wanted frames that can be decoded: frame index -> uint8 [H, W, 3]."""
    found: dict[int, np.ndarray] = {}
    first_packet, index_of = 0, None
    if from_key_frame:
        with _opened(data) as container:
            first_packet, index_of = _entry_point(_demux(container, _video_stream(container)), min(wanted))
    with _opened(data) as container:
        stream = _video_stream(container)
        stream.codec_context.thread_count = 1  # the source decodes several clips at once instead
        try:
            for count, frame in enumerate(_frames_from(container, stream, first_packet)):
                index = count if index_of is None else index_of.get(frame.pts)
                if index in wanted and not frame.is_corrupt:
                    found[index] = _rgb(frame, info)
                    if len(found) == len(wanted):
                        break
        except av.FFmpegError:
            pass  # what is missing is named by the caller
    return found


def _entry_point(packets: _Packets, first_wanted: int) -> tuple[int, dict[int, int] | None]:
    """The packet to start decoding at, and the map from timestamp to frame index (None: count frames from packet 0)."""
    order = sorted(time for time in packets.times if time is not None)
    if len(order) < len(packets.times) or len(set(order)) < len(order):
        return 0, None
    target = order[first_wanted]
    keys = [i for i, (time, key) in enumerate(zip(packets.times, packets.keys, strict=True)) if key and time <= target]
    return (keys[-1] if keys else 0), {time: index for index, time in enumerate(order)}


def _frames_from(container: av.container.InputContainer, stream: av.VideoStream, first_packet: int):
    """Frames in display order, decoding from packet `first_packet` on (earlier ones are only read past)."""
    for count, packet in enumerate(container.demux(stream)):
        if count >= first_packet:
            yield from packet.decode()


def _rgb(frame: av.VideoFrame, info: VideoInfo) -> np.ndarray:
    return frame.to_ndarray(format="rgb24", width=info.width, height=info.height, interpolation=COLOUR_CONVERSION)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


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
        raise BadFile(f"cannot be decoded ({_reason(error)})") from error

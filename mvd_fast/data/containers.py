"""Video files on the disk: opening them, and the packets of the stream that players show. Nothing is decoded here."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import av
import numpy as np

from mvd_fast.errors import UserError

VIDEO_EXTENSIONS = (
    ".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".vob", ".flv", ".wmv", ".asf", ".ts", ".mts",
    ".m2ts", ".3gp", ".ogv",
)  # fmt: skip

PLAYLISTS = frozenset({"hls", "dash", "concat", "concatf", "image2", "webm_dash_manifest"})  # they name other files
DEFAULT_BONUS = 5_000_000  # pixels that a stream flagged as the default is ahead by, as in FFmpeg's choice


class BadFile(UserError):
    """A file that cannot be used; the message is the reason, without the path."""


class UnreadableFile(BadFile):
    """A file that cannot be read as things are: no permission, a mount that is away. It may be sound."""


def read_bytes(path: str, at_most: int = -1) -> np.ndarray:
    """The file, or its first `at_most` bytes, as uint8 [size]. Raises UnreadableFile, and BadFile when it is
    empty, or a pipe, a socket or a device, where reading may have no end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise BadFile("is not a regular file")
        data = np.fromfile(path, dtype=np.uint8, count=at_most)
    except OSError as error:
        raise UnreadableFile(f"cannot be read: {error.strerror or error}") from error
    if data.size == 0:
        raise BadFile("is empty (0 bytes)")
    return data


def opened(path: str) -> av.container.InputContainer:
    """The file at `path`, to be closed by `with`. Raises BadFile."""
    read_bytes(path, at_most=1)  # says why it cannot be read
    try:
        # Through FFmpeg's own file reading (a name alone might be taken for a protocol), not Python's.
        container = av.open(f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise BadFile(f"is not a readable video ({reason(error)})") from error
    if container.format.name.split(",")[0] in PLAYLISTS:
        container.close()
        raise BadFile("is a playlist of other files, not a video")
    return container


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The stream that FFmpeg shows: the largest one, a cover picture never. Raises BadFile where there is none."""
    kinds = sorted({stream.type for stream in container.streams})
    if not kinds:
        raise BadFile("is not a readable video (no streams found in it)")
    videos = container.streams.video
    if not videos:
        raise BadFile(f"has no video stream (only {', '.join(kinds)})")
    moving = [stream for stream in videos if not stream.disposition & av.stream.Disposition.attached_pic]
    if not moving:
        raise BadFile("has no video stream, only a cover picture")
    known = [stream for stream in moving if stream.codec_context is not None]
    if not known:
        raise BadFile("has a video stream in an unknown codec")
    stream = max(known, key=_size)
    if not stream.codec_context.width or not stream.codec_context.height:
        raise BadFile("has a video stream without a picture size")
    stream.codec_context.thread_count = 1  # several files are handled at once instead
    return stream


def _size(stream: av.VideoStream) -> int:
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    return stream.codec_context.width * stream.codec_context.height + DEFAULT_BONUS * is_default


def demuxed(container: av.container.InputContainer, *streams: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of these streams, or of every one, as they follow in the file. Raises BadFile."""
    count = 0
    try:
        for packet in container.demux(*streams):
            if packet.size:  # an empty one would end the decoding
                yield packet
                count += 1
    except (av.FFmpegError, IndexError) as error:
        raise BadFile(f"is damaged after {count} packets ({reason(error)})") from error


def reason(error: Exception) -> str:
    """What a library says, in lower case."""
    return (getattr(error, "strerror", None) or str(error)).lower()

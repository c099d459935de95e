"""Videos whose frames say their own number: writing them with PyAV, and reading what a frame says.

The upper half of a frame has eight vertical bars, the bits of its number from the left, bright = 1; the lower half has
patches of red, green, blue and grey. So no other decoder is needed to see which frame is which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

FRAMES = 40
WIDTH, HEIGHT = 128, 96
PATCHES = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128)], dtype=np.uint8)
BARS = 8
BRIGHT, DARK = 235, 16
RATE = 25
CASES = Path(__file__).parent / "data" / "cases"

# Options of encoders; key frames and B-frames at fixed places.
SCENES = "scenecut=0:b-adapt=0"
H264 = {"preset": "ultrafast", "g": 12, "bf": 0, "x264-params": SCENES}
H264_B = H264 | {"bf": 2}
H264_OPEN = {"preset": "veryfast", "g": 12, "bf": 3, "x264-params": f"{SCENES}:open-gop=1"}
X265 = "log-level=none:pools=none:frame-threads=1:scenecut=0:b-adapt=0:bframes=3"
VP8 = {"deadline": "realtime", "cpu-used": 8, "g": 12}
VP9 = {"deadline": "realtime", "cpu-used": 8, "g": 12}
MPEG2_CLOSED = {"g": 12, "bf": 2, "flags": "+cgop", "sc_threshold": 10**9}


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """The frame that says `number`, 0 to 255: uint8 [height, width, 3]."""
    bits = number >> np.arange(BARS - 1, -1, -1) & 1
    bars = np.where(bits, BRIGHT, DARK).astype(np.uint8)[np.arange(width) * BARS // width]
    patches = PATCHES[np.arange(width) * len(PATCHES) // width]
    rows = np.arange(height)[:, None, None] < height // 2
    return np.where(rows, bars[None, :, None], patches[None]).astype(np.uint8)


def in_greys(number: int) -> av.VideoFrame:
    """The frame that says `number`, in a palette of greys that are numbered the other way round."""
    palette = np.repeat(np.arange(255, -1, -1, dtype=np.uint8)[:, None], 4, axis=1)
    palette[:, 0] = 255  # alpha
    return av.VideoFrame.from_ndarray((255 - picture(number)[..., 1], palette), format="pal8")


def number_of(frame: np.ndarray) -> int:
    """The number that a frame [H, W, 3] of RGB says; -1 where its bars are neither bright nor dark."""
    height, width = frame.shape[:2]
    bars = frame[height // 8 : height * 3 // 8].mean((0, 2))
    levels = [bars[(2 * i + 1) * width // 16 - width // 64 :][: max(1, width // 32)].mean() for i in range(BARS)]
    if any(abs(level - (DARK + BRIGHT) / 2) < 25 for level in levels):
        return -1
    return sum(int(level > (DARK + BRIGHT) / 2) << BARS - 1 - i for i, level in enumerate(levels))


def patches_of(frame: np.ndarray) -> np.ndarray:
    """The mean colour of each patch's middle: float [4, 3]."""
    height, width = frame.shape[:2]
    rows = frame[height * 5 // 8 : height * 7 // 8].astype(float)
    middles = [rows[:, (2 * i + 1) * width // 8 - width // 32 :][:, : width // 16] for i in range(len(PATCHES))]
    return np.array([middle.mean((0, 1)) for middle in middles])


def plainly_decoded(path: Path | str) -> list[np.ndarray]:
    """Every frame of a file, decoded from its start without a look at time stamps: RGB, uint8 [H, W, 3] each. What a
    decoder refuses is passed over, as the ffmpeg command does."""
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            with suppress(av.FFmpegError):
                frames.extend(frame.to_ndarray(format="rgb24") for frame in packet.decode())
    return frames


# ---- writing ----

Frame = np.ndarray | av.VideoFrame  # RGB, uint8 [H, W, 3], or planes of any format


def numbered(count: int) -> list[np.ndarray]:
    return [picture(number) for number in range(count)]


def encode(
    path: Path,
    encoder: str,
    options: dict[str, Any] | None = None,
    pixel_format: str = "yuv420p",
    *,
    frames: Iterable[Frame] | None = None,
    first: int = 0,
    start: float = 0,
    rate: int = RATE,
    container: dict[str, str] | None = None,
    sound: bool = False,
    sound_from: float = 0,
    set_up: Callable[[av.VideoStream], None] = lambda stream: None,
) -> None:
    """Frames, by default numbers `first` to `first` + FRAMES - 1, from `start` seconds on, in the container that the
    path's ending names. The sound is `sound_from` seconds late. `set_up` may change the stream before it is opened."""
    frames = list(map(picture, range(first, first + FRAMES))) if frames is None else list(frames)
    frames = [av.VideoFrame.from_ndarray(f, format="rgb24") if isinstance(f, np.ndarray) else f for f in frames]
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(encoder, rate=rate, options={k: str(v) for k, v in (options or {}).items()})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pixel_format
        stream.codec_context.thread_count = 1
        set_up(stream)
        late = round(sound_from * 44100)
        voice = output.add_stream("mp2", rate=44100, layout="mono") if sound else None
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number + round(start * rate), Fraction(1, rate)
            output.mux(stream.encode(frame))
            if voice:
                output.mux(voice.encode(_silence(44100 // rate, (frame.pts * 44100) // rate + late)))
        output.mux(stream.encode())
        if voice:
            output.mux(voice.encode())


def _silence(samples: int, start: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), dtype=np.int16), format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 44100, start, Fraction(1, 44100)
    return frame


def remux(
    source: Path,
    path: Path,
    change: Callable[[list[av.Packet]], Iterable[av.Packet]] = list,
    container: dict[str, str] | None = None,
    bitstream: str = "",
) -> None:
    """The packets of a file's video, changed, in another container. `bitstream`: a filter they go through first."""
    with av.open(str(source)) as given, av.open(str(path), "w", options=container or {}) as output:
        stream = given.streams.best("video")
        copy = output.add_stream_from_template(stream, opaque=True)
        packets = [packet for packet in given.demux(stream) if packet.size]
        if bitstream:
            several = av.BitStreamFilterContext(bitstream, stream, copy)
            packets = [part for packet in packets for part in several.filter(packet)]
        for packet in change(packets):
            packet.stream = copy
            output.mux(packet)

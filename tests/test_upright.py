"""Turned, mirrored and stretched videos, and pictures that change their size: shown as players show them, everywhere.

Every file below shows pictures of 96 x 128 pixels that say their number, however its own pictures lie.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numbered_videos import (
    CASES,
    H264_B,
    PATCHES,
    VP8,
    VP9,
    encode,
    number_of,
    patches_of,
    picture,
    plainly_decoded,
    remux,
)
from packet_changes import copied
from video_files import CPU, data_setup, loader_of, write_list

from mvd_fast.data import media, sampling
from mvd_fast.data.index import scan_file
from mvd_fast.data.lists import Entry
from mvd_fast.data.pipeline import PipelineSpec
from mvd_fast.data.sampling import SampleKey
from mvd_fast.evaluation.backbone import Preprocessing
from mvd_fast.evaluation.frozen import MultiView, UniformViews, batches_of, samples_of

FRAMES = 24
WIDTH, HEIGHT = 96, 128
Turn = Callable[[np.ndarray], np.ndarray]

# a, b, c, d of a display matrix (ISO/IEC 14496-12, 8.2.2), and how the pictures lie that it sets upright.
TURNS: dict[str, tuple[tuple[int, int, int, int], Turn]] = {
    "upright": ((1, 0, 0, 1), lambda p: p),
    "90": ((0, 1, -1, 0), lambda p: np.rot90(p, 1)),
    "180": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "270": ((0, -1, 1, 0), lambda p: np.rot90(p, -1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside_down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "across": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
}
STRETCHES = {  # width of the coded picture, width : height of its pixels
    "4_3": (72, Fraction(4, 3)),
    "8_9": (108, Fraction(8, 9)),
    "2_1": (48, Fraction(2)),
    "1_2": (192, Fraction(1, 2)),
}
CODED = {
    "h264.mp4": ("libx264", H264_B),
    "h264.ts": ("libx264", H264_B),
    "h264.avi": ("libx264", H264_B),
    "mpeg4.avi": ("mpeg4", {"g": 12, "bf": 2}),
    "vp9.mp4": ("libvpx-vp9", VP9),
    "mpeg2.mp4": ("mpeg2video", {"g": 12, "bf": 2}),
    "mjpeg.mp4": ("mjpeg", {}),
}


def turned(mp4: bytes, matrix: tuple[int, int, int, int], box: bytes = b"tkhd") -> bytes:
    """The file with this display matrix, of its track or of the whole movie (`mvhd`)."""
    at = mp4.rindex(box) + (44 if box == b"tkhd" else 40)
    a, b, c, d = (value << 16 for value in matrix)
    return mp4[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + mp4[at + 36 :]


def write_turned(
    path: Path, turn: str, aspect: Fraction = Fraction(1), box: bytes = b"tkhd", encoder: str = "libx264"
) -> None:
    matrix, lying = TURNS[turn]
    frames = [lying(picture(number, WIDTH, HEIGHT)) for number in range(FRAMES)]
    if aspect != 1:
        height, width = frames[0].shape[:2]
        frames = [lying(picture(number, *_unstretched(turn, width, height, aspect))) for number in range(FRAMES)]
    options = H264_B if encoder == "libx264" else VP9
    encode(path, encoder, options, frames=map(np.ascontiguousarray, frames), set_up=_with_aspect(aspect))
    path.write_bytes(turned(path.read_bytes(), matrix, box))


def _unstretched(turn: str, width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Width and height of the upright picture whose lying one becomes width x height with square pixels."""
    narrow = round(width / aspect)
    return (height, narrow) if TURNS[turn][0][0] == 0 else (narrow, height)


def _with_aspect(aspect: Fraction) -> Callable[[av.VideoStream], None]:
    def set_up(stream: av.VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = aspect

    return set_up


def write_stretched(path: Path, stretch: str) -> None:
    width, aspect = STRETCHES[stretch]
    encoder, options = CODED[path.name.split("-")[-1]]
    frames = [picture(number, width, HEIGHT) for number in range(FRAMES)]
    pixel_format = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
    encode(path, encoder, options, pixel_format, frames=frames, set_up=_with_aspect(aspect))
    if path.suffix == ".mp4":  # the container's word, whatever the stream says
        mp4 = path.read_bytes()
        at = mp4.rindex(b"pasp") + 4
        path.write_bytes(mp4[:at] + struct.pack(">2i", *aspect.as_integer_ratio()) + mp4[at + 8 :])


def shown_files() -> dict[str, Callable[[Path], None]]:
    """File name -> what writes it."""
    files: dict[str, Callable[[Path], None]] = {}
    for turn in TURNS:
        files[f"{turn}.mp4"] = lambda path, turn=turn: write_turned(path, turn)
        files[f"{turn}-movie.mov"] = lambda path, turn=turn: write_turned(path, turn, box=b"mvhd")
        files[f"{turn}-vp9.mp4"] = lambda path, turn=turn: write_turned(path, turn, encoder="libvpx-vp9")
        files[f"{turn}-stretched.mp4"] = lambda path, turn=turn: write_turned(path, turn, Fraction(2))
    for stretch, coded in itertools.product(STRETCHES, CODED):
        files[f"{stretch}-{coded}"] = lambda path, stretch=stretch: write_stretched(path, stretch)
    for name in ("vp9_wide_pixels.webm", "vp8_narrow_pixels.mkv"):
        files[name] = lambda path: path.write_bytes((CASES / path.name).read_bytes())
    return files


FILES = shown_files()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("upright")
    for name, write in FILES.items():
        write(folder / name)
    return {name: folder / name for name in FILES}


def numbers(frames) -> list[int]:
    return [number_of(frame) for frame in frames]


def as_pixels(video: torch.Tensor) -> np.ndarray:
    """float32 [3, T, H, W] in [0, 1] -> [T, H, W, 3] in levels."""
    return (video.permute(1, 2, 3, 0).numpy() * 255).round()


def assert_upright(frames: np.ndarray, expected: list[int], name: str) -> None:
    assert numbers(frames) == expected, name
    assert np.abs(patches_of(frames[0]) - PATCHES).max() < 20, name  # strongly compressed


@pytest.mark.parametrize("name", FILES)
def test_frames_are_upright_with_square_pixels(name, files):
    path = str(files[name])
    info, facts = media.probe_video(path), scan_file(path)
    assert (info.width, info.height) == (facts.width, facts.height) == (WIDTH, HEIGHT)
    everything = media.decode_frames(path, np.arange(FRAMES), info)
    assert everything.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert_upright(everything, [*range(FRAMES)], name)
    for asked in ([13], [17, 5, 5], [FRAMES - 1]):
        assert np.array_equal(media.decode_frames(path, np.array(asked), info), everything[asked])


@pytest.mark.parametrize("by_dali", [True, False])
def test_training_shows_them_upright(by_dali, files, tmp_path):
    listed = write_list(tmp_path / "list.txt", files.values())
    config = data_setup(listed, crop="whole", sampling_rate=1, mean=(0, 0, 0), std=(1, 1, 1))
    with closing(loader_of(config, micro=len(files))) as loader:
        if not by_dali:
            loader.suspects.update(dict.fromkeys(loader.paths, "on trial"))
        batch = next(loader.batches(0))
        assert loader.replaced == 0, loader.bad_files
    for index, video in zip(batch["index"].tolist(), batch["video"], strict=True):
        clip = sampling.random_clip(SampleKey(0, 0, index), FRAMES, 8, 1)
        assert_upright(as_pixels(video), clip.tolist(), [*FILES][index])


@pytest.mark.parametrize("kind", [UniformViews, MultiView])
def test_evaluation_shows_them_upright(kind, files):
    views = Preprocessing(8, 1, 64, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).dataset(kind)
    spec, bad, seen = PipelineSpec(views, 8, 2, CPU), {}, []
    entries = [Entry(str(path), 0) for path in files.values()]
    with ThreadPoolExecutor(2) as pool:
        for videos, indices in batches_of(spec, samples_of(pool, views, entries, 2, bad, lambda: None)):
            for video, index in zip(videos, indices, strict=True):
                assert_upright(as_pixels(video), [*range(8, 16)], [*FILES][index])  # the middle of height and time
                seen.append(index)
    assert not bad and seen == [*range(len(FILES))]


# ---- boxes ----

BOX = (0.25, 0.125, 0.75, 0.375)  # of the one person: x1, y1, x2, y2 as shares of what is shown


@pytest.fixture(scope="module")
def lamps(tmp_path_factory) -> Path:
    """Black videos with one white rectangle where the box is; turned, mirrored and stretched."""
    folder = tmp_path_factory.mktemp("lamps")
    shapes = [(turn, Fraction(1)) for turn in TURNS] + [("90", Fraction(2)), ("upright", Fraction(2))]
    for number, (turn, aspect) in enumerate(shapes):
        size = (WIDTH, HEIGHT)
        if aspect != 1:
            lying = TURNS[turn][1](np.zeros((HEIGHT, WIDTH)))
            size = _unstretched(turn, lying.shape[1], lying.shape[0], aspect)
        lit = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        x1, y1, x2, y2 = (round(share * side) for share, side in zip(BOX, (*size, *size), strict=True))
        lit[y1:y2, x1:x2] = 255
        path, (matrix, lies) = folder / f"lamp{number}.mp4", TURNS[turn]
        frames = FRAMES * [np.ascontiguousarray(lies(lit))]
        encode(path, "libx264", H264_B, frames=frames, set_up=_with_aspect(aspect))
        path.write_bytes(turned(path.read_bytes(), matrix))
    rows = (f"lamp{number},0000,{','.join(map(str, BOX))},{number + 1},0\n" for number in range(len(shapes)))
    (folder / "train.csv").write_text("".join(rows))
    return folder


@pytest.mark.parametrize("crop", ["whole", "center", "random_resized"])
def test_boxes_lie_on_what_is_shown(crop, lamps):
    config = data_setup(
        lamps / "train.csv",
        kind="ava",
        classes=18,
        size=64,
        sampling_rate=1,
        crop={"kind": crop, "area": (0.5, 1.0)} if crop == "random_resized" else crop,
        box_jitter=(0.0, 0.0),
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    seen = 0
    with closing(loader_of(config, micro=10)) as loader:
        for batch in itertools.islice(loader.batches(0), 3):
            assert loader.replaced == 0, loader.bad_files
            for box, clip in zip(batch["boxes"], batch["box_clip"], strict=True):
                lit = batch["video"][clip].mean((0, 1)) > 0.5
                rows, columns = lit.any(1).nonzero(), lit.any(0).nonzero()
                around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                name = f"lamp{int(batch['index'][clip])}"
                assert [float(side) * 64 for side in box] == pytest.approx([int(v) for v in around], abs=1.6), name
                seen += 1
    assert seen >= (20 if crop == "random_resized" else 30)


# ---- pictures that change their size ----

SMALL = (64, 48)


def _joined(path: Path, encoder: str, options: dict) -> None:
    """20 frames of 128 x 96, then 20 of 64 x 48, as `cat` joins files."""
    content = b""
    for first, size in ((0, (128, 96)), (20, SMALL)):
        part = path.with_name(f"part-{first}{path.suffix}")
        encode(part, encoder, options, frames=[picture(number, *size) for number in range(first, first + 20)])
        content += part.read_bytes()
        part.unlink()
    path.write_bytes(content)


def _packets_joined(path: Path, encoder: str, options: dict, pixel_format: str) -> None:
    """The same in a container that is joined as it should be: one index, times that go on."""
    parts = []
    for first, size in ((0, (128, 96)), (20, SMALL)):
        part = path.with_name(f"part-{first}{path.suffix}")
        encode(part, encoder, options, pixel_format, frames=[picture(n, *size) for n in range(first, first + 20)])
        parts.append(part)
    with av.open(str(path), "w") as output:
        copy = None
        for number, part in enumerate(parts):
            with av.open(str(part)) as given:
                copy = copy or output.add_stream_from_template(given.streams.video[0], opaque=True)
                for packet in given.demux(given.streams.video[0]):
                    if packet.size:
                        packet.pts = packet.dts = packet.pts + number * round(20 / 25 / packet.time_base)
                        packet.stream = copy
                        output.mux(packet)
            part.unlink()


@pytest.mark.parametrize(("first", "then"), [("yuvj420p", "yuvj444p"), ("yuvj422p", "yuvj420p")])
def test_pictures_that_change_their_sampling_are_not_for_dali(first, then, tmp_path):
    """Motion JPEG of one size: DALI goes on as if all were sampled as the first one is."""
    path = tmp_path / "both.avi"
    other = _encoded_packets(tmp_path / "1.avi", then, first=20)
    encode(tmp_path / "0.avi", "mjpeg", {}, first)
    remux(tmp_path / "0.avi", path, lambda packets: [*packets[:20], *map(copied, packets[20:], other)])
    info = media.probe_video(str(path))
    assert not info.suits_dali(media.DALI_CPU_CODECS) and info.is_certain
    assert numbers(media.decode_frames(str(path), np.arange(40), info)) == list(range(40))
    colours = patches_of(media.decode_frames(str(path), np.array([30]), info)[0])
    assert np.abs(colours - PATCHES).max() < 10


def _encoded_packets(path: Path, pixel_format: str, first: int) -> list[bytes]:
    encode(path, "mjpeg", {}, pixel_format, first=first)
    with av.open(str(path)) as given:
        return [bytes(packet) for packet in given.demux(video=0) if packet.size]


NO_B = {**H264_B, "bf": 0}
CHANGING: dict[str, Callable[[Path], None]] = {
    "h264.ts": lambda path: _joined(path, "libx264", H264_B),
    "h264.h264": lambda path: _joined(path, "libx264", H264_B),
    "hevc.ts": lambda path: _joined(
        path, "libx265", {"x265-params": "log-level=none:pools=none", "preset": "ultrafast"}
    ),
    "mpeg2.mpg": lambda path: _joined(path, "mpeg2video", {"g": 12}),
    "mpeg4.avi": lambda path: _packets_joined(path, "mpeg4", {"g": 12}, "yuv420p"),
    "vp9.webm": lambda path: _packets_joined(path, "libvpx-vp9", VP9, "yuv420p"),
    "vp8.webm": lambda path: _packets_joined(path, "libvpx", VP8, "yuv420p"),
    "mjpeg.avi": lambda path: _packets_joined(path, "mjpeg", {}, "yuvj420p"),
    "vp9_shrinks.webm": lambda path: path.write_bytes((CASES / "vp9_shrinks.webm").read_bytes()),
}


@pytest.mark.parametrize("name", CHANGING)
def test_pictures_that_shrink_are_resized_to_the_first(name, tmp_path):
    path = tmp_path / name
    CHANGING[name](path)
    decoded = plainly_decoded(path)
    shown, count = numbers(decoded), len(decoded)
    whole = range(80 if name == "vp9_shrinks.webm" else 40)
    # FFmpeg's MPEG-2 decoder holds one frame back and loses it where the size changes.
    assert shown == [number for number in whole if (name, number) != ("mpeg2.mpg", 19)]
    assert decoded[-1].shape == (48, 64, 3)
    info = media.probe_video(str(path))
    assert (info.frames, info.width, info.height) == (count, 128, 96)
    assert numbers(media.decode_frames(str(path), np.arange(count), info)) == shown
    for asked in ([count - 1], [count // 2], [count // 2 - 1], [3], [count - 1, 0, count // 2]):
        found = media.decode_frames(str(path), np.array(asked), info)
        assert numbers(found) == [shown[i] for i in asked] and found.shape[1:] == (96, 128, 3)
        assert np.abs(patches_of(found[0]) - PATCHES).max() < 25
    listed = write_list(tmp_path / "list.txt", [path.name])
    config = data_setup(listed, crop="whole", sampling_rate=4, mean=(0, 0, 0), std=(1, 1, 1))
    for by_dali in (True, False):
        with closing(loader_of(config, micro=1)) as loader:
            if not by_dali:
                loader.suspects.update(dict.fromkeys(loader.paths, "on trial"))
            for epoch, batch in enumerate(itertools.islice(loader.batches(0), 3)):
                clip = sampling.random_clip(SampleKey(0, epoch, 0), count, 8, 4)
                assert numbers(as_pixels(batch["video"][0])) == [shown[i] for i in clip], by_dali
            assert loader.replaced == 0, loader.bad_files

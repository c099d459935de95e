"""One table of colours: matrix x range x pixel format x decoder. Training and evaluation see what a file's tags say.

The truth is computed here from the definitions (ITU-R BT.601, BT.709, BT.2020, SMPTE 240M); the ffmpeg command shows
the same. A file that states no matrix is BT.601 at every size, 720 lines and more included, as the ffmpeg command has
it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numbered_videos import PATCHES, encode, patches_of, picture
from video_files import CPU, data_setup, loader_of, write_list

from mvd_fast.data import media
from mvd_fast.data.lists import Entry
from mvd_fast.data.pipeline import PipelineSpec
from mvd_fast.evaluation.backbone import Preprocessing
from mvd_fast.evaluation.frozen import MultiView, UniformViews, batches_of, samples_of

MOST = 4  # levels of 255
SIDE = 64
MATRICES = {  # number in ITU-T H.273, table 4; weights of red and blue
    "bt709": (1, 0.2126, 0.0722),
    "unspecified": (2, 0.299, 0.114),
    "fcc": (4, 0.30, 0.11),
    "bt470bg": (5, 0.299, 0.114),
    "smpte170m": (6, 0.299, 0.114),
    "smpte240m": (7, 0.212, 0.087),
    "bt2020nc": (9, 0.2627, 0.0593),
}
RGB = 0
SUBSAMPLED = {"420": (2, 2), "422": (2, 1), "444": (1, 1), "gray": (1, 1)}
FINE = {
    "libx264": {"qp": 1, "preset": "ultrafast"},
    "libx264rgb": {"qp": 0, "preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1:qp=1"},
    "libvpx": {"qmin": 0, "qmax": 1, "b": "5M", "deadline": "realtime", "cpu-used": 8},
    "libvpx-vp9": {"crf": 2, "b": 0, "deadline": "realtime", "cpu-used": 8},
    "libsvtav1": {"preset": 10, "crf": 5, "svtav1-params": "lp=1"},
    "mpeg2video": {"qmin": 1, "qmax": 1},
    "mjpeg": {"qmin": 1, "qmax": 1},
}


@dataclass(frozen=True)
class Row:
    encoder: str
    ending: str
    pixel_format: str
    matrix: str = "unspecified"
    is_full: bool = False
    tag: str = ""  # of the container, where it is not the matrix

    @property
    def name(self) -> str:
        levels = "pc" if self.is_full else "tv"
        return f"{self.encoder}-{self.pixel_format}-{self.matrix}-{self.tag}-{levels}.{self.ending}"

    def write(self, folder: Path, side: int = SIDE) -> Path:
        number = RGB if self.matrix == "rgb" else MATRICES[self.tag or self.matrix][0]

        def tag(stream: av.VideoStream) -> None:
            stream.codec_context.colorspace = number
            stream.codec_context.color_range = 2 if self.is_full else 1

        frame = av.VideoFrame.from_ndarray(picture(0b10100101, side, side), format="rgb24")
        if self.matrix != "rgb":
            frame = coded_frame(picture(0b10100101, side, side), self.pixel_format, self.matrix, self.is_full)
            frame.colorspace, frame.color_range = number, 2 if self.is_full else 1
        path = folder / self.name
        encode(path, self.encoder, FINE.get(self.encoder), self.pixel_format, frames=16 * [frame], set_up=tag)
        return path


def coded_frame(rgb: np.ndarray, pixel_format: str, matrix: str, is_full: bool) -> av.VideoFrame:
    """uint8 [H, W, 3] as a frame of luma and colour differences."""
    bits = 10 if "10" in pixel_format else 8
    across, down = next(value for key, value in SUBSAMPLED.items() if key in pixel_format)
    _, red, blue = MATRICES[matrix]
    share = rgb / 255
    luma = share @ [red, 1 - red - blue, blue]
    differences = [(share[..., 2] - luma) / (2 - 2 * blue), (share[..., 0] - luma) / (2 - 2 * red)]
    highest, scale = 2**bits - 1, 2 ** (bits - 8)
    planes = [luma * highest if is_full else (16 + 219 * luma) * scale]
    for plane in differences:
        small = plane.reshape(len(plane) // down, down, -1, across).mean((1, 3))
        planes.append(128 * scale + small * (highest if is_full else 224 * scale))
    frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], pixel_format)
    for plane, values in zip(frame.planes, planes, strict=False):  # gray has one plane
        whole = values.round().clip(0, highest).astype(np.uint8 if bits == 8 else "<u2").view(np.uint8)
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        rows[: len(whole), : whole.shape[1]] = whole
    return frame


def rows() -> Iterator[Row]:
    both = (False, True)
    formats = ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le")
    for pixel_format, matrix, is_full in itertools.product(formats, MATRICES, both):
        yield Row("libx264", "mp4", pixel_format, matrix, is_full)
        yield Row("ffv1", "mkv", pixel_format, matrix, is_full)
    for pixel_format, matrix, is_full in itertools.product(("yuv420p", "yuv444p"), MATRICES, both):
        if matrix != "fcc":  # VP9 has no number for it
            yield Row("libvpx-vp9", "webm", pixel_format, matrix, is_full)
    for matrix, is_full in itertools.product(MATRICES, both):
        yield Row("libx265", "mp4", "yuv420p", matrix, is_full)
    for matrix in MATRICES:
        yield Row("libvpx", "webm", "yuv420p", tag=matrix)  # VP8 is BT.601, whatever the container says
        yield Row("libsvtav1", "mp4", "yuv420p", matrix)
        yield Row("mpeg2video", "mkv", "yuv420p", matrix)
    for pixel_format in ("yuvj420p", "yuvj422p", "yuvj444p"):
        yield Row("mjpeg", "avi", pixel_format, "bt470bg", True)
    for encoder, ending, pixel_format in (
        ("libx264rgb", "mp4", "rgb24"),
        ("ffv1", "mkv", "bgr0"),
        ("png", "mov", "rgb24"),
        ("qtrle", "mov", "rgb24"),
        ("libvpx-vp9", "webm", "gbrp"),
    ):
        yield Row(encoder, ending, pixel_format, "rgb", True)


ROWS = {row.name: row for row in rows()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("colours")
    return {name: row.write(folder) for name, row in ROWS.items()}


def training(files: dict[str, Path], folder: Path, by_dali: bool) -> dict[str, np.ndarray]:
    """A frame of every file as training shows it, uint8 [32, 32, 3]."""
    listed = write_list(folder / "list.txt", files.values())
    config = data_setup(listed, crop="center", mean=(0, 0, 0), std=(1, 1, 1), sampling_rate=1)
    with closing(loader_of(config, micro=len(files))) as loader:
        if not by_dali:
            loader.suspects.update(dict.fromkeys(loader.paths, "on trial"))
        batch = next(loader.batches(0))
        assert loader.replaced == 0, loader.bad_files
    names = list(files)
    return {names[i]: shown(video) for i, video in zip(batch["index"].tolist(), batch["video"], strict=True)}


def evaluation(files: dict[str, Path], kind: type, **fields: Any) -> dict[str, np.ndarray]:
    """Likewise as the views of a test show it."""
    views = Preprocessing(8, 1, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).dataset(kind, **fields)
    spec, bad, names = PipelineSpec(views, 16, 2, CPU), {}, list(files)
    found: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(2) as pool:
        samples = samples_of(pool, views, [Entry(str(path), 0) for path in files.values()], 2, bad, lambda: None)
        for videos, numbers in batches_of(spec, samples):
            found |= {names[number]: shown(video) for number, video in zip(numbers, videos, strict=True)}
    assert not bad
    return found


def shown(video: torch.Tensor) -> np.ndarray:
    return (video[:, 0].permute(1, 2, 0).numpy() * 255).round()


def wrong(found: dict[str, np.ndarray], truth: np.ndarray = PATCHES) -> dict[str, float]:
    """The largest error of the patches, in levels, where it is more than MOST."""
    errors = {name: float(np.abs(patches_of(frame) - truth).max()) for name, frame in found.items()}
    return {name: error for name, error in errors.items() if error > MOST}


@pytest.mark.parametrize("decoder", ["decode_frames", "DALI in training", "PyAV in training", "a view", "test views"])
def test_patches_are_within_four_levels_of_the_truth(decoder, files, tmp_path):
    if decoder == "decode_frames":
        probed = {name: (str(path), media.probe_video(str(path))) for name, path in files.items()}
        found = {name: media.decode_frames(path, np.array([3]), info)[0] for name, (path, info) in probed.items()}
    elif decoder == "a view":
        found = evaluation(files, UniformViews)
    elif decoder == "test views":
        found = evaluation(files, MultiView, clips=1, crops=1)
    else:
        found = training(files, tmp_path, by_dali=decoder == "DALI in training")
    assert found.keys() == ROWS.keys()
    assert not wrong(found)


@pytest.mark.parametrize("matrix", ["unspecified", "bt709"])
def test_large_pictures_without_a_matrix_are_bt601(matrix, tmp_path):
    path = str(Row("libx264", "mp4", "yuv420p", matrix).write(tmp_path, 720))
    assert not wrong({path: media.decode_frames(path, np.array([0]), media.probe_video(path))[0]})


GREYS = np.array([60, 110, 160, 210], dtype=np.uint8)


@pytest.mark.parametrize(
    ("encoder", "ending", "pixel_format", "is_full"),
    [
        ("libx264", "mp4", "gray", False),
        ("libx264", "mp4", "gray", True),
        ("libx264", "mp4", "gray10le", False),
        ("libx265", "mp4", "gray", True),
        ("ffv1", "mkv", "gray", True),
        ("ffv1", "mkv", "gray10le", True),
        ("png", "mov", "gray", True),
    ],
)
def test_grey_videos(encoder, ending, pixel_format, is_full, tmp_path):
    pixels = np.repeat(GREYS[np.arange(SIDE) * 4 // SIDE][None, :, None], SIDE, 0).repeat(3, 2)
    frame = coded_frame(pixels, pixel_format, "bt709", is_full)
    path = tmp_path / f"grey.{ending}"

    def tag(stream: av.VideoStream) -> None:
        frame.color_range = stream.codec_context.color_range = 2 if is_full else 1

    encode(path, encoder, FINE.get(encoder), pixel_format, frames=16 * [frame], set_up=tag)
    found = {"decode_frames": media.decode_frames(str(path), np.array([3]), media.probe_video(str(path)))[0]}
    for by_dali in (True, False):
        found[f"training {by_dali}"] = training({"grey": path}, tmp_path, by_dali)["grey"]
    assert not wrong(found, GREYS[:, None])


@pytest.mark.parametrize("matrix", [8, 14])
def test_matrices_that_nobody_can_show_are_refused_by_name(matrix, tmp_path):
    """YCgCo and ICtCp: FFmpeg takes them for BT.601 without a word."""

    def tag(stream: av.VideoStream) -> None:
        stream.codec_context.colorspace = matrix

    path = tmp_path / "strange.mp4"
    encode(path, "libx264", FINE["libx264"], frames=16 * [picture(5, SIDE, SIDE)], set_up=tag)
    with pytest.raises(media.BadFile, match=f"number {matrix} of H.273"):
        media.probe_video(str(path))

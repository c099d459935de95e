"""Files of kinds that people report in public trackers, from one end to the other: tests/data/cases.

Those whose frames only have to be the right ones are among the VIDEOS of numbered_videos.py.
"""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered_videos import CASES, PATCHES, number_of, patches_of
from video_files import assert_same, data_setup, loader_of, take, write_list

from mvd_fast.cli import main
from mvd_fast.data import media, sampling
from mvd_fast.data.sampling import SampleKey


def as_pixels(video: torch.Tensor) -> np.ndarray:
    """float32 [3, T, H, W] in [0, 1] -> [T, H, W, 3] in levels."""
    return (video.permute(1, 2, 3, 0).numpy() * 255).round()


def one_clip(name: str, folder: Path, by_dali: bool, epoch: int = 0) -> np.ndarray:
    """The clip of 8 frames that training shows of a file in an epoch: [8, 32, 32, 3], the whole picture."""
    listed = write_list(folder / "list.txt", [CASES / name])
    config = data_setup(listed, crop="whole", mean=(0, 0, 0), std=(1, 1, 1))
    with closing(loader_of(config, micro=1)) as loader:
        if not by_dali:
            loader.suspects.update(dict.fromkeys(loader.paths, "on trial"))
        batch = next(itertools.islice(loader.batches(0), epoch, None))
        assert loader.replaced == 0, loader.bad_files
    return as_pixels(batch["video"][0])


def test_a_phones_rotation_is_shown_upright():
    path = str(CASES / "rotate_90.mp4")
    info = media.probe_video(path)
    assert (info.frames, info.width, info.height) == (20, 96, 128)
    shown = media.decode_frames(path, np.arange(20), info)
    assert [number_of(np.rot90(frame, 3)) for frame in shown] == [*range(20)]


@pytest.mark.parametrize("name", ["vp9_bt709.webm", "vp9_bt601.webm"])
@pytest.mark.parametrize("by_dali", [True, False])
def test_colours_are_those_of_the_tag(name, by_dali, tmp_path):
    path = str(CASES / name)
    found = [media.decode_frames(path, np.array([7]), media.probe_video(path))[0]]
    found.append(one_clip(name, tmp_path, by_dali)[0])
    assert all(np.abs(patches_of(frame) - PATCHES).max() <= 4 for frame in found)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_a_video_with_hidden_frames_is_usable_to_its_end(epoch, tmp_path):
    """50 of its 53 packets show something. Clips are the same in every run and for every decoder."""
    path = str(CASES / "vp8_hidden_frames.webm")
    info = media.probe_video(path)
    assert info.frames == 50
    media.require_decodable(path, info)
    clip = sampling.random_clip(SampleKey(0, epoch, 0), 50, 8, 2)
    expected = media.decode_frames(path, clip, info).mean((1, 2))
    for by_dali in (True, True, False):
        found = one_clip("vp8_hidden_frames.webm", tmp_path, by_dali, epoch).mean((1, 2))
        assert np.abs(found - expected).max() < 2
    config = data_setup(tmp_path / "list.txt")
    assert_same(take(config, 4, micro=1), take(config, 4, micro=1))


def test_seconds_of_ava_are_seconds_where_the_frame_rate_varies(tmp_path):
    """5 s at 10, then 5 s at 30 frames a second: second 2 is frame 20, 6 is 80, 8 is 140."""
    (tmp_path / "film.mp4").write_bytes((CASES / "vfr_10_then_30.mp4").read_bytes())
    rows = "".join(f"film,{second:04d},0.1,0.1,0.9,0.9,1,0\n" for second in (2, 6, 8))
    (tmp_path / "train.csv").write_text(rows)
    config = data_setup(
        tmp_path / "train.csv",
        kind="ava",
        classes=18,
        size=64,
        sampling_rate=1,
        crop="whole",
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    with closing(loader_of(config, micro=3)) as loader:
        batch = next(loader.batches(0))
        assert loader.replaced == 0, loader.bad_files
    shown = {
        int(index): number_of(as_pixels(video)[4]) for index, video in zip(batch["index"], batch["video"], strict=True)
    }
    assert shown == {0: 20, 1: 80, 2: 140}


def test_what_is_no_clip_is_refused_by_name(tmp_path, capsys):
    names = ("one_frame.ts", "eight_frames.ogv", "song_with_cover.mp4")
    listed = write_list(tmp_path / "list.txt", [CASES / name for name in names])
    assert main(["data", "check", str(listed), "--min-frames", "16"]) == 1
    said = capsys.readouterr()
    lines = " ".join((said.out + said.err).split())
    for name, words in zip(names, ("1 frame", "8 frames", "cover"), strict=True):
        assert name in lines and words in lines
    assert media.probe_video(str(CASES / "eight_frames.ogv")).frames == 8


@pytest.mark.parametrize("name", ["packed_b_frames.avi", "vp8_hidden_frames.webm", "joined_clock_set_back.ts"])
def test_the_check_that_decodes_finds_them_usable(name, tmp_path):
    listed = write_list(tmp_path / "list.txt", [CASES / name])
    assert main(["data", "check", str(listed), "--decode"]) == 0

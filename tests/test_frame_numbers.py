"""Frame i of a video is the i-th that a player shows, however it is asked for: files of every kind say their number."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numbered_videos import number_of, plainly_decoded
from video_files import data_setup, loader_of, write_list
from video_kinds import DAMAGED_VIDEOS, VIDEOS

from mvd_fast.data import media, sampling
from mvd_fast.data.sampling import SampleKey

AROUND_KEY_FRAMES = (0, 1, 2, 7, 9, 10, 11, 12, 13, 19, 20, 23, 24, 25, 35)


@pytest.fixture(scope="module")
def path_of(tmp_path_factory) -> Callable[[str], Path]:
    """The file of a name of VIDEOS or DAMAGED_VIDEOS, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("numbered")

    def written(name: str) -> Path:
        path = folder / name
        if not path.exists():
            (VIDEOS | DAMAGED_VIDEOS)[name].write(path)
        return path

    return written


def numbers(frames) -> list[int]:
    return [number_of(frame) for frame in frames]


def ways_to_ask(count: int) -> list[list[int]]:
    """One frame alone, clips, the end, descending with repeats, and all at once."""
    alone = sorted({i for i in (*AROUND_KEY_FRAMES, count // 2, count - 2, count - 1) if 0 <= i < count})
    middle = count // 2
    clips = [[*range(middle, min(middle + 8, count))], [*range(3, count, 4)], [*range(max(0, count - 5), count)]]
    descending = [count - 1, count - 1, middle, middle, middle // 2, 0]
    return [*([i] for i in alone), *(clip for clip in clips if clip), descending, [*range(count)]]


@pytest.mark.parametrize("name", VIDEOS)
def test_every_frame_is_the_one_a_player_shows(name, path_of):
    path, shown = str(path_of(name)), list(VIDEOS[name].shown)
    assert numbers(plainly_decoded(path)) == shown, "the file is not what it was made for"
    info = media.probe_video(path)
    assert (info.frames, info.width, info.height) == (len(shown), VIDEOS[name].width, 96)
    everything = media.decode_frames(path, np.arange(len(shown)), info)
    assert everything.dtype == np.uint8 and numbers(everything) == shown
    for asked in ways_to_ask(len(shown)):
        found = media.decode_frames(path, np.array(asked), info)
        assert numbers(found) == [shown[i] for i in asked], asked
        assert np.array_equal(found, everything[asked]), asked


REFUSED = {  # damaged files that are not looked into: name -> a word of the reason
    "h264_cut_off.mkv": "truncated",
    "h264_cut_off.flv": "truncated",
    "h264_cut_off.avi": "truncated",
    "mpeg4_cut_off.avi": "truncated",
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_files_are_refused_by_name(name, path_of):
    with pytest.raises(media.BadFile, match=REFUSED[name]):
        media.probe_video(str(path_of(name)))


@pytest.mark.parametrize("name", [name for name in DAMAGED_VIDEOS if name not in REFUSED])
def test_damage_never_shows_another_frame(name, path_of):
    """Each way to ask gives the frames that a decoder shows, or is refused by name; what is whole is shown."""
    path = str(path_of(name))
    shown = list(DAMAGED_VIDEOS[name].shown) or numbers(plainly_decoded(path))
    info = media.probe_video(path)
    assert info.frames == len(shown)
    refused = []
    for asked in ways_to_ask(len(shown)):
        try:
            found = media.decode_frames(path, np.array(asked), info)
        except media.BadFile as error:
            assert re.match(r"frame \d+ of \d+ cannot be decoded", str(error))
            refused.append(asked)
        else:
            assert numbers(found) == [shown[i] for i in asked], asked
    assert [0] not in refused and [len(shown) - 1] not in refused


@pytest.mark.parametrize(
    "name", ["h264_zeros.mp4", "h264_wrong_length.mkv", "h264_no_unit.mp4", "hevc_only_length.mkv"]
)
def test_a_picture_that_a_decoder_refuses_is_damage(name, path_of):
    """What follows up to the next key frame refers to it."""
    path = str(path_of(name))
    info = media.probe_video(path)
    with pytest.raises(media.BadFile, match="is damaged"):
        media.require_decodable(path, info)
    with pytest.raises(media.BadFile, match="cannot be decoded"):
        media.decode_frames(path, np.arange(info.frames), info)


@pytest.mark.parametrize("by_dali", [True, False])
def test_training_sees_these_frames(by_dali, path_of, tmp_path):
    """Of every file: clips anywhere in it, whoever decodes."""
    listed = write_list(tmp_path / "list.txt", [path_of(name) for name in VIDEOS])
    config = data_setup(listed, crop="whole", sampling_rate=1, mean=(0, 0, 0), std=(1, 1, 1))
    with closing(loader_of(config, micro=len(VIDEOS))) as loader:
        if not by_dali:
            loader.suspects.update(dict.fromkeys(loader.paths, "on trial"))
        batches = list(itertools.islice(loader.batches(0), 3))
        assert loader.replaced == 0, loader.bad_files
    names, wrong = list(VIDEOS), {}
    for epoch, batch in enumerate(batches):
        for index, video in zip(batch["index"].tolist(), batch["video"], strict=True):
            shown = VIDEOS[names[index]].shown
            asked = sampling.random_clip(SampleKey(config.seed, epoch, index), len(shown), 8, 1)
            found = numbers((video.permute(1, 2, 3, 0).numpy() * 255).round())
            if found != [shown[i] for i in asked]:
                wrong[names[index], epoch] = found
    assert not wrong


def test_the_documentation_says_how_many_kinds_are_tried():
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    stated = re.search(r"(\d+) sound and (\d+) damaged files", text)
    assert stated and [int(number) for number in stated.groups()] == [len(VIDEOS), len(DAMAGED_VIDEOS)]

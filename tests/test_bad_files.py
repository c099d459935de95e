"""Bad files are replaced, counted and named; too many of them stop the run."""

from __future__ import annotations

import itertools
import logging
import re
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import assert_same, data_setup, loader_of, take, write_broken, write_list, write_video

from mvd_fast.data.loader import TooManyBadFiles
from mvd_fast.data.quarantine import write_quarantine
from mvd_fast.data.source import NoUsableFile


@pytest.fixture(scope="module")
def broken_list(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """40 files, 8 of them broken, one of each sort, VP9 and H.264 mixed."""
    folder = tmp_path_factory.mktemp("videos")
    words = write_broken(folder)
    good = [folder / f"good {number}_{'vp9.webm' if number % 2 else 'h264.mp4'}" for number in range(32)]
    for number, path in enumerate(good):
        write_video(path, 16, seed=number)
    names = [path.name for path in good]
    for position, name in enumerate(words):
        names.insert(5 * position, name)
    return write_list(folder / "broken.txt", names), words


def test_a_list_with_broken_files_trains_through_and_names_each(broken_list, caplog):
    listed, words = broken_list
    config = data_setup(listed, max_bad_share=0.25)
    with closing(loader_of(config, micro=8)) as loader, caplog.at_level(logging.WARNING):
        batches = list(itertools.islice(loader.batches(0), 10))  # two epochs
        shown = {Path(name).name for batch in batches for name in loader.names(batch["index"])}
        found = {Path(path).name: reason for path, reason in loader.bad_files.items()}
        assert loader.replaced == 2 * len(words)
    assert found.keys() == words.keys()
    for name, word in words.items():
        assert word in found[name]
        named = [record for record in caplog.records if name in record.getMessage() and word in record.getMessage()]
        assert len(named) == 1
    assert shown.isdisjoint(words)
    assert all(torch.isfinite(batch["video"]).all() for batch in batches)


def test_replacements_do_not_depend_on_when_damage_is_found(broken_list):
    listed, _ = broken_list
    config = data_setup(listed, max_bad_share=0.25)
    whole = take(config, 7, micro=8)
    assert_same(take(config, 2, 5, micro=8), whole[5:])  # a fresh loader meets the damage only now
    dealt = [take(config, 3, 1, rank=rank, world=2, micro=4) for rank in (0, 1)]
    for step in range(3):
        for name in whole[0]:
            assert torch.equal(torch.cat([part[step][name] for part in dealt]), whole[1 + step][name])


def test_too_many_bad_files_stop_the_run(broken_list):
    listed, _ = broken_list
    config = data_setup(listed, max_bad_share=0.1)
    with closing(loader_of(config, micro=8)) as loader, pytest.raises(TooManyBadFiles) as caught:
        list(itertools.islice(loader.batches(0), 5))
    assert re.match(r"[5-8] of 40 files", str(caught.value))
    for word in ("data.max_bad_share 0.1", "mvd-fast data check", str(listed)):
        assert word in str(caught.value)


def test_quarantined_files_are_replaced_alike_and_do_not_count_as_bad(broken_list, tmp_path):
    listed, words = broken_list
    copied = tmp_path / "list.txt"
    copied.write_text(listed.read_text())
    known = [name for name in words if not name.startswith("holes")]
    write_quarantine(str(copied), {str(listed.parent / name): "broken" for name in known})
    config = data_setup(copied, root=str(listed.parent), max_bad_share=0.05)
    with closing(loader_of(config, micro=8)) as loader:
        found = list(itertools.islice(loader.batches(0), 5))
        assert {Path(path).name for path in loader.bad_files} == {"holes.mkv", "holes.mp4"}
        assert loader.replaced == len(words)
    assert_same(found, take(data_setup(listed, max_bad_share=0.25), 5, micro=8))


def test_a_list_without_any_usable_file_says_so(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.mp4").write_bytes(b"no video")
    listed = write_list(tmp_path / "list.txt", [f"{number}.mp4" for number in range(6)])
    with (
        closing(loader_of(data_setup(listed))) as loader,
        pytest.raises(NoUsableFile, match=r"all unusable.*data check"),
    ):
        next(loader.batches(0))


def test_image_kind_replaces_broken_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for name in ("good.jpg", "good.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    whole, png = (tmp_path / "good.jpg").read_bytes(), (tmp_path / "good.png").read_bytes()
    broken = {
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "text.jpg": (b"not an image", "not a readable image"),
        "holes.png": (png[:60] + bytes(len(png) - 120) + png[-60:], "cannot be decoded"),
    }
    for name, (content, _) in broken.items():
        (tmp_path / name).write_bytes(content)
    listed = write_list(tmp_path / "list.txt", [*broken, *["good.jpg", "good.png"] * 2])
    config = data_setup(listed, kind="image", max_bad_share=0.5)
    with closing(loader_of(config)) as loader:
        list(itertools.islice(loader.batches(0), 4))
        found = {Path(path).name: reason for path, reason in loader.bad_files.items()}
    assert found.keys() == broken.keys()
    assert all(word in found[name] for name, (_, word) in broken.items())

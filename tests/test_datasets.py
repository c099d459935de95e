"""Kinds of datasets: their settings, what a batch has of what a task asks for, and a new kind in one file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from video_files import data_setup, take, write_list, write_video

from mvd_fast.config.kinds import DATASETS, available_kinds, kind_module
from mvd_fast.data.crops import AnyCrop, CenterCrop, MultiScale, RandomResized

TESTS = Path(__file__).parent


def python(code: str, plugins: Path | str = "") -> str:
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "MVD_PLUGINS": str(plugins)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- settings ----


def test_settings_are_read_without_dali_and_torch():
    names = [f"{DATASETS}.{kind}" for kind in available_kinds(DATASETS)]
    modules = ", ".join([*names, "mvd_fast.data.crops", "mvd_fast.data.augment", "mvd_fast.evaluation.settings"])
    assert len(names) == 5
    assert python(f"import sys, {modules}; print([m for m in ('torch', 'nvidia') if m in sys.modules])") == "[]\n"


def test_a_crop_is_an_object_of_a_kind_or_its_name():
    crops = TypeAdapter(AnyCrop)
    assert crops.validate_python("center") == CenterCrop()
    assert crops.validate_python({"kind": "random_resized", "area": [0.5, 1.0]}) == RandomResized(area=(0.5, 1.0))
    assert crops.validate_python({"scales": [1.0]}) == MultiScale(scales=(1.0,))
    assert crops.dump_python(MultiScale(scales=(1.0,))) == {"kind": "multiscale", "scales": (1.0,)}
    with pytest.raises(ValidationError, match=r"unknown kind 'centre', did you mean 'center'\?"):
        crops.validate_python("centre")
    with pytest.raises(ValidationError, match=r"scales\n *Extra inputs"):
        crops.validate_python({"kind": "center", "scales": [1.0]})


@pytest.mark.parametrize(
    ("clip", "rate", "span"),
    [({"sampling_rate": 3}, 3, 22), ({"kind": "center"}, 4, 29), ("segments", None, 29)],
)
def test_only_clips_of_equal_steps_have_a_rate(clip, rate, span):
    data = data_setup("list.txt", kind="labelled", classes=2, clip=clip).data
    assert data.sampling_rate == rate and data.span(8) == span
    if rate is None:
        with pytest.raises(ValidationError, match="unknown kind 'segments'; there are: random, center"):
            data_setup("list.txt", clip=clip)


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"clip": "center", "crop": "center"}, True),
        ({"clip": "center", "crop": "whole", "flip": 1.0}, True),
        ({"clip": "center", "crop": "center", "flip": 0.5}, False),
        ({"clip": "center"}, False),
        ({"crop": "center"}, False),
    ],
)
def test_what_is_centred_is_the_same_in_all_epochs(settings, same):
    assert data_setup("list.txt", **settings).data.shows_one_view == same


def test_missing_files_of_ava_are_named(tmp_path):
    ava = kind_module(DATASETS, "ava").Config
    lost = [str(tmp_path / name) for name in ("train.csv", "root", "excluded.csv")]
    train, root, excluded = ava(train=lost[0], root=lost[1], excluded=lost[2]).missing_files()
    assert train.startswith(f"data.train: {lost[0]} does not exist; give AVA's file of annotations, such as ava_train")
    assert root.startswith(f"data.root: {lost[1]} is not a folder")
    assert excluded == f"data.excluded: {lost[2]} does not exist; give AVA's file, or leave it empty"
    (train,) = ava(train=str(tmp_path)).missing_files()
    assert train.startswith(f"data.train: {tmp_path} is a folder; give AVA's file")


# ---- batches ----


def test_a_batch_has_what_the_task_asks_for(tmp_path):
    names = [write_video(tmp_path / f"clip{number}_vp9.webm", 24, seed=number).name for number in range(4)]
    listed = write_list(tmp_path / "list.txt", names)
    (masked,) = take(data_setup(listed, masks=2), 1)
    assert masked.keys() == {"video", "mask", "index"} and masked["mask"].shape == (2, 2, 64)
    (labelled,) = take(data_setup(listed, kind="labelled", classes=4), 1)
    assert labelled.keys() == {"video", "label", "target", "index"}
    (unlabelled,) = take(data_setup(listed, kind="labelled"), 1)  # for pre-training
    assert unlabelled.keys() == masked.keys()
    rows = "".join(f"clip{number}_vp9,0000,0.1,0.1,0.9,0.9,{number + 1},0\n" for number in range(4))
    (tmp_path / "train.csv").write_text(rows)
    (boxed,) = take(data_setup(tmp_path / "train.csv", kind="ava", classes=4, sampling_rate=1), 1)
    assert boxed.keys() == {"video", "boxes", "labels", "box_clip", "index"}
    (unboxed,) = take(data_setup(tmp_path / "train.csv", kind="ava", sampling_rate=1), 1)
    assert unboxed.keys() == masked.keys()


ARRAYS = '''
"""Clips that are NumPy files, uint8 [T, H, W, 3]."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np

from mvd_fast.data.crops import CroppedConfig
from mvd_fast.data.datasets import Dataset, Inputs


class Config(CroppedConfig):
    """NumPy files."""

    gives: ClassVar[frozenset[str]] = frozenset({"video"})
    kind: Literal["arrays"] = "arrays"
    step: int = 1


@dataclass(frozen=True)
class Arrays(Dataset):
    extensions = (".npy",)

    def check(self, path):
        _, height, width, _ = np.load(path, mmap_mode="r").shape
        return SimpleNamespace(height=height, width=width)

    def frames(self, facts, key):
        return np.arange(self.request.num_frames) * self.data.step

    def load(self, path, facts, key, by_dali):
        box = self.box(key, facts.width, facts.height)
        return Inputs.of_pixels(np.load(path)[self.frames(facts, key)], box, self.flipped(key))


build = Arrays
'''
USED = """
from dataclasses import replace
from video_files import data_setup, take
from mvd_fast.config.kinds import DATASETS, available_kinds
from mvd_fast.data.show import show_samples
assert "arrays" in available_kinds(DATASETS)
setup = data_setup({folder!r}, kind="arrays", step=2, crop="whole", mean=(0, 0, 0), std=(1, 1, 1))
(batch,) = take(setup, 1, micro=2)
print(batch["index"].tolist(), (batch["video"][:, 0, :, 0, 0] * 255).round().int().tolist(), batch["mask"].shape[1])
print(*[line for shown in show_samples(setup, 1, 0, {out!r}) for line in shown.page.lines], sep="|")
"""


def test_a_new_kind_is_one_new_file(tmp_path):
    new = tmp_path / "plugins" / "datasets" / "arrays.py"
    new.parent.mkdir(parents=True)
    new.write_text(ARRAYS)
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(2):
        frames = np.full((16, 40, 40, 3), np.arange(16)[:, None, None, None] + 100 * number, dtype=np.uint8)
        np.save(folder / f"{number}.npy", frames)
    code = USED.format(folder=str(folder), out=str(tmp_path / "out"))
    batch, shown = python(code, tmp_path / "plugins").splitlines()
    grey = {0: list(range(0, 16, 2)), 1: list(range(100, 116, 2))}
    order = [int(index) for index in batch[1:5].split(",")]
    assert batch == f"{order} {[grey[index] for index in order]} 64"
    assert "40 x 40; whole crop 40 x 40 at x 0, y 0, shown as 32 x 32|decoded by its dataset" in shown

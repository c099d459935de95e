"""What is done to labelled clips: draws, operations, erasing, mixing, test views."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from video_files import assert_same, data_setup, take, write_list, write_video

from mvd_fast.data import augment
from mvd_fast.data.augment import (
    AugmentConfig,
    Mix,
    RandAugmentConfig,
    draw_erasing,
    draw_mix,
    draw_operations,
    erase,
    mixed,
)
from mvd_fast.data.lists import ListError
from mvd_fast.data.loader import DataSetup
from mvd_fast.data.sampling import Box, Purpose, SampleKey, dense_view, random_segments, uniform_view, view_offset

VIEWS = json.loads((Path(__file__).parent / "data" / "recipe_facts.json").read_text())["test_views"]
EVERYTHING = {"rand_augment": {"layers": 2}, "random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "repeats": 2}


# ---- test views ----


@pytest.mark.parametrize("sampling", VIEWS)
def test_views_equal_the_golden_tables(sampling: str) -> None:
    for case in VIEWS[sampling]:
        assert len(case["views"]) == case["segments"] * case["crops"]
        for view in case["views"]:
            frames, place = case["video_frames"], (view["segment"], case["segments"])
            if sampling == "dense":
                found = dense_view(frames, 16, case["sampling_rate"], *place)
            else:
                found = uniform_view(frames, 16, *place)
            assert found.tolist() == view["frames"]
            wide, tall = (
                view_offset(*shape, case["short"], view["crop"], case["crops"])
                for shape in ((case["long"], case["short"]), (case["short"], case["long"]))
            )
            assert wide == (Box(0, view["offset"], 224, 224), case["long"], 224)
            assert tall == (Box(view["offset"], 0, 224, 224), 224, case["long"])


def test_single_views_are_central() -> None:
    assert dense_view(100, 8, 2, 0, 1).tolist() == list(range(42, 58, 2))
    assert view_offset(340, 256, 224, 0, 1) == (Box(0, 36, 224, 224), 297, 224)


# ---- draws ----


def keys(count: int, **changes) -> list[SampleKey]:
    return [SampleKey(0, 1, index, **changes) for index in range(count)]


def test_copies_differ_in_what_is_done_to_them_alone() -> None:
    first, second = SampleKey(0, 0, 5), SampleKey(0, 0, 5, copy=1)
    same = {purpose for purpose in Purpose if first.draws(purpose).below(2**60) == second.draws(purpose).below(2**60)}
    assert same == set(Purpose) - {Purpose.CROP, Purpose.FLIP, Purpose.AUGMENT, Purpose.ERASE}


def test_distributions_of_draws() -> None:
    draws = SampleKey(3, 0, 0).draws(Purpose.MIX)
    normal = np.array([draws.normal(7.0, 0.5) for _ in range(4000)])
    assert abs(normal.mean() - 7) < 0.03 and abs(normal.std() - 0.5) < 0.02  # about four standard errors
    for alpha in (0.8, 1.0):
        beta = np.array([draws.beta(alpha) for _ in range(4000)])
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(beta.mean() - 0.5) < 0.02 and abs(beta.var() / variance - 1) < 0.1


def test_every_operation_is_drawn_half_of_the_time() -> None:
    rows = np.concatenate([draw_operations(key, RandAugmentConfig(layers=4)) for key in keys(1500)])
    counts = np.bincount(rows[:, 0], minlength=16)
    assert abs(counts[15] / len(rows) - 0.5) < 0.03 and counts[:15].min() > 130 and counts[:15].max() < 280
    assert abs(rows[:, 1].mean() - 70) < 1 and set(rows[:, 2]) == {0, 1}


def test_erased_boxes_lie_inside_and_as_often_as_asked() -> None:
    boxes = [draw_erasing(key, 0.25, 224)[0] for key in keys(2000)]
    found = [box for box in boxes if box is not None]
    assert abs(len(found) / 2000 - 0.25) < 0.04
    shares = [box.height * box.width / 224**2 for box in found]
    assert min(shares) > 0.018 and max(shares) < 0.34
    assert all(box.y + box.height <= 224 and box.x + box.width <= 224 for box in found)


def test_segments_cover_the_video() -> None:
    found = np.stack([random_segments(key, 161, 16) for key in keys(300)])
    assert (found.min(0) == np.arange(16) * 10).all() and (found.max(0) == np.arange(1, 17) * 10).all()
    assert random_segments(SampleKey(0, 0, 0), 1, 8).tolist() == [0] * 8


# ---- doing it ----


def test_erasing_fills_one_box_of_all_frames() -> None:
    video = torch.zeros(3, 4, 16, 16)
    erase(video, Box(2, 3, 5, 6), seed=1)
    inside = video[:, :, 2:7, 3:9]
    assert (inside != 0).all() and (video != 0).sum() == inside.numel() and 0.8 < inside.std() < 1.2


def test_mixing_by_hand() -> None:
    video, target = torch.rand(4, 3, 2, 8, 8), torch.eye(4)
    blend, soft = mixed(video, target, Mix(0.75))
    torch.testing.assert_close(blend[0], 0.75 * video[0] + 0.25 * video[3])
    torch.testing.assert_close(soft[0], torch.tensor([0.75, 0, 0, 0.25]))
    pasted, soft = mixed(video, target, Mix(1 - 12 / 64, Box(1, 2, 3, 4)))
    for x, y in ((pasted[1], video[1]), (pasted[1][:, :, 1:4, 2:6], video[2][:, :, 1:4, 2:6])):
        assert x.shape == y.shape
    expected = video[1].clone()
    expected[:, :, 1:4, 2:6] = video[2][:, :, 1:4, 2:6]  # in every frame: width and height are cut, not time
    torch.testing.assert_close(pasted[1], expected)
    torch.testing.assert_close(soft.sum(1), torch.ones(4))


def test_kinds_of_mixing_are_drawn_as_asked() -> None:
    both = [draw_mix(key, AugmentConfig(mixup=0.8, cutmix=1.0), 32) for key in keys(1000)]
    assert abs(sum(mix.box is not None for mix in both) / 1000 - 0.5) < 0.06
    assert all(mix.box is None for mix in (draw_mix(key, AugmentConfig(mixup=0.8), 32) for key in keys(50)))
    rarely = [draw_mix(key, AugmentConfig(cutmix=1.0, mix_probability=0.2), 32) for key in keys(1000)]
    assert abs(sum(mix != Mix() for mix in rarely) / 1000 - 0.2) < 0.06


# ---- batches ----


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    names = [
        write_video(folder / f"{n}_{ending}", 24, seed=n).name for n in range(6) for ending in ("vp9.webm", "h264.mp4")
    ]
    return write_list(folder / "list.txt", names)


def config(clips: Path, classes: int = 12, **recipe) -> DataSetup:
    cut = {"crop": "random_resized", "flip": 0.5}
    return data_setup(clips, kind="labelled", classes=classes, augment=recipe, **cut)


def test_batches_are_functions_of_seed_epoch_and_index(clips: Path) -> None:
    """Starting later gives the same; so do two ranks, whose copies of a clip stay side by side."""
    every = take(config(clips, **EVERYTHING), 4)
    assert every[0]["video"].shape == (8, 3, 8, 32, 32) and every[0]["target"].shape == (8, 12)
    assert (every[0]["index"][::2] == every[0]["index"][1::2]).all()
    assert not torch.equal(every[0]["video"][0], every[0]["video"][1])
    assert_same(take(config(clips, **EVERYTHING), 2, start=2), every[2:])
    unmixed = {**EVERYTHING, "mixup": 0.0, "cutmix": 0.0}
    (whole,) = take(config(clips, **unmixed), 1)
    parts = [take(config(clips, **unmixed), 1, rank=rank, world=2, micro=2)[0] for rank in range(2)]
    for name in ("video", "target", "index"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    assert torch.equal(whole["target"].argmax(1), whole["label"])


def test_each_operation_treats_all_frames_alike(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips that stand still stay still, and every operation changes one (not all: some have the full contrast)."""
    first_frame = {"sampling_rate": 40, "crop": "center", "flip": 0.0}
    still = data_setup(clips, kind="labelled", classes=12, augment={"rand_augment": {"layers": 1}}, **first_frame)
    (before,) = take(replace(still, request=replace(still.request, augment=None)), 1, micro=12)
    changed = set()
    for first in (0, 12):

        def every(key: SampleKey, recipe: RandAugmentConfig, first: int = first) -> np.ndarray:
            return np.array([[(first + key.index) % len(augment.OPERATIONS), 70, 0]], dtype=np.int32)

        monkeypatch.setattr(augment, "draw_operations", every)
        (done,) = take(still, 1, micro=12)
        assert (done["video"] == done["video"][:, :, :1]).all()
        differs = (done["video"] != before["video"]).flatten(1).any(1)
        changed |= {(first + index) % len(augment.OPERATIONS) for index in done["index"][differs].tolist()}
    assert changed == set(range(len(augment.OPERATIONS)))


def test_labels_outside_of_the_classes_are_refused(clips: Path) -> None:
    with pytest.raises(ListError, match=r"has label 4, but model\.num_classes is 4: labels go from 0 to 3"):
        take(config(clips, classes=4), 1)

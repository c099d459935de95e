"""Sampling: the golden tables, and purity."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mvd_fast.data.sampling import (
    Draws,
    Purpose,
    SampleKey,
    center_box,
    clip_indices,
    epoch_order,
    fixed_offsets,
    multi_scale_box,
    multi_scale_sizes,
    random_clip,
    random_frame,
    random_resized_box,
    replacement,
    start_choices,
)

FACTS = json.loads((Path(__file__).parent / "data" / "recipe_facts.json").read_text())
SCALES = (1.0, 0.875, 0.75, 0.66)


@pytest.mark.parametrize("row", FACTS["pretrain_frame_indices"])
def test_clip_indices_equal_the_golden_table(row):
    found = clip_indices(row["video_frames"], row["num_frames"], row["sampling_rate"], row["start"])
    assert found.tolist() == row["indices"]
    assert start_choices(row["video_frames"], row["num_frames"], row["sampling_rate"]) == row["max_start_exclusive"]


@pytest.mark.parametrize("row", FACTS["multi_scale_crops"])
def test_multi_scale_crops_equal_the_golden_table(row):
    sizes = multi_scale_sizes(*row["image"], row["target"], SCALES)
    assert [list(size) for size in sizes] == row["crop_wh"]
    assert len(row["offsets_of_first_last"]) > 0
    for size, offsets in row["offsets_of_first_last"].items():
        assert [list(offset) for offset in fixed_offsets(*row["image"], *json.loads(size))] == offsets


def test_every_start_size_and_offset_is_drawn():
    keys = [SampleKey(0, 0, index) for index in range(4000)]
    starts = Counter(int(random_clip(key, 40, 8, 4)[0]) for key in keys)
    assert set(starts) == set(range(start_choices(40, 8, 4)))
    assert max(starts.values()) < 1.3 * min(starts.values())
    boxes = {multi_scale_box(key.draws(Purpose.CROP), 340, 256, 224, SCALES) for key in keys}
    expected = {
        (y, x, height, width)
        for width, height in multi_scale_sizes(340, 256, 224, SCALES)
        for x, y in fixed_offsets(340, 256, width, height)
    }
    assert boxes == expected


def test_random_frame_covers_the_video():
    assert {int(random_frame(SampleKey(1, 2, index), 7)[0]) for index in range(200)} == set(range(7))


@pytest.mark.parametrize("size", [(340, 256), (1, 1), (2, 300), (5, 3), (224, 224)])
def test_boxes_stay_inside_the_frame(size):
    width, height = size
    for index in range(200):
        draws = SampleKey(0, 1, index).draws(Purpose.CROP)
        for box in (
            multi_scale_box(draws, width, height, 224, SCALES),
            random_resized_box(draws, width, height, (0.2, 1.0)),
            center_box(width, height),
        ):
            assert box.height > 0 and box.width > 0 and box.y >= 0 and box.x >= 0
            assert box.y + box.height <= height and box.x + box.width <= width


def test_random_resized_crop_has_the_area_and_ratio_asked_for():
    boxes = [random_resized_box(SampleKey(0, 0, i).draws(Purpose.CROP), 320, 240, (0.2, 0.5)) for i in range(500)]
    areas = [box.height * box.width / (320 * 240) for box in boxes]
    ratios = [math.log(box.width / box.height) for box in boxes]
    assert 0.19 < min(areas) < 0.22 and 0.48 < max(areas) < 0.51
    assert abs(np.mean(areas) - 0.35) < 0.02 and abs(np.mean(ratios)) < 0.02
    assert max(map(abs, ratios)) < math.log(4 / 3) + 0.02


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)}
    for order in orders.values():
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders.values()}) == 4
    assert np.array_equal(epoch_order(1, 1, 1000), orders[1, 1])


def test_streams_of_different_counters_are_unrelated():
    words = {
        tuple(Draws(seed, epoch, index, purpose).words(2).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
        for index in (0, 1, 2**40)
        for purpose in Purpose
    }
    assert len(words) == 2 * 2 * 3 * len(Purpose)


def test_draws_are_the_documented_function_of_philox():
    key, counter = np.array([7, 3], dtype=np.uint64), np.array([0, 11, int(Purpose.CROP), 0], dtype=np.uint64)
    first, second = np.random.Philox(key=key, counter=counter).random_raw(2).tolist()
    draws = SampleKey(7, 3, 11).draws(Purpose.CROP)
    assert draws.uniform(2.0, 4.0) == 2.0 + 2.0 * (first >> 11) / 2**53
    assert draws.below(10) == second * 10 // 2**64


def test_replacements_differ_from_attempt_to_attempt():
    key = SampleKey(0, 0, 5)
    found = [replacement(key, attempt, 10**6) for attempt in range(1, 20)]
    assert len(set(found)) == len(found)
    assert found == [replacement(key, attempt, 10**6) for attempt in range(1, 20)]

"""AVA's files and metric: hand-computed cases, golden numbers of the official evaluation, a second implementation."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
from test_lists import ODD_NAMES

from mvd_fast.data import ava_files
from mvd_fast.data.ava_files import AvaError, Boxes, KeyFrame, Row
from mvd_fast.evaluation.ava import average_precision, frame_map, pairwise_iou

GOLDEN = json.loads((Path(__file__).parent / "data" / "ava_map.json").read_text())["cases"]
LEFT, RIGHT = (0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 1.0, 1.0)
FIRST, SECOND = KeyFrame("film", 902), KeyFrame("film", 903)


def boxes(*rows) -> Boxes:
    """Of (frame, box, action, score) or, without a score, ground truth."""
    return Boxes.of_rows([Row(*row, *([1.0] if len(row) == 3 else [])) for row in rows])


def the_map(truth, detections, actions=(1,), **options) -> float:
    return frame_map(boxes(*truth), boxes(*detections), set(actions), **options).mean


# ---- by hand ----


def test_a_perfect_detector_has_one_and_an_empty_one_zero() -> None:
    truth = [(FIRST, LEFT, 1), (FIRST, RIGHT, 1), (SECOND, LEFT, 2)]
    assert the_map(truth, [(*row, 0.3) for row in truth], (1, 2)) == 1.0
    assert the_map(truth, [], (1, 2)) == 0.0


def test_a_false_alarm_above_a_hit_halves_the_precision() -> None:
    truth = [(FIRST, LEFT, 1)]
    assert the_map(truth, [(FIRST, RIGHT, 1, 0.9), (FIRST, LEFT, 1, 0.5)]) == 0.5
    assert the_map(truth, [(FIRST, RIGHT, 1, 0.1), (FIRST, LEFT, 1, 0.5)]) == 1.0


def test_precision_is_the_best_at_this_recall_or_more() -> None:
    """Hit, miss, miss, hit, hit of 4: precisions 1, 2/4, 3/5 -> 1, 3/5, 3/5, and 0 for the one not found."""
    hits = np.array([True, False, False, True, True])
    assert average_precision(np.arange(5, 0, -1.0), hits, 4) == pytest.approx((1 + 0.6 + 0.6) / 4)


def test_a_second_detection_of_a_box_is_a_miss() -> None:
    truth = [(FIRST, LEFT, 1), (FIRST, RIGHT, 1)]
    twice = [(FIRST, LEFT, 1, 0.9), (FIRST, LEFT, 1, 0.8), (FIRST, RIGHT, 1, 0.7)]
    assert the_map(truth, twice) == pytest.approx((1 + 2 / 3) / 2)


def test_a_detection_only_takes_the_box_it_overlaps_most() -> None:
    """Two true boxes that overlap: both detections overlap the first most, so the second of them is a miss."""
    near = (0.0, 0.0, 0.5, 1.0)
    truth = [(FIRST, LEFT, 1), (FIRST, near, 1)]
    assert pairwise_iou(np.array([LEFT]), np.array([near])) == pytest.approx(0.8)
    assert the_map(truth, [(FIRST, LEFT, 1, 0.9), (FIRST, LEFT, 1, 0.8)]) == 0.5


def test_half_an_overlap_is_enough_and_less_is_not() -> None:
    truth = [(FIRST, (0.0, 0.0, 1.0, 1.0), 1)]
    assert the_map(truth, [(FIRST, (0.0, 0.0, 1.0, 0.5), 1, 0.9)]) == 1.0
    assert the_map(truth, [(FIRST, (0.0, 0.0, 1.0, 0.49), 1, 0.9)]) == 0.0


def test_actions_are_matched_apart_and_those_without_truth_left_out() -> None:
    truth = [(FIRST, LEFT, 1)]
    found = frame_map(boxes(*truth), boxes((FIRST, LEFT, 2, 0.9)), {1, 2, 3})
    assert found.precision[1] == 0.0 and math.isnan(found.precision[2]) and math.isnan(found.precision[3])
    assert found.mean == 0.0 and found.truths == {1: 1, 2: 0, 3: 0}
    assert math.isnan(frame_map(boxes(*truth), boxes(), {7}).mean)


def test_key_frames_without_truth_count_and_excluded_ones_do_not() -> None:
    truth = [(FIRST, LEFT, 1)]
    detections = [(SECOND, LEFT, 1, 0.9), (FIRST, LEFT, 1, 0.5)]
    assert the_map(truth, detections) == 0.5
    assert the_map(truth, detections, excluded={SECOND}) == 1.0
    assert math.isnan(the_map(truth, detections, excluded={FIRST}))


def test_only_the_best_detections_of_a_key_frame_count() -> None:
    """51 detections of one key frame: the true one scores lowest and is dropped. Actions not evaluated take no room."""
    truth = [(FIRST, LEFT, 1)]
    crowd = [(FIRST, RIGHT, 1, 0.5 + i / 1000) for i in range(50)]
    assert the_map(truth, [*crowd, (FIRST, LEFT, 1, 0.1)]) == 0.0
    assert the_map(truth, [*crowd, (FIRST, LEFT, 1, 0.1)], most=0) == pytest.approx(1 / 51)
    others = [(FIRST, RIGHT, 9, score) for _, _, _, score in crowd]
    assert the_map(truth, [*others, (FIRST, LEFT, 1, 0.1)]) == 1.0


def test_empty_boxes_never_match() -> None:
    empty = (0.2, 0.2, 0.2, 0.8)
    assert the_map([(FIRST, empty, 1)], [(FIRST, empty, 1, 0.9)]) == 0.0


# ---- the official evaluation and a second implementation ----


def _write(folder: Path, case: dict) -> tuple[Boxes, Boxes, frozenset[KeyFrame]]:
    for name in ("truth", "detections", "excluded"):
        (folder / name).write_text("".join(f"{line}\n" for line in case[name]))
    return (
        ava_files.read_annotations(folder / "truth"),
        ava_files.read_detections(folder / "detections"),
        ava_files.read_exclusions(folder / "excluded"),
    )


@pytest.mark.parametrize("case", GOLDEN)
def test_numbers_of_the_official_evaluation(case, tmp_path: Path) -> None:
    truth, detections, excluded = _write(tmp_path, case)
    found = frame_map(truth, detections, set(case["actions"]), excluded)
    assert found.mean == pytest.approx(case["mean"], abs=1e-12)
    for action, precision in case["precision"].items():
        expected = math.nan if precision is None else precision
        assert found.precision[int(action)] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def _iou(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area_a, area_b = ((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))
    return width * height / (area_a + area_b - width * height)


def slow_average_precision(truth: Boxes, detections: Boxes, action: int) -> float:
    """By definition: for every k, the best precision of all cut-offs that find k boxes or more; the mean over k."""
    targets = [(f, tuple(b)) for f, b, a in zip(truth.frames, truth.boxes, truth.actions, strict=True) if a == action]
    columns = zip(detections.frames, detections.boxes, detections.actions, detections.scores, strict=True)
    ranked = sorted(((s, f, tuple(b)) for f, b, a, s in columns if a == action), key=lambda row: -row[0])
    found, curve = set(), []
    for rank, (_, frame, box) in enumerate(ranked, start=1):
        rivals = [(_iou(box, other), -i, i) for i, (where, other) in enumerate(targets) if where == frame]
        if rivals and max(rivals)[0] >= 0.5:
            found.add(max(rivals)[2])
        curve.append((len(found), len(found) / rank))
    best = [max((p for n, p in curve if n >= k), default=0.0) for k in range(1, len(targets) + 1)]
    return sum(best) / len(best) if best else math.nan


@pytest.mark.parametrize("seed", range(8))
def test_a_second_implementation_agrees(seed: int) -> None:
    rng = random.Random(seed)
    truth, detections = [], []
    for second in range(6):
        for _ in range(rng.randint(0, 4)):
            x, y = rng.uniform(0, 0.6), rng.uniform(0, 0.6)
            box = (x, y, x + rng.uniform(0.1, 0.4), y + rng.uniform(0.1, 0.4))
            actions = rng.sample((1, 2, 3), rng.randint(1, 3))
            truth += [(KeyFrame("v", second), box, action) for action in actions]
            for _ in range(rng.randint(0, 2)):
                moved = tuple(side + rng.gauss(0, 0.03) for side in box)
                detections += [(KeyFrame("v", second), moved, action, rng.random()) for action in (1, 2, 3)]
    truth, detections = boxes(*truth), boxes(*detections)
    found = frame_map(truth, detections, {1, 2, 3, 4}, most=0)
    for action in (1, 2, 3, 4):
        expected = slow_average_precision(truth, detections, action)
        assert found.precision[action] == pytest.approx(expected, abs=1e-12, nan_ok=True)


# ---- files ----


def test_detections_are_read_as_written(tmp_path: Path) -> None:
    written = boxes((FIRST, (0.125, 0.25, 0.5, 1.0), 12, 0.875), (SECOND, LEFT, 80, 0.0001))
    ava_files.write_detections(tmp_path / "found.csv", written)
    assert (tmp_path / "found.csv").read_text().startswith("film,0902,0.125000,0.250000,0.500000,1.000000,12,0.875\n")
    read = ava_files.read_detections(tmp_path / "found.csv")
    assert read.frames == written.frames and np.array_equal(read.boxes, written.boxes)
    assert read.actions.tolist() == [12, 80] and read.scores.tolist() == [0.875, 0.0001]


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if name.strip(b" ") == name], ids=repr)
def test_videos_may_have_any_name(tmp_path: Path, name: bytes) -> None:
    frame = KeyFrame(os.fsdecode(name), 902)
    ava_files.write_detections(tmp_path / "found.csv", boxes((frame, LEFT, 12, 0.5)))
    assert ava_files.read_detections(tmp_path / "found.csv").frames == [frame]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_end_where_lines_end(tmp_path: Path, end: str) -> None:
    (tmp_path / "out.csv").write_bytes(f"a\u2028b,0902{end}c\u0085d,0903{end}{end}".encode())
    assert ava_files.read_exclusions(tmp_path / "out.csv") == {KeyFrame("a\u2028b", 902), KeyFrame("c\u0085d", 903)}


def test_label_maps_of_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.pbtxt").write_text(
        'item {\n  name: "bend/bow (at the waist)"\n  id: 1\n}\nitem {\n  name: "sit"\n  id: 11\n}\n'
    )
    (tmp_path / "b.pbtxt").write_text('label {\n  name: "sit"\n  label_id: 11\n  label_type: PERSON_MOVEMENT\n}\n')
    assert ava_files.read_label_map(tmp_path / "a.pbtxt") == {1: "bend/bow (at the waist)", 11: "sit"}
    assert ava_files.read_label_map(tmp_path / "b.pbtxt") == {11: "sit"}


def test_proposals_are_those_above_the_threshold_once_each(tmp_path: Path) -> None:
    lines = ("v,0902,0,0,0.5,1,,0.9", "v,0902,0,0,0.5,1,12,0.95", "v,0902,0.5,0,1,1,,0.79", "v,0903,0.5,0,1,1,,0.8")
    (tmp_path / "persons.csv").write_text("\n".join(lines))
    found = ava_files.read_proposals(tmp_path / "persons.csv", 0.8)
    assert found.frames == [KeyFrame("v", 902), KeyFrame("v", 903)] and found.scores.tolist() == [0.95, 0.8]
    with pytest.raises(AvaError, match=r"lists no boxes with a score of 0\.99 or more"):
        ava_files.read_proposals(tmp_path / "persons.csv", 0.99)


BAD_ROWS = {
    "v,0902,0,0,1": "line 1: 5 columns; write video,timestamp",
    "v,902.5,0,0,1,1,3,0": r"timestamp '902\.5' is not a whole number",
    "v,0902,0,zero,1,1,3,0": "y1 'zero' is not a number",
    "v,0902,0,0,1,nan,3,0": "y2 'nan' is not a number",
    "v,0902,12,30,200,220,3,0": "seems to be in pixels",
    "v,0902,0.5,0,0.4,1,3,0": "ends before it begins; write x1,y1,x2,y2",
    "v,0902,1.1,0,1.2,1,3,0": "is outside the frame, which goes from 0 to 1",
    "v,0902,0,-0.2,1,0,3,0": "is outside the frame",
    "v,0902,0,0,1,1,stand,0": "action_id 'stand' is not a whole number",
    "v,0902,0,0,1,1,0,0": "action_id 0 does not exist",
    ",0902,0,0,1,1,3,0": "the video's name is empty",
    "": "lists no boxes",
}


@pytest.mark.parametrize(("row", "sentence"), BAD_ROWS.items())
def test_bad_rows_are_one_sentence(row: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(row)
    with pytest.raises(AvaError, match=sentence):
        ava_files.read_annotations(tmp_path / "bad.csv")


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(AvaError, match=r"none\.csv cannot be read: No such file"):
        ava_files.read_detections(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_text("v,902", encoding="utf-16")
    with pytest.raises(AvaError, match="is UTF-16 text; save it as UTF-8"):
        ava_files.read_exclusions(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_bytes(b"v,902\0")
    with pytest.raises(AvaError, match="is no text file"):
        ava_files.read_exclusions(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text('v,902\n"' + "w" * 200_000)
    with pytest.raises(AvaError, match=r"x\.csv, line 2: field larger"):
        ava_files.read_exclusions(tmp_path / "x.csv")
    (tmp_path / "map.pbtxt").write_text("item { id: 3 }")
    with pytest.raises(AvaError, match="entry 1: it must have a name and an id"):
        ava_files.read_label_map(tmp_path / "map.pbtxt")
    (tmp_path / "map.pbtxt").write_text("1 stand")
    with pytest.raises(AvaError, match="has no entries"):
        ava_files.read_label_map(tmp_path / "map.pbtxt")

"""AVA's metric: the mean over the actions of the frame-wise average precision at an IoU of 0.5.

The protocol is that of the official evaluation (ActivityNet's, PASCAL VOC's average precision):

* Of each key frame the 50 best-scored detections of the evaluated actions count. Key frames that are excluded do not
  count at all; those without ground truth count, their detections being false.
* Within a key frame and an action, detections choose in descending order of score the true box that they overlap
  most. It is a hit if the IoU is 0.5 or more and the box is not yet taken: a second one on it is a miss, even if it
  would fit another box.
* Over all key frames the detections of an action are sorted by score; the average precision is the area below the
  precision-recall curve after precision was made non-increasing in recall. An action without ground truth has none
  (nan) and is left out of the mean.

Equal scores in different key frames keep the order of the file; the official code leaves their order open.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np

from mvd_fast.data.ava_files import Boxes, KeyFrame

IOU = 0.5
MOST = 50  # detections of one key frame


@dataclass(frozen=True)
class FrameMap:
    """`mean`: the mAP, nan if no action has ground truth. `precision`: action -> average precision or nan; `truths`:
    action -> number of true boxes."""

    mean: float
    precision: dict[int, float]
    truths: dict[int, int]


def frame_map(
    truth: Boxes,
    detections: Boxes,
    actions: Mapping[int, str] | Set[int],
    excluded: Set[KeyFrame] = frozenset(),
    iou: float = IOU,
    most: int = MOST,
) -> FrameMap:
    """The metric over `actions`, those evaluated; rows of others are passed over. `most` 0: all detections count."""
    wanted = {frame: group for frame, group in _by_action(truth, actions).items() if frame not in excluded}
    counts = {action: sum(len(group.get(action, ())) for group in wanted.values()) for action in actions}
    scores: dict[int, list[float]] = defaultdict(list)
    hits: dict[int, list[bool]] = defaultdict(list)
    for frame, rows in _best(detections, actions, most).items():
        if frame in excluded:
            continue
        true_rows = wanted.get(frame, {})
        for action, chosen in _grouped(detections, rows).items():
            targets = truth.boxes[true_rows.get(action, [])]
            scores[action] += detections.scores[chosen].tolist()
            hits[action] += match(detections.boxes[chosen], targets, iou).tolist()
    precision = {
        action: average_precision(np.array(scores[action]), np.array(hits[action], dtype=bool), counts[action])
        for action in actions
    }
    known = [value for value in precision.values() if not np.isnan(value)]
    return FrameMap(float(np.mean(known)) if known else float("nan"), precision, counts)


def match(boxes: np.ndarray, targets: np.ndarray, iou: float = IOU) -> np.ndarray:
    """Which of the boxes [D, 4], best first, hit one of the targets [G, 4]: bool [D]. See the module's text."""
    hits = np.zeros(len(boxes), dtype=bool)
    if not len(targets):
        return hits
    overlaps = pairwise_iou(boxes, targets)
    taken = np.zeros(len(targets), dtype=bool)
    for number, target in enumerate(overlaps.argmax(axis=1)):
        if overlaps[number, target] >= iou and not taken[target]:
            hits[number] = taken[target] = True
    return hits


def pairwise_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [D, 4] and [G, 4], x1, y1, x2, y2: float64 [D, G]; 0 for empty boxes."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (high - low).clip(0).prod(-1)
    areas = [(group[:, 2:] - group[:, :2]).prod(-1) for group in (boxes, others)]
    union = areas[0][:, None] + areas[1][None, :] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def average_precision(scores: np.ndarray, hits: np.ndarray, truths: int) -> float:
    """Area below the precision-recall curve (PASCAL VOC since 2010) of detections with scores float [D] and hits bool
    [D], for `truths` true boxes; nan without any."""
    if truths == 0:
        return float("nan")
    hits = hits[np.argsort(-scores, kind="stable")]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a higher one
    return float(envelope[hits].sum() / truths)


def _by_action(boxes: Boxes, actions: Mapping[int, str] | Set[int]) -> dict[KeyFrame, dict[int, list[int]]]:
    return {
        frame: {action: rows for action, rows in _grouped(boxes, rows).items() if action in actions}
        for frame, rows in boxes.rows_of().items()
    }


def _grouped(boxes: Boxes, rows: list[int]) -> dict[int, list[int]]:
    """Rows by action, in their order."""
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(int(boxes.actions[row]), []).append(row)
    return found


def _best(detections: Boxes, actions: Mapping[int, str] | Set[int], most: int) -> dict[KeyFrame, list[int]]:
    """Of each key frame the `most` best rows with an area and an action to be evaluated, in descending order of score.

    Where equal scores compete for the last place, the official heap decides: it gives up the lowest action first, and
    takes in only what scores higher than its lowest.
    """
    heaps: dict[KeyFrame, list[tuple]] = {}
    for row, frame in enumerate(detections.frames):
        action = int(detections.actions[row])
        if action not in actions:
            continue
        x1, y1, x2, y2 = detections.boxes[row].tolist()
        entry = (float(detections.scores[row]), action, y1, x1, y2, x2, row)
        heap = heaps.setdefault(frame, [])
        if not most or len(heap) < most:
            heapq.heappush(heap, entry)
        elif entry[0] > heap[0][0]:
            heapq.heapreplace(heap, entry)
    return {
        frame: [row for _, _, y1, x1, y2, x2, row in sorted(heap, key=lambda entry: -entry[0]) if y1 < y2 and x1 < x2]
        for frame, heap in heaps.items()
    }

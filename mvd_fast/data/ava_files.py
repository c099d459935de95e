"""AVA's files (Gu et al. 2018, version 2.2): boxes with actions, detections, person proposals, exclusions, label map.

All but the label map are CSV files without a header. A key frame is named by its video and a whole second; boxes are
x1, y1, x2, y2 as shares of the frame's width and height, from its upper left corner.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from mvd_fast.errors import UserError
from mvd_fast.files import written_aside
from mvd_fast.names import printable, read_text

NO_ACTION = 0  # of proposals; AVA's actions count from 1
FARTHEST = 2.0  # a detector's box may leave the frame a little; one that goes farther is in pixels

Parsed = TypeVar("Parsed")


class AvaError(UserError):
    """An AVA file that cannot be read; the message names the file and the line."""


class KeyFrame(NamedTuple):
    """A second of a video, as AVA names it (0902 is 902)."""

    video: str
    second: int


class Row(NamedTuple):
    """One box: where it is, what it shows, how sure."""

    frame: KeyFrame
    box: tuple[float, float, float, float]
    action: int
    score: float


@dataclass(frozen=True)
class Boxes:
    """R boxes, one action each: `frames` says of which key frame; `boxes` float64 [R, 4], x1, y1, x2, y2 as shares of
    the frame; `actions` int64 [R]; `scores` float64 [R]."""

    frames: list[KeyFrame]
    boxes: np.ndarray
    actions: np.ndarray
    scores: np.ndarray

    @classmethod
    def of_rows(cls, rows: list[Row]) -> Boxes:
        frames, boxes, actions, scores = zip(*rows, strict=True) if rows else ((), (), (), ())
        return cls(
            list(frames),
            np.array(boxes, dtype=np.float64).reshape(-1, 4),
            np.array(actions, dtype=np.int64),
            np.array(scores, dtype=np.float64),
        )

    def __len__(self) -> int:
        return len(self.frames)

    def rows_of(self) -> dict[KeyFrame, list[int]]:
        """Positions of each key frame's rows; key frames in the order of their first row."""
        found: dict[KeyFrame, list[int]] = {}
        for row, frame in enumerate(self.frames):
            found.setdefault(frame, []).append(row)
        return found


def read_annotations(path: str | Path) -> Boxes:
    """Ground truth: `video,timestamp,x1,y1,x2,y2,action_id` and, since version 2.2, `person_id`. Scores are 1.

    Raises AvaError with one sentence for what is missing or malformed.
    """

    def parse(fields: list[str]) -> Row:
        _require_columns(fields, (7, 8), "video,timestamp,x1,y1,x2,y2,action_id and perhaps person_id")
        if len(fields) == 8:
            _whole("person_id", fields[7])
        return Row(_key_frame(fields), _person_box(fields), _action(fields[6]), 1.0)

    return Boxes.of_rows(_require_some(path, list(_parsed(path, parse)), "boxes"))


def read_detections(path: str | Path) -> Boxes:
    """Detections: `video,timestamp,x1,y1,x2,y2,action_id,score`; a missing score is 1, as officially.

    An empty file is a detector that found nothing. Raises AvaError.
    """

    def parse(fields: list[str]) -> Row:
        _require_columns(fields, (7, 8), "video,timestamp,x1,y1,x2,y2,action_id,score")
        score = _number("score", fields[7]) if len(fields) == 8 else 1.0
        return Row(_key_frame(fields), _box(fields), _action(fields[6]), score)

    return Boxes.of_rows(list(_parsed(path, parse)))


def read_proposals(path: str | Path, threshold: float) -> Boxes:
    """Boxes of a person detector: `video,timestamp,x1,y1,x2,y2,,score`, as SlowFast's files have them; those with a
    score of `threshold` or more. An action in the seventh column is passed over; a box that is listed several times
    counts once, with its best score.

    Raises AvaError, also when no box reaches the threshold.
    """

    def parse(fields: list[str]) -> Row:
        _require_columns(fields, (8,), "video,timestamp,x1,y1,x2,y2,(empty),score")
        return Row(_key_frame(fields), _person_box(fields), NO_ACTION, _number("score", fields[7]))

    best: dict[tuple[KeyFrame, tuple[float, ...]], Row] = {}
    for row in _parsed(path, parse):
        known = best.get((row.frame, row.box))
        if row.score >= threshold and (known is None or row.score > known.score):
            best[row.frame, row.box] = row
    return Boxes.of_rows(_require_some(path, list(best.values()), f"boxes with a score of {threshold:g} or more"))


def read_exclusions(path: str | Path) -> frozenset[KeyFrame]:
    """Key frames left out of training and evaluation: `video,timestamp` a line. Raises AvaError."""

    def parse(fields: list[str]) -> KeyFrame:
        _require_columns(fields, (2,), "video,timestamp")
        return _key_frame(fields)

    return frozenset(_parsed(path, parse))


def read_label_map(path: str | Path) -> dict[int, str]:
    """Action number -> name, from a label map in protobuf's text format.

    Each entry, `item { ... }` or `label { ... }`, has a name and an id or label_id. What the map lists is what is
    evaluated: the one made for ActivityNet has the 60 classes of the benchmark, the full one all 80. Raises AvaError.
    """
    entries = re.findall(r"\w+\s*\{([^{}]*)\}", read_text(path, AvaError))
    actions: dict[int, str] = {}
    for number, entry in enumerate(entries, start=1):
        name = re.search(r"\bname\s*:\s*([\"'])(.*?)\1", entry)
        action = re.search(r"\b(?:label_)?id\s*:\s*(\d+)", entry)
        if name is None or action is None:
            raise AvaError(f"{path}, entry {number}: it must have a name and an id (or label_id)")
        if int(action[1]) in actions:
            raise AvaError(f"{path}, entry {number}: id {action[1]} stands twice")
        actions[int(action[1])] = name[2]
    if not actions:
        raise AvaError(f'{path} has no entries such as item {{ name: "stand" id: 12 }}; give AVA\'s .pbtxt label map')
    return actions


def write_detections(path: str | Path, detections: Boxes) -> None:
    """Writes what `read_detections` and the official evaluation read; proposals leave
    the action empty. The file is complete or absent."""
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        returns = any("\r" in frame.video for frame in detections.frames)  # which Python quotes from 3.13 on
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL)
        rows = zip(detections.frames, detections.boxes, detections.actions, detections.scores, strict=True)
        for (video, second), box, action, score in rows:
            writer.writerow([video, f"{second:04d}", *(f"{side:.6f}" for side in box), action or "", f"{score:.7g}"])


def _parsed(path: str | Path, parse: Callable[[list[str]], Parsed]) -> Iterator[Parsed]:
    """Every row that is not blank; what `parse` finds wrong is raised with file and line."""
    rows = csv.reader(io.StringIO(read_text(path, AvaError), newline=""))
    try:
        for fields in rows:
            if fields:
                yield parse(fields)
    except (UserError, csv.Error) as error:
        raise AvaError(f"{printable(path)}, line {rows.line_num}: {error}") from None


def _require_some(path: str | Path, rows: list[Row], what: str) -> list[Row]:
    if not rows:
        raise AvaError(f"{path} lists no {what}")
    return rows


def _require_columns(fields: list[str], counts: tuple[int, ...], meaning: str) -> None:
    if len(fields) not in counts:
        raise UserError(f"{len(fields)} columns; write {meaning}")


def _key_frame(fields: list[str]) -> KeyFrame:
    if not (video := fields[0].strip(" \t")):
        raise UserError("the video's name is empty")
    return KeyFrame(video, _whole("timestamp", fields[1]))


def _whole(what: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(f"{what} {text!r} is not a whole number")
    return int(text)


def _action(text: str) -> int:
    action = _whole("action_id", text)
    if action == NO_ACTION:
        raise UserError("action_id 0 does not exist; AVA's actions count from 1")
    return action


def _number(what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{what} {text!r} is not a number")
    return value


def _box(fields: list[str]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (_number(name, text) for name, text in zip(("x1", "y1", "x2", "y2"), fields[2:6], strict=True))
    if max(abs(side) for side in (x1, y1, x2, y2)) > FARTHEST:
        raise UserError(
            f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} seems to be in pixels; divide by the frame's width and height"
        )
    return x1, y1, x2, y2


def _person_box(fields: list[str]) -> tuple[float, float, float, float]:
    """A box of somebody to be seen; detections of others are taken as they are, and are false."""
    x1, y1, x2, y2 = box = _box(fields)
    if x2 < x1 or y2 < y1:
        raise UserError(f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} ends before it begins; write x1,y1,x2,y2")
    if x2 <= 0 or y2 <= 0 or x1 >= 1 or y1 >= 1:
        raise UserError(f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} is outside the frame, which goes from 0 to 1")
    return box

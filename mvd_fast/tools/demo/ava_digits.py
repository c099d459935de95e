"""A tiny set in AVA's formats: clips of two moving digits, each with two actions at once, which digit and which motion.

Actions 1 to 10 are the digits 0 to 9, actions 11 to 18 the motions of `digits.MOTIONS`. One clip is one key frame, as
AVA's clips are; the digits keep the size that the demo's clips show them at. Everything is a pure function of the seed.
Validation and test clips show digit images that the other splits do not show.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mvd_fast.data.ava_files import Boxes, KeyFrame, Row, write_detections
from mvd_fast.files import write_text
from mvd_fast.tools.demo.digits import FRAMES, MOTIONS, SIZE, digit_order, draw_labels, grain, moving_glyphs, write_webm

SIDE = 2 * SIZE  # pixels of a clip
KEY = FRAMES // 2  # the key frame
SECOND = 902  # the first that AVA annotates
ACTIONS = (*(f"digit {digit}" for digit in range(10)), *MOTIONS)
VISIBLE = 0.25  # brightness from which a pixel belongs to the digit
HELD_OUT_FOR_VALIDATION = 300  # digit images, besides those of the test clips
EXCLUDED_EVERY = 20  # one key frame in so many
WRONG_SHARE = 0.5  # false boxes per clip that the pretended person detector finds


@dataclass(frozen=True)
class AvaDigitSet:
    """Clips of each split."""

    train: int
    val: int
    test: int
    seed: int

    @property
    def splits(self) -> dict[str, int]:
        return {"train": self.train, "val": self.val, "test": self.test}


def write_ava_digits(folder: Path, digit_set: AvaDigitSet) -> None:
    """Writes, for each split, `videos/<split>_<number>/0902.webm`, `<split>.csv` (annotations), `<split>_excluded.csv`,
    `<split>_proposals.csv` (boxes of a pretended detector, with scores), then `actions.pbtxt` and, last, `set.json`."""
    label_map = "".join(f'item {{\n  name: "{name}"\n  id: {number}\n}}\n' for number, name in enumerate(ACTIONS, 1))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "actions.pbtxt", label_map)
    for split, count in digit_set.splits.items():
        _write_split(folder, split, count, digit_set.seed)
    write_text(folder / "set.json", json.dumps(asdict(digit_set)))


def _write_split(folder: Path, split: str, count: int, seed: int) -> None:
    rng = np.random.default_rng((seed, *split.encode()))
    images, digits, motions = draw_labels(_images_of(split), 2 * count, rng)
    clips, boxes = render_pairs(images, motions, rng)
    frames = [KeyFrame(f"{split}_{number:05d}", SECOND) for number in range(count)]
    truth, proposals = [], []
    for number, frame in enumerate(frames):
        path = folder / "videos" / frame.video / f"{SECOND:04d}.webm"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_webm(path, clips[number])
        for person in (2 * number, 2 * number + 1):
            box = tuple(boxes[person].tolist())
            for action in (digits[person] + 1, len(ACTIONS) - len(MOTIONS) + motions[person] + 1):
                truth.append(f"{frame.video},{SECOND:04d},{','.join(f'{s:.6f}' for s in box)},{action},{person % 2}\n")
            proposals.append(Row(frame, _jittered(box, rng), 0, rng.uniform(0.8, 1.0)))
        if rng.random() < WRONG_SHARE:
            x, y = rng.uniform(0, 0.6, size=2)
            proposals.append(Row(frame, (x, y, x + 0.3, y + 0.3), 0, rng.uniform(0.5, 0.95)))
    write_text(folder / f"{split}.csv", "".join(truth))
    write_text(folder / f"{split}_excluded.csv", "".join(f"{f.video},{SECOND:04d}\n" for f in frames[::EXCLUDED_EVERY]))
    write_detections(folder / f"{split}_proposals.csv", Boxes.of_rows(proposals))


def render_pairs(images: np.ndarray, motions: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Clips uint8 [S, FRAMES, SIDE, SIDE] of images float [2 S, 8, 8], two by two: the first in the left half, the
    second in the right one, at any height; and the digits' boxes in the key frame, float64 [2 S, 4], as shares."""
    glyphs = moving_glyphs(images, motions, rng)  # [2 S, FRAMES, SIZE, SIZE]
    down = rng.integers(0, SIDE - SIZE + 1, size=len(glyphs))
    light = np.zeros((len(glyphs) // 2, FRAMES, SIDE, SIDE), dtype=np.float32)
    boxes = np.empty((len(glyphs), 4))
    for number, (glyph, y) in enumerate(zip(glyphs, down, strict=True)):
        x = number % 2 * SIZE
        light[number // 2, :, y : y + SIZE, x : x + SIZE] = glyph
        boxes[number] = np.array(_bounds(glyph[KEY] > VISIBLE)) + (x, y, x, y)
    return grain(light, rng), boxes / SIDE


def _bounds(visible: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around the true pixels of bool [H, W]; all of it if there are none."""
    if not visible.any():
        return 0, 0, visible.shape[1], visible.shape[0]
    rows, columns = visible.any(1).nonzero()[0], visible.any(0).nonzero()[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _jittered(box: tuple[float, ...], rng: np.random.Generator) -> tuple[float, ...]:
    """The box as a good detector would find it: every side off by a few hundredths of its length."""
    x1, y1, x2, y2 = box
    moved = np.array(box) + rng.normal(0, 0.04, size=4) * (x2 - x1, y2 - y1, x2 - x1, y2 - y1)
    return tuple(moved.clip(0, 1).tolist())


def _images_of(split: str) -> np.ndarray:
    train, test = digit_order("train"), digit_order("test")
    parts = {"test": test, "val": train[:HELD_OUT_FOR_VALIDATION], "train": train[HELD_OUT_FOR_VALIDATION:]}
    return parts[split]

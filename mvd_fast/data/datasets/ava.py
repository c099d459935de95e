"""Clips around AVA's key frames, with the boxes of the people in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from mvd_fast.config.run import DataRequest, missing_root
from mvd_fast.data import ava_files, media
from mvd_fast.data.ava_files import AvaError, Boxes, KeyFrame
from mvd_fast.data.crops import CroppedConfig
from mvd_fast.data.datasets.video import VideoDataset
from mvd_fast.data.sampling import Purpose, SampleKey, key_clip

INSIDE = 0.5  # share of a box that a crop must keep, or the box is left out
INWARD = 0.5  # how far the jitter goes inwards, as a share of how far it goes outwards


class Config(CroppedConfig):
    """AVA: videos and a file of boxes, each with an action."""

    gives: ClassVar[frozenset[str]] = frozenset({"video", "boxes"})

    kind: Literal["ava"] = "ava"
    train: str = Field(description="file of annotations, such as ava_train_v2.2.csv")
    root: str = Field("", description="folder of the videos; empty: the annotations' folder")
    sampling_rate: PositiveInt = Field(4, description="take every n-th frame")
    excluded: str = Field("", description="file of the key frames to leave out (`video,timestamp` a line)")
    first_second: int = Field(0, ge=0, description="the second that whole videos start at; 900 for cut ones")
    box_jitter: tuple[float, float] = Field(
        (0.2, 0.1), description="share of a box's width and height that its sides move outwards at most in training"
    )

    def missing_files(self) -> Iterator[str]:
        train = Path(self.train)
        what = "does not exist" if not train.exists() else "is a folder" if train.is_dir() else ""
        if what:
            yield (
                f"data.train: {train} {what}; give AVA's file of annotations, such as ava_train_v2.2.csv: "
                "--set data.train=PATH"
            )
        yield from missing_root(self.root)
        if self.excluded and not Path(self.excluded).is_file():
            yield f"data.excluded: {self.excluded} does not exist; give AVA's file, or leave it empty"

    def span(self, num_frames: int) -> int:
        return (num_frames - 1) * self.sampling_rate + 1


@dataclass(frozen=True)
class Scene:
    """One key frame. path: a clip with the key frame in its middle, or (`is_clip` false) a video that has it at
    `frame.second`.

    `boxes` float64 [n, 4], x1, y1, x2, y2 as shares of the frame; `labels` float32 [n, classes], 1 for each action
    (of proposals: zeros); `scores` float64 [n], the person detector's.
    """

    frame: KeyFrame
    path: str
    is_clip: bool
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class AvaDataset(VideoDataset):
    """One clip per key frame: every n-th frame, the key frame in their middle.

    As in VideoMAE's detector, in training each side of a box moves at random, by up to a share `box_jitter` (across,
    down) of the box outwards and half of that inwards; else it moves outwards by the mean of this.
    """

    data: Config
    scenes: tuple[Scene, ...] = ()
    is_training: bool = True

    def paths(self) -> list[str]:
        return [scene.path for scene in self.scenes]

    def frames(self, facts: media.VideoInfo, key: SampleKey) -> np.ndarray:
        return key_clip(facts.frames, self._key_frame(facts, key), self.request.num_frames, self.data.sampling_rate)

    def _key_frame(self, facts: media.VideoInfo, key: SampleKey) -> int:
        scene = self.scenes[key.index]
        if scene.is_clip:
            return facts.frames // 2
        first = self.data.first_second
        number = facts.frame_at(scene.frame.second - first)
        if number is None:
            begins = f" from second {first}" if first else ""
            raise media.BadFile(f"has no key frame at second {scene.frame.second}: it {facts.length}{begins}")
        return number

    def annotate(self, facts: media.VideoInfo, key: SampleKey) -> dict[str, np.ndarray] | None:
        """The boxes of a sample, where the task asks for them."""
        return None if self.request.num_classes is None else self.boxes(key, facts.width, facts.height)

    def boxes(self, key: SampleKey, width: int, height: int) -> dict[str, np.ndarray]:
        """The boxes of a sample of a width x height video, as shares of the input, cropped and flipped as its pixels
        are: `boxes` float32 [n, 4], `labels` float32 [n, classes]. Boxes that the crop loses are left out."""
        scene = self.scenes[key.index]
        boxes = self._moved(scene.boxes, key) * (width, height, width, height)
        y, x, crop_height, crop_width = self.box(key, width, height)
        boxes = (boxes - (x, y, x, y)) / (crop_width, crop_height, crop_width, crop_height)
        inside = boxes.clip(0, 1)
        kept = _areas(inside) > INSIDE * _areas(boxes)
        if not self.is_training:
            kept[:] = True
        if self.flipped(key):
            inside = np.stack([1 - inside[:, 2], inside[:, 1], 1 - inside[:, 0], inside[:, 3]], axis=1)
        return {"boxes": inside[kept].astype(np.float32), "labels": scene.labels[kept]}

    def collate(self, notes: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """`boxes` float32 [R, 4] and `labels` float32 [R, classes], one clip's after the other's, and `box_clip`
        int64 [R], which clip of the batch each is of."""
        return {
            "boxes": np.concatenate([note["boxes"] for note in notes]),
            "labels": np.concatenate([note["labels"] for note in notes]),
            "box_clip": np.repeat(np.arange(len(notes)), [len(note["boxes"]) for note in notes]),
        }

    def _moved(self, boxes: np.ndarray, key: SampleKey) -> np.ndarray:
        sides = boxes[:, [2, 3, 2, 3]] - boxes[:, [0, 1, 0, 1]]
        most = np.array(self.data.box_jitter)[[0, 1, 0, 1]]
        if self.is_training:
            draws = key.draws(Purpose.BOXES)
            share = np.array([draws.uniform(-INWARD, 1.0) for _ in range(boxes.size)]).reshape(boxes.shape)
        else:
            share = (1.0 - INWARD) / 2
        return (boxes + (-1, -1, 1, 1) * most * share * sides).clip(0, 1)


def true_scenes(data: Config, classes: int | None) -> tuple[Scene, ...]:
    """The key frames of `data.train`, a file of annotations, with one box per person and all of the person's actions.

    Raises AvaError for files that are malformed or have more actions than there are classes. classes None: nobody asks.
    """
    excluded = ava_files.read_exclusions(data.excluded) if data.excluded else frozenset()
    truth = ava_files.read_annotations(data.train)
    if classes and (highest := int(truth.actions.max())) > classes:
        raise AvaError(
            f"{data.train} has action {highest}, but model.num_classes is {classes}; set it to the highest action"
        )
    root = data.root or os.path.dirname(os.path.abspath(data.train))
    return scenes_of(truth, classes or 0, excluded, root, data.train, with_labels=classes is not None)


def scenes_of(
    boxes: Boxes, classes: int, excluded: Set[KeyFrame], root: str, source: str, with_labels: bool = True
) -> tuple[Scene, ...]:
    """One scene for each key frame of `boxes` that is not excluded; rows with the same box are one person.

    root: the folder of the videos, see `_find`. source: the file of the boxes, for the error if nothing is left.
    """
    rows_of = {frame: rows for frame, rows in boxes.rows_of().items() if frame not in excluded}
    found = _find(root, {frame.video for frame in rows_of})
    scenes = []
    for frame, rows in rows_of.items():
        people: dict[tuple[float, ...], list[int]] = {}
        for row in rows:
            x1, y1, x2, y2 = box = tuple(boxes.boxes[row].clip(0, 1).tolist())
            if x1 < x2 and y1 < y2:
                people.setdefault(box, []).append(row)
        if not people:
            continue
        labels = np.zeros((len(people), classes), dtype=np.float32)
        if with_labels:
            for person, own in enumerate(people.values()):
                labels[person, boxes.actions[own] - 1] = 1
        scores = np.array([boxes.scores[own].max() for own in people.values()])
        path, is_clip = found[frame.video]
        path = _clip_file(path, frame.second) if is_clip else path
        scenes.append(Scene(frame, path, is_clip, np.array(list(people)), labels, scores))
    if not scenes:
        raise AvaError(f"{source}: no key frame with a box is left once the excluded ones are taken out")
    return tuple(scenes)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)


def _find(root: str, videos: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Where each video is: a folder of clips `<root>/<video>/<second>.<ending>`, or a file `<root>/<video>.<ending>`.

    What is in neither form is looked for as .mp4, and reported as missing when it is read.
    """
    if not os.path.isdir(root):
        raise AvaError(f"the folder of the videos, {root}, does not exist; set data.root (or --root)")
    files = {
        Path(name).stem: name for name in sorted(os.listdir(root)) if name.lower().endswith(media.VIDEO_EXTENSIONS)
    }
    found = {}
    for video in videos:
        folder = os.path.join(root, video)
        is_clip = os.path.isdir(folder)
        found[video] = (folder if is_clip else os.path.join(root, files.get(video, f"{video}.mp4")), is_clip)
    return found


def _clip_file(folder: str, second: int) -> str:
    names = (f"{second:04d}{ending}" for ending in media.VIDEO_EXTENSIONS)
    paths = [os.path.join(folder, name) for name in names]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def build(data: Config, request: DataRequest, on_gpu: bool) -> AvaDataset:
    return AvaDataset(data, request, on_gpu, scenes=true_scenes(data, request.num_classes))

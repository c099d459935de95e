"""What a sample looks like: frame indices, crops and flips as pure functions of counters.

Every random number comes from Philox-4x64 (Salmon et al., 2011) with the key (seed, epoch) and a counter made of the
sample's position and the purpose of the draw. Only the raw 64-bit words are used, so the numbers do not depend on the
NumPy version, on the order of the calls, or on how samples are spread over ranks and processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

MAX_CROP_DISTORTION = 1
SNAP_TO_TARGET = 3  # multi-scale sides closer than this to the target become the target: no resampling then
RESIZED_CROP_ATTEMPTS = 10
RESIZED_CROP_RATIO = (3 / 4, 4 / 3)


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    ORDER = 0
    FRAMES = 1
    CROP = 2
    FLIP = 3
    REPLACE = 4


OF_A_VIEW = (Purpose.FRAMES, Purpose.CROP, Purpose.FLIP)


class Box(NamedTuple):
    """A crop in pixels of the source frame."""

    y: int
    x: int
    height: int
    width: int


@dataclass(frozen=True)
class SampleKey:
    """Names one sample of a run: everything random about it follows from these numbers.

    `view`: what frames, crop and flip are drawn from in the epoch's place, so that a later epoch can show them again.
    """

    seed: int
    epoch: int
    index: int
    view: int | None = None

    def draws(self, purpose: Purpose) -> Draws:
        replayed = self.view is not None and purpose in OF_A_VIEW
        return Draws(self.seed, self.view if replayed else self.epoch, self.index, purpose)


class Draws:
    """A stream of random numbers for one (seed, epoch, index, purpose)."""

    def __init__(self, seed: int, epoch: int, index: int, purpose: Purpose):
        key = np.array([seed, epoch], dtype=np.uint64)
        counter = np.array([0, index, int(purpose), 0], dtype=np.uint64)
        self._bits = np.random.Philox(key=key, counter=counter)

    def words(self, count: int) -> np.ndarray:
        """`count` raw words, uint64."""
        return self._bits.random_raw(count)

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        return int(self._bits.random_raw()) * limit >> 64

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high), 53 random bits."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `count` samples: int64 [count], a permutation."""
    words = Draws(seed, epoch, 0, Purpose.ORDER).words(count)
    return np.argsort(words, kind="stable")


def replacement(key: SampleKey, attempt: int, count: int) -> int:
    """Dataset position that stands in for an unusable sample; `attempt` counts from 1."""
    assert attempt >= 1, attempt
    return int(int(key.draws(Purpose.REPLACE).words(attempt)[-1]) * count >> 64)


def start_choices(video_frames: int, num_frames: int, rate: int) -> int:
    """How many start frames a clip may have: starts are drawn from [0, this)."""
    return max(1, video_frames - num_frames * rate + 1)


def clip_indices(video_frames: int, num_frames: int, rate: int, start: int) -> np.ndarray:
    """Frames of a pre-training clip, int32 [num_frames]: every `rate`-th from `start`.

    As in VideoMAE and MVD, where the video runs out the index stops advancing; it also never takes the step that would
    land exactly on the last frame's successor, so a video of `rate + 1` frames stays at its first frame.
    """
    assert 0 <= start < video_frames, (start, video_frames)
    reachable = max(0, math.ceil((video_frames - 1 - start) / rate) - 1)
    return (start + rate * np.minimum(np.arange(num_frames), reachable)).astype(np.int32)


def random_clip(key: SampleKey, video_frames: int, num_frames: int, rate: int) -> np.ndarray:
    """`clip_indices` with the start drawn for this sample."""
    start = key.draws(Purpose.FRAMES).below(start_choices(video_frames, num_frames, rate))
    return clip_indices(video_frames, num_frames, rate, start)


def center_clip(video_frames: int, num_frames: int, rate: int) -> np.ndarray:
    """`clip_indices` from the middle one of all starts: the single view of an evaluation."""
    start = (start_choices(video_frames, num_frames, rate) - 1) // 2
    return clip_indices(video_frames, num_frames, rate, start)


def random_frame(key: SampleKey, video_frames: int) -> np.ndarray:
    """One frame of the video, int32 [1], uniform over all of them."""
    return np.array([key.draws(Purpose.FRAMES).below(video_frames)], dtype=np.int32)


def multi_scale_sizes(width: int, height: int, target: int, scales: tuple[float, ...]) -> list[tuple[int, int]]:
    """(width, height) of every multi-scale crop: pairs of scales at most one step apart (TSN, VideoMAE, MVD)."""
    sides = [max(1, int(min(width, height) * scale)) for scale in scales]
    sides = [target if abs(side - target) < SNAP_TO_TARGET else side for side in sides]
    return [
        (side_w, side_h)
        for i, side_h in enumerate(sides)
        for j, side_w in enumerate(sides)
        if abs(i - j) <= MAX_CROP_DISTORTION
    ]


def fixed_offsets(width: int, height: int, crop_width: int, crop_height: int) -> list[tuple[int, int]]:
    """The 13 (x, y) offsets of a multi-scale crop: corners, centre, edge middles, quarter points."""
    step_x, step_y = (width - crop_width) // 4, (height - crop_height) // 4
    quarters = (
        *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
        *((0, 2), (4, 2), (2, 4), (2, 0)),
        *((1, 1), (3, 1), (1, 3), (3, 3)),
    )
    return [(across * step_x, down * step_y) for across, down in quarters]


def multi_scale_box(draws: Draws, width: int, height: int, target: int, scales: tuple[float, ...]) -> Box:
    """MVD's pre-training crop; resized to `target` afterwards."""
    sizes = multi_scale_sizes(width, height, target, scales)
    crop_width, crop_height = sizes[draws.below(len(sizes))]
    crop_width, crop_height = min(crop_width, width), min(crop_height, height)  # snapping may exceed a tiny frame
    offsets = fixed_offsets(width, height, crop_width, crop_height)
    x, y = offsets[draws.below(len(offsets))]
    return Box(y, x, crop_height, crop_width)


def random_resized_box(draws: Draws, width: int, height: int, area: tuple[float, float]) -> Box:
    """MAE's crop (He et al., 2022): a share `area` of the frame, aspect ratio 3/4 to 4/3, anywhere.

    Ten attempts; then the largest centred box whose aspect ratio is in range.
    """
    low, high = (math.log(ratio) for ratio in RESIZED_CROP_RATIO)
    for _ in range(RESIZED_CROP_ATTEMPTS):
        pixels = width * height * draws.uniform(*area)
        aspect = math.exp(draws.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            y, x = draws.below(height - crop_height + 1), draws.below(width - crop_width + 1)
            return Box(y, x, crop_height, crop_width)
    narrowest, widest = RESIZED_CROP_RATIO
    return _centred(width, height, min(width, round(height * widest)), min(height, round(width / narrowest)))


def center_box(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    return _centred(width, height, side, side)


def _centred(width: int, height: int, crop_width: int, crop_height: int) -> Box:
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)

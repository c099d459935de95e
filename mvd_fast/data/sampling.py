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
    BOXES = 5
    AUGMENT = 6
    ERASE = 7
    MIX = 8


OF_A_VIEW = (Purpose.FRAMES, Purpose.CROP, Purpose.FLIP, Purpose.BOXES)
OF_A_COPY = (Purpose.CROP, Purpose.FLIP, Purpose.AUGMENT, Purpose.ERASE)


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
    `copy`: which of the differently augmented copies of one clip this is.
    """

    seed: int
    epoch: int
    index: int
    view: int | None = None
    copy: int = 0

    def draws(self, purpose: Purpose) -> Draws:
        replayed = self.view is not None and purpose in OF_A_VIEW
        copy = self.copy if purpose in OF_A_COPY else 0
        return Draws(self.seed, self.view if replayed else self.epoch, self.index, purpose, copy)


class Draws:
    """A stream of random numbers for one (seed, epoch, index, purpose, copy)."""

    def __init__(self, seed: int, epoch: int, index: int, purpose: Purpose, copy: int = 0):
        key = np.array([seed, epoch], dtype=np.uint64)
        counter = np.array([0, index, int(purpose), copy], dtype=np.uint64)
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

    def normal(self, mean: float, deviation: float) -> float:
        """A normally distributed float, by Box and Muller's transform."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.uniform()))
        return mean + deviation * radius * math.cos(2.0 * math.pi * self.uniform())

    def beta(self, alpha: float) -> float:
        """A float from the symmetric beta distribution, by Jöhnk's rejection; `alpha` of at most about 2."""
        while True:
            x, y = self.uniform() ** (1 / alpha), self.uniform() ** (1 / alpha)
            if 0.0 < x + y <= 1.0:
                return x / (x + y)


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


def segment_bounds(video_frames: int, parts: int) -> list[tuple[int, int]]:
    """First and last frame, both inclusive, of `parts` equal parts of a video (neighbours share a frame)."""
    length = (video_frames - 1) / parts
    return [(round(length * i), round(length * (i + 1))) for i in range(parts)]


def random_segments(key: SampleKey, video_frames: int, num_frames: int) -> np.ndarray:
    """One random frame of each of `num_frames` equal parts of the video, int32 [num_frames]."""
    draws = key.draws(Purpose.FRAMES)
    bounds = segment_bounds(video_frames, num_frames)
    return np.array([first + draws.below(last - first + 1) for first, last in bounds], dtype=np.int32)


def uniform_view(video_frames: int, num_frames: int, number: int, count: int) -> np.ndarray:
    """Test clip `number` of `count` by uniform sampling (MVD on SSv2), int32 [num_frames].

    The middles of `count` x `num_frames` equal parts, dealt out to the clips in turn.
    """
    middles = [(first + last) // 2 for first, last in segment_bounds(video_frames, count * num_frames)]
    return np.array(middles[number::count], dtype=np.int32)


def dense_view(video_frames: int, num_frames: int, rate: int, number: int, count: int) -> np.ndarray:
    """Test clip `number` of `count` by dense sampling (VideoMAE and MVD on K400), int32 [num_frames].

    `count` windows at equal distances over every `rate`-th frame; the last frame repeats where a video is short. A
    single window lies in the middle.
    """
    frames = list(range(0, video_frames, rate))
    frames += frames[-1:] * (num_frames - len(frames))
    spare = len(frames) - num_frames
    start = int(number * spare / (count - 1)) if count > 1 else spare // 2
    return np.array(frames[start : start + num_frames], dtype=np.int32)


def view_offset(width: int, height: int, size: int, number: int, count: int) -> tuple[Box, int, int]:
    """Test crop `number` of `count`: the crop's box in the resized frame, and that frame's width and height.

    The shorter side is resized to `size`; the crops lie at equal distances along the longer one, a single one in the
    middle.
    """
    longer = int(size * max(width, height) / min(width, height))
    offset = int(number * ((longer - size) / (count - 1))) if count > 1 else (longer - size) // 2
    if width < height:
        return Box(offset, 0, size, size), size, longer
    return Box(0, offset, size, size), longer, size


def key_clip(video_frames: int, key_frame: int, num_frames: int, rate: int) -> np.ndarray:
    """Frames around a key frame, int32 [num_frames]: every `rate`-th, the key frame being number `num_frames` // 2;
    where the video ends, its first or last frame again (AVA: SlowFast)."""
    steps = np.arange(num_frames) - num_frames // 2
    return (key_frame + rate * steps).clip(0, video_frames - 1).astype(np.int32)


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

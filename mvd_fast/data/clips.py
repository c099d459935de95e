"""The frames of a clip: ways to choose them, with their settings."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from mvd_fast.config.base import Strict
from mvd_fast.data import sampling
from mvd_fast.data.sampling import SampleKey


class ClipKind(Strict):
    """One way to choose the frames of a clip."""

    kind: str
    is_random: ClassVar[bool] = True

    def frames(self, key: SampleKey, video_frames: int, num_frames: int) -> np.ndarray:
        """Their numbers in a video of `video_frames` frames: int32 [num_frames]."""
        raise NotImplementedError

    def span(self, num_frames: int) -> int:
        """Frames from the first to the last one of a clip."""
        raise NotImplementedError


class _Steps(ClipKind):
    sampling_rate: PositiveInt = Field(4, description="take every n-th frame")

    def span(self, num_frames: int) -> int:
        return (num_frames - 1) * self.sampling_rate + 1


class Random(_Steps):
    """Every n-th frame, from anywhere in the video on."""

    kind: Literal["random"] = "random"

    def frames(self, key: SampleKey, video_frames: int, num_frames: int) -> np.ndarray:
        return sampling.random_clip(key, video_frames, num_frames, self.sampling_rate)


class Center(_Steps):
    """Every n-th frame in the middle of the video."""

    kind: Literal["center"] = "center"
    is_random: ClassVar[bool] = False

    def frames(self, key: SampleKey, video_frames: int, num_frames: int) -> np.ndarray:
        return sampling.center_clip(video_frames, num_frames, self.sampling_rate)


class Segments(ClipKind):
    """One random frame of each of as many equal parts of the video as a clip has frames."""

    kind: Literal["segments"] = "segments"
    sampling_rate: ClassVar[None] = None

    def frames(self, key: SampleKey, video_frames: int, num_frames: int) -> np.ndarray:
        return sampling.random_segments(key, video_frames, num_frames)

    def span(self, num_frames: int) -> int:
        return 4 * (num_frames - 1) + 1  # the whole video, whose length is not known: as if it had parts of 4 frames

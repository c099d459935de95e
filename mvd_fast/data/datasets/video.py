"""Clips of videos: VideoMAE's and MVD's pre-training input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, SerializeAsAny

from mvd_fast.config.kinds import OfKind
from mvd_fast.data import media
from mvd_fast.data.clips import Center, ClipKind, Random
from mvd_fast.data.crops import CroppedConfig
from mvd_fast.data.datasets import Dataset
from mvd_fast.data.inputs import Inputs
from mvd_fast.data.sampling import Box, SampleKey


class Config(CroppedConfig):
    """Videos."""

    gives: ClassVar[frozenset[str]] = frozenset({"video"})

    kind: Literal["video"] = "video"
    clip: Annotated[SerializeAsAny[ClipKind], OfKind(classes=(Random, Center), default="random")] = Field(
        Random(), description="which frames of a video make a clip"
    )

    @property
    def sampling_rate(self) -> int | None:
        """A clip has every n-th frame; None where the frames of a clip are not at equal distances."""
        return self.clip.sampling_rate

    @property
    def shows_one_view(self) -> bool:
        return not (self.clip.is_random or self.crop.is_random) and self.flip in (0.0, 1.0)

    def span(self, num_frames: int) -> int:
        return self.clip.span(num_frames)


@dataclass(frozen=True)
class VideoDataset(Dataset):
    """One clip per video and epoch."""

    extensions: ClassVar[tuple[str, ...]] = media.VIDEO_EXTENSIONS
    decoder: ClassVar[str] = "PyAV"

    data: Config

    @property
    def dali_codecs(self) -> frozenset[str]:
        return media.DALI_GPU_CODECS if self.on_gpu else media.DALI_CPU_CODECS

    def check(self, path: str) -> media.VideoInfo:
        return media.probe_video(path)

    def frames(self, facts: media.VideoInfo, key: SampleKey) -> np.ndarray:
        return self.data.clip.frames(key, facts.frames, self.request.num_frames)

    def load(self, path: str, facts: media.VideoInfo, key: SampleKey, by_dali: bool) -> Inputs:
        frames = self.frames(facts, key)
        box, flip = self.box(key, facts.width, facts.height), self.flipped(key)
        if by_dali and facts.suits_dali(self.dali_codecs):
            return Inputs.of_encoded(*media.excerpt(path, frames, facts), box, flip)
        return self.of_pixels(media.decode_frames(path, frames, facts), box, flip)

    def of_pixels(self, frames: np.ndarray, box: Box, flip: bool) -> Inputs:
        """Of frames uint8 [T, H, W, 3] that were decoded here."""
        return Inputs.of_pixels(frames, box, flip)

    def describe(self, facts: media.VideoInfo) -> str:
        rate = f" at {facts.fps:.6g} a second" if facts.fps else ""
        return f"{facts.codec} {facts.pixel_format}, {super().describe(facts)}, frames: {facts.frames}{rate}"

    def why_not_dali(self, facts: media.VideoInfo) -> str:
        if facts.codec not in self.dali_codecs:
            return f"DALI has no {facts.codec} on a {'GPU' if self.on_gpu else 'CPU'}"
        if facts.shown.turns:
            return "DALI would not turn it upright"
        return "DALI would show other frames" if facts.is_plain else "DALI would show other colours or another shape"


build = VideoDataset

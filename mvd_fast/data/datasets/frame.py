"""Single frames of videos, as images: an image teacher's input where there is no image dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from mvd_fast.data import media
from mvd_fast.data.crops import CroppedConfig
from mvd_fast.data.datasets.video import VideoDataset
from mvd_fast.data.inputs import Inputs
from mvd_fast.data.sampling import SampleKey, random_frame

if TYPE_CHECKING:
    from nvidia.dali.pipeline import DataNode


class Config(CroppedConfig):
    """Videos, of which single frames are taken."""

    gives: ClassVar[frozenset[str]] = frozenset({"image"})

    kind: Literal["frame"] = "frame"


@dataclass(frozen=True)
class FrameDataset(VideoDataset):
    """One frame per video and epoch, uniform over the whole video."""

    output: ClassVar[str] = "image"

    data: Config

    def frames(self, facts: media.VideoInfo, key: SampleKey) -> np.ndarray:
        return random_frame(key, facts.frames)

    def graph(self, inputs: Inputs, device: str) -> DataNode:
        from mvd_fast.data import graph

        return graph.cropped(graph.decoded_video(inputs, device)[0], inputs, self.data, self.request.image_size, "CHW")


build = FrameDataset

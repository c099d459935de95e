"""Single frames of videos, as images: an image teacher's input where there is no image dataset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from nvidia.dali.pipeline import DataNode

from mvd_fast.config import RunConfig
from mvd_fast.data import crops, media
from mvd_fast.data.kinds import Inputs
from mvd_fast.data.kinds.video import VideoKind, decoded_video
from mvd_fast.data.sampling import SampleKey, random_frame


@dataclass(frozen=True)
class FrameKind(VideoKind):
    """One frame per video and epoch, uniform over the whole video."""

    output: str = "image"

    def frames(self, facts: media.VideoInfo, key: SampleKey) -> np.ndarray:
        return random_frame(key, facts.frames)

    def graph(self, inputs: Inputs, device: str) -> DataNode:
        pixels = decoded_video(inputs, device)[0]  # HWC
        return self.crop.graph(pixels, inputs, layout="CHW")


def build(config: RunConfig, on_gpu: bool) -> FrameKind:
    return FrameKind(
        num_frames=1,
        sampling_rate=1,
        centered=False,
        crop=crops.from_config(config),
        dali_codecs=media.DALI_GPU_CODECS if on_gpu else media.DALI_CPU_CODECS,
    )

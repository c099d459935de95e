"""Clips of videos: VideoMAE's and MVD's pre-training input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import DataNode

from mvd_fast.config import RunConfig
from mvd_fast.data import crops, media
from mvd_fast.data.kinds import Inputs
from mvd_fast.data.sampling import Box, SampleKey, center_clip, random_clip


@dataclass(frozen=True)
class VideoKind:
    """One clip of `num_frames` frames per video and epoch."""

    num_frames: int
    sampling_rate: int
    centered: bool
    crop: crops.Crop
    dali_codecs: frozenset[str]
    output: str = "video"
    extensions: tuple[str, ...] = media.VIDEO_EXTENSIONS

    def check(self, path: str) -> media.VideoInfo:
        return media.probe_video(path)

    def frames(self, facts: media.VideoInfo, key: SampleKey) -> np.ndarray:
        if self.centered:
            return center_clip(facts.frames, self.num_frames, self.sampling_rate)
        return random_clip(key, facts.frames, self.num_frames, self.sampling_rate)

    def load(self, path: str, facts: media.VideoInfo, key: SampleKey, by_dali: bool) -> Inputs:
        frames = self.frames(facts, key)
        box, flip = self.crop.box(key, facts.width, facts.height), self.crop.flipped(key)
        if by_dali and facts.suits_dali(self.dali_codecs):
            return Inputs.of_encoded(*media.excerpt(path, frames, facts), box, flip)
        return self.of_pixels(media.decode_frames(path, frames, facts), box, flip)

    def load_views(self, path: str, facts: media.VideoInfo, number: int) -> list[Inputs]:
        """All that is shown of file `number` in a test, decoded here, not by DALI: what cannot be decoded is then known
        by name."""
        return [self.load(path, facts, SampleKey(0, 0, number), by_dali=False)]

    def of_pixels(self, frames: np.ndarray, box: Box, flip: bool) -> Inputs:
        """Of frames uint8 [T, H, W, 3] that were decoded here."""
        return Inputs.of_pixels(frames, box, flip)

    def graph(self, inputs: Inputs, device: str) -> DataNode:
        pixels = decoded_video(inputs, device)  # FHWC
        return self.crop.graph(pixels, inputs, layout="CFHW")


def decoded_video(inputs: Inputs, device: str) -> DataNode:
    """Frames from DALI's decoder where the sample is encoded, else those the source decoded; uint8 FHWC."""
    if inputs.is_encoded:
        pixels = fn.decoders.video(
            inputs.encoded,
            frames=inputs.frames,
            pad_mode="none",  # by default a frame past the end is memory that nobody wrote
            device="mixed" if device == "gpu" else "cpu",
            affine=False,
        )
    else:
        pixels = inputs.decoded.gpu() if device == "gpu" else inputs.decoded
    return pixels


def fields(config: RunConfig, on_gpu: bool) -> dict[str, Any]:
    """Those of VideoKind, of a run."""
    return {
        "num_frames": config.model.num_frames,
        "sampling_rate": config.data.sampling_rate,
        "centered": config.data.clip == "center",
        "crop": crops.from_config(config),
        "dali_codecs": media.DALI_GPU_CODECS if on_gpu else media.DALI_CPU_CODECS,
    }


def build(config: RunConfig, on_gpu: bool) -> VideoKind:
    return VideoKind(**fields(config, on_gpu))

"""Crop, resize, flip and normalise: the box is chosen in the source, the pixels are handled in the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from nvidia.dali import fn, types
from nvidia.dali.pipeline import DataNode

from mvd_fast.config import RunConfig
from mvd_fast.data import sampling
from mvd_fast.data.kinds import Inputs
from mvd_fast.data.sampling import Box, Purpose, SampleKey


@dataclass(frozen=True)
class Crop:
    """The crop of a run; `mode` is one of DataConfig.crop's."""

    mode: str
    size: int
    scales: tuple[float, ...]
    area: tuple[float, float]
    flip: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def box(self, key: SampleKey, width: int, height: int) -> Box:
        """Where this sample is cut out of a width x height frame."""
        draws = key.draws(Purpose.CROP)
        if self.mode == "multiscale":
            return sampling.multi_scale_box(draws, width, height, self.size, self.scales)
        if self.mode == "random_resized":
            return sampling.random_resized_box(draws, width, height, self.area)
        if self.mode == "whole":
            return Box(0, 0, height, width)
        return sampling.center_box(width, height)

    def flipped(self, key: SampleKey) -> bool:
        return key.draws(Purpose.FLIP).uniform() < self.flip

    def graph(self, pixels: DataNode, inputs: Inputs, layout: str) -> DataNode:
        """uint8 FHWC or HWC -> float32 in `layout` ("CFHW" or "CHW"), size x size, normalised.

        Antialiased like Pillow's resize, which the reference recipes use: bicubic for random_resized, else bilinear.
        """
        frames_first = len(layout) - 3
        pixels = fn.slice(
            pixels,
            start=inputs.box[0:2],
            shape=inputs.box[2:4],
            axes=(frames_first, frames_first + 1),
        )
        pixels = fn.resize(
            pixels,
            resize_x=self.size,
            resize_y=self.size,
            interp_type=types.INTERP_CUBIC if self.mode == "random_resized" else types.INTERP_LINEAR,
            antialias=True,
        )
        return self.normalised(pixels, inputs, layout)

    def normalised(self, pixels: DataNode, inputs: Inputs, layout: str) -> DataNode:
        """uint8 FHWC or HWC of the final size -> float32 in `layout`, flipped where the sample is, normalised."""
        return fn.crop_mirror_normalize(
            pixels,
            dtype=types.FLOAT,
            output_layout=layout,
            mirror=inputs.flip,
            mean=[255 * value for value in self.mean],
            std=[255 * value for value in self.std],
        )


def from_config(config: RunConfig) -> Crop:
    data = config.data
    return Crop(
        mode=data.crop,
        size=config.model.image_size,
        scales=data.scales,
        area=data.area,
        flip=data.flip,
        mean=data.mean,
        std=data.std,
    )

"""Images: class folders (the ImageNet layout) or lists of JPEG, PNG, ... files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import DataNode

from mvd_fast.config import RunConfig
from mvd_fast.data import crops, images
from mvd_fast.data.containers import read_bytes
from mvd_fast.data.kinds import Inputs
from mvd_fast.data.sampling import SampleKey


@dataclass(frozen=True)
class ImageKind:
    """One crop per image and epoch, decoded by DALI where it shows the same pixels as Pillow, else by Pillow."""

    crop: crops.Crop
    output: str = "image"
    extensions: tuple[str, ...] = images.IMAGE_EXTENSIONS

    def check(self, path: str) -> images.ImageInfo:
        return images.probe_image(read_bytes(path))

    def load(self, path: str, facts: images.ImageInfo, key: SampleKey, by_dali: bool) -> Inputs:
        data = read_bytes(path)
        box, flip = self.crop.box(key, facts.width, facts.height), self.crop.flipped(key)
        if by_dali and facts.is_plain:
            return Inputs.of_encoded(data, np.zeros(1, dtype=np.int32), box, flip)
        return Inputs.of_pixels(images.decode_image(data)[None], box, flip)

    def graph(self, inputs: Inputs, device: str) -> DataNode:
        pixels = decoded_image(inputs, device)  # HWC
        return self.crop.graph(pixels, inputs, layout="CHW")


def decoded_image(inputs: Inputs, device: str) -> DataNode:
    """The image from DALI's decoder where the sample is encoded, else what the source decoded; uint8 HWC.

    Orientation tags stay unused, as in the field's image folders: the box is in stored pixels.
    """
    if inputs.is_encoded:
        pixels = fn.decoders.image(
            inputs.encoded,
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
    else:
        pixels = inputs.decoded.gpu()[0] if device == "gpu" else inputs.decoded[0]
    return pixels


def build(config: RunConfig, on_gpu: bool) -> ImageKind:
    return ImageKind(crop=crops.from_config(config))

"""Images: class folders (the ImageNet layout) or lists of JPEG, PNG, ... files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from mvd_fast.data import images
from mvd_fast.data.containers import read_bytes
from mvd_fast.data.crops import CroppedConfig
from mvd_fast.data.datasets import Dataset
from mvd_fast.data.inputs import Inputs
from mvd_fast.data.sampling import SampleKey

if TYPE_CHECKING:
    from nvidia.dali.pipeline import DataNode


class Config(CroppedConfig):
    """Images."""

    gives: ClassVar[frozenset[str]] = frozenset({"image"})
    files: ClassVar[str] = "images"

    kind: Literal["image"] = "image"


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """One crop per image and epoch, decoded by DALI where it shows the same pixels as Pillow, else by Pillow."""

    output: ClassVar[str] = "image"
    extensions: ClassVar[tuple[str, ...]] = images.IMAGE_EXTENSIONS
    decoder: ClassVar[str] = "Pillow"

    def check(self, path: str) -> images.ImageInfo:
        return images.probe_image(read_bytes(path))

    def load(self, path: str, facts: images.ImageInfo, key: SampleKey, by_dali: bool) -> Inputs:
        data = read_bytes(path)
        box, flip = self.box(key, facts.width, facts.height), self.flipped(key)
        if by_dali and facts.is_plain:
            return Inputs.of_encoded(data, np.zeros(1, dtype=np.int32), box, flip)
        return Inputs.of_pixels(images.decode_image(data)[None], box, flip)

    def graph(self, inputs: Inputs, device: str) -> DataNode:
        from mvd_fast.data import graph

        return graph.cropped(graph.decoded_image(inputs, device), inputs, self.data, self.request.image_size, "CHW")

    def describe(self, facts: images.ImageInfo) -> str:
        return f"{facts.codec}, {super().describe(facts)}"

    def why_not_dali(self, facts: images.ImageInfo) -> str:
        return f"DALI would show other pixels of such a {facts.codec}"


build = ImageDataset

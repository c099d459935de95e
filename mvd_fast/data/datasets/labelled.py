"""Labelled clips of videos: what a classifier is fine-tuned on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, SerializeAsAny

from mvd_fast.config.kinds import OfKind
from mvd_fast.config.run import DataRequest
from mvd_fast.data import augment, media
from mvd_fast.data.augment import AugmentConfig
from mvd_fast.data.clips import Center, ClipKind, Random, Segments
from mvd_fast.data.datasets import video
from mvd_fast.data.datasets.video import VideoDataset
from mvd_fast.data.inputs import Inputs
from mvd_fast.data.labels import read_labelled, write_classes
from mvd_fast.data.lists import Entry
from mvd_fast.data.sampling import Box, SampleKey

if TYPE_CHECKING:
    from nvidia.dali.pipeline import DataNode


class Config(video.Config):
    """Videos with labels."""

    gives: ClassVar[frozenset[str]] = frozenset({"video", "labels"})

    kind: Literal["labelled"] = "labelled"
    clip: Annotated[SerializeAsAny[ClipKind], OfKind(classes=(Random, Center, Segments), default="random")] = Field(
        Random(), description="which frames of a video make a clip"
    )


@dataclass(frozen=True)
class LabelledDataset(VideoDataset):
    """One clip per video and epoch, in `augment.repeats` differently augmented copies.

    In the authors' order: RandAugment, crop and flip, normalisation, random erasing, and mixing of the batch.
    """

    data: Config
    entries: tuple[Entry, ...] = ()

    @property
    def recipe(self) -> AugmentConfig:
        return self.request.augment or AugmentConfig()

    def paths(self) -> list[str]:
        return [entry.path for entry in self.entries]

    def annotate(self, facts: media.VideoInfo, key: SampleKey) -> dict[str, Any] | None:
        """Where the task asks for labels: `label` int, `erasing` (box or None, seed), `mix` of a micro batch that
        begins with this sample."""
        if self.request.num_classes is None:
            return None
        size = self.request.image_size
        return {
            "label": self.entries[key.index].label,
            "erasing": augment.draw_erasing(key, self.recipe.random_erasing, size),
            "mix": augment.draw_mix(key, self.recipe, size),
        }

    def collate(self, notes: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """`label` int64 [B]: the class of each sample."""
        return {"label": np.array([note["label"] for note in notes], dtype=np.int64)}

    def load(self, path: str, facts: media.VideoInfo, key: SampleKey, by_dali: bool) -> Inputs:
        inputs = super().load(path, facts, key, by_dali)
        if self.recipe.rand_augment.layers:
            inputs = inputs._replace(operations=augment.draw_operations(key, self.recipe.rand_augment))
        return inputs

    def of_pixels(self, frames: np.ndarray, box: Box, flip: bool) -> Inputs:
        if not self.recipe.rand_augment.layers:
            return super().of_pixels(frames, box, flip)
        # RandAugment comes before the crop and may move things into it: the whole frames are handed on.
        whole = Box(0, 0, *frames.shape[1:3])
        return Inputs.of_pixels(frames, whole, flip)._replace(box=np.array(box, dtype=np.int32))

    def graph(self, inputs: Inputs, device: str) -> DataNode:
        from mvd_fast.data import graph

        pixels = graph.decoded_video(inputs, device)  # FHWC
        if layers := self.recipe.rand_augment.layers:
            pixels = graph.augmented(pixels, inputs.operations, layers, fill=255 * sum(self.data.mean) / 3)
        return graph.cropped(pixels, inputs, self.data, self.request.image_size, "CFHW")

    def finish(self, batch: dict[str, Any], notes: list[dict[str, Any]]) -> dict[str, Any]:
        """Adds `target` float32 [B, classes]; erases and mixes `video`, and mixes the targets alike."""
        import torch.nn.functional as F

        for clip, (box, seed) in zip(batch["video"], (note["erasing"] for note in notes), strict=True):
            if box is not None:
                augment.erase(clip, box, seed)
        target = F.one_hot(batch["label"], self.request.num_classes).float()
        video, target = augment.mixed(batch["video"], target, notes[0]["mix"])
        return {**batch, "video": video, "target": target}


def build(data: Config, request: DataRequest, on_gpu: bool) -> LabelledDataset:
    found = read_labelled(data.train, data.root, media.VIDEO_EXTENSIONS)
    if request.num_classes is not None:
        found.require_below(request.num_classes)
    write_classes(found)
    return LabelledDataset(data, request, on_gpu, found.classes, found.entries)

"""Labelled clips of videos: what a classifier is fine-tuned on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nvidia.dali.pipeline import DataNode

from mvd_fast.config import AugmentConfig, RunConfig
from mvd_fast.data import augment, media
from mvd_fast.data.kinds import Inputs
from mvd_fast.data.kinds.video import VideoKind, decoded_video, fields
from mvd_fast.data.labels import read_labelled, write_classes
from mvd_fast.data.lists import Entry
from mvd_fast.data.sampling import Box, SampleKey, random_segments


@dataclass(frozen=True)
class LabelledKind(VideoKind):
    """One clip per video and epoch, in `augment.repeats` differently augmented copies.

    In the authors' order: RandAugment, crop and flip, normalisation, random erasing, and mixing of the batch.
    """

    entries: tuple[Entry, ...] = ()
    classes: int = 0
    class_names: tuple[str, ...] = ()  # by label; empty where the list has numbers only
    recipe: AugmentConfig = field(default_factory=AugmentConfig)
    segments: bool = False

    def paths(self) -> list[str]:
        return [entry.path for entry in self.entries]

    def annotate(self, width: int, height: int, key: SampleKey) -> dict[str, Any]:
        """`label` int, `erasing` (box or None, seed), `mix` of a micro batch that begins with this sample."""
        return {
            "label": self.entries[key.index].label,
            "erasing": augment.draw_erasing(key, self.recipe.random_erasing, self.crop.size),
            "mix": augment.draw_mix(key, self.recipe, self.crop.size),
        }

    def collate(self, notes: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """`label` int64 [B]: the class of each sample."""
        return {"label": np.array([note["label"] for note in notes], dtype=np.int64)}

    def frames(self, facts: media.VideoInfo, key: SampleKey) -> np.ndarray:
        if self.segments:
            return random_segments(key, facts.frames, self.num_frames)
        return super().frames(facts, key)

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
        pixels = decoded_video(inputs, device)  # FHWC
        if self.recipe.rand_augment.layers:
            fill = 255 * sum(self.crop.mean) / 3
            layers = self.recipe.rand_augment.layers
            pixels = augment.apply_operations(pixels, inputs.operations, pixels.shape()[1:3], layers, fill)
        return self.crop.graph(pixels, inputs, layout="CFHW")

    def finish(self, batch: dict[str, Any], notes: list[dict[str, Any]]) -> dict[str, Any]:
        """Adds `target` float32 [B, classes]; erases and mixes `video`, and mixes the targets alike."""
        import torch.nn.functional as F

        for clip, (box, seed) in zip(batch["video"], (note["erasing"] for note in notes), strict=True):
            if box is not None:
                augment.erase(clip, box, seed)
        target = F.one_hot(batch["label"], self.classes).float()
        video, target = augment.mixed(batch["video"], target, notes[0]["mix"])
        return {**batch, "video": video, "target": target}


def build(config: RunConfig, on_gpu: bool) -> LabelledKind:
    classes = config.model.num_classes
    assert classes is not None, "checked when the config is loaded"
    found = read_labelled(config.data.train, config.data.root, media.VIDEO_EXTENSIONS)
    found.require_below(classes)
    write_classes(found)
    return LabelledKind(
        **fields(config, on_gpu),
        entries=found.entries,
        classes=classes,
        class_names=found.classes,
        recipe=config.augment,
        segments=config.data.clip == "segments",
    )

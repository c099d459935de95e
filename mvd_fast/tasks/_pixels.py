"""Masked pixel reconstruction: what the stage-1 tasks `mae` and `videomae` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mvd_fast.config.base import IMAGENET_MEAN, IMAGENET_STD, Strict
from mvd_fast.config.network import DecoderConfig, size_of_width
from mvd_fast.config.run import DataRequest, Masks, RunConfig
from mvd_fast.files import WEIGHTS
from mvd_fast.models.tokens import split_mask

from . import Batch, Flops, Network, Task

# Recipes that distil from a teacher of a size.
STUDENTS = {"b": "vitb_from_vitb", "l": "vitl", "h": "vith"}


class MaskConfig(Strict):
    """What the network does not see, and predicts."""

    ratio: float = Field(0.9, gt=0.0, lt=1.0, description="share of tokens masked; the same in every time slice")


class PixelConfig(RunConfig):
    """A network that learns the pixels of masked patches."""

    teaches: ClassVar[str]  # the target of a student that the trained network is used for

    decoder: DecoderConfig
    mask: MaskConfig = MaskConfig()
    normalize_pixels: bool = Field(True, description="normalise each target patch to zero mean, unit variance")

    @property
    def request(self) -> DataRequest:
        frames = getattr(self.model, "num_frames", 1)
        return DataRequest(self.needs, self.model.image_size, frames, Masks(self.model.grid, self.mask.ratio))

    def next_command(self, folder: str) -> str:
        if recipe := STUDENTS.get(size_of_width(self.model.embed_dim)):
            weights = f"targets.{self.teaches}.checkpoint={folder}/{WEIGHTS}"
            return f"mvd-fast train --config {recipe} --set {weights}"
        return f"mvd-fast probe {folder} --train LIST --test LIST"


class PixelTask(Task):
    """Mean squared error between predicted and true pixels of the masked patches, in float32.

    network: maps pixels and masks to predictions, and has the true pixels of a patch in `targets`. reads: the key of
    its input in a batch. With `normalize_pixels` each target patch has zero mean and unit variance. `mean`, `std`: the
    input's normalisation. masks: where the number of visible tokens is known, which saves a device synchronisation.
    """

    def __init__(
        self,
        network: nn.Module,
        reads: str,
        normalize_pixels: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        masks: Masks | None = None,
    ) -> None:
        super().__init__()
        self.network, self.reads, self.masks = network, reads, masks
        self.normalize_pixels, self.mean, self.std = normalize_pixels, tuple(mean), tuple(std)

    def loss(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        """batch: the network's input, float and normalised, and `mask` bool [B, N], True = masked."""
        x, mask = batch[self.reads], batch["mask"]
        visible = self.masks.num_visible if self.masks else None
        prediction = network(x, mask, visible)
        with torch.no_grad():
            _, masked = split_mask(mask, visible)
            target = self.network.targets(x, masked, self.normalize_pixels, self.mean, self.std)
        return {"loss": F.mse_loss(prediction.float(), target)}

    def flops(self) -> Flops:
        assert self.masks is not None, "of a run"
        return Flops({"forward": self.network.flops(self.masks.num_visible)})


def pixel_task(config: PixelConfig, network: nn.Module, reads: str) -> PixelTask:
    """The task of a run around its network."""
    return PixelTask(network, reads, config.normalize_pixels, config.data.mean, config.data.std, config.request.masks)

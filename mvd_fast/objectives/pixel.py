"""Masked pixel reconstruction: stage 1 of both teachers (MAE: He et al. 2022; VideoMAE: Tong et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd_fast.config import IMAGENET_MEAN, IMAGENET_STD, RunConfig
from mvd_fast.models import build_model
from mvd_fast.models.tokens import split_mask


class PixelObjective(nn.Module):
    """Mean squared error between predicted and true pixels of the masked patches, in float32.

    The model says what it reads (`input_key`) and what the pixels of a patch are (`targets`); with
    `normalize_pixels` each target patch has zero mean and unit variance. `mean`, `std`: the input's normalisation.
    """

    def __init__(
        self,
        model: nn.Module,
        normalize_pixels: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.model = model
        self.input_key: str = model.input_key
        self._targets = model.targets  # kept: the trainer wraps `model`
        self.normalize_pixels, self.mean, self.std = normalize_pixels, tuple(mean), tuple(std)
        self.num_visible: int | None = None  # set by build(): spares a device synchronisation per step

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: the model's input, float and normalised, and `mask` bool [B, N], True = masked -> {"loss": scalar}."""
        x, mask = batch[self.input_key], batch["mask"]
        prediction = self.model(x, mask, self.num_visible)
        with torch.no_grad():
            _, masked = split_mask(mask, self.num_visible)
            target = self._targets(x, masked, self.normalize_pixels, self.mean, self.std)
        return {"loss": F.mse_loss(prediction.float(), target)}

    def flops(self) -> float:
        """FLOP of one sample's training step, forward and backward."""
        assert self.num_visible is not None, "set by build()"
        return 3 * getattr(self.model, "module", self.model).training_flops(self.num_visible)


def build(config: RunConfig) -> PixelObjective:
    """The stage-1 network of the run, fresh."""
    model = build_model(config.model, config.teachers)
    objective = PixelObjective(model, config.objective.normalize_pixels, config.data.mean, config.data.std)
    objective.num_visible = config.num_visible
    return objective

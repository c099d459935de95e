"""Fine-tuning on labelled clips: cross-entropy with targets that may be mixed and smoothed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mvd_fast.config import RunConfig
from mvd_fast.interop.encoder import load_encoder
from mvd_fast.models import build_model

from .distillation import FORWARD_AND_BACKWARD


class ClassificationObjective(nn.Module):
    """Cross-entropy in float32; `label_smoothing` of each target is spread over all classes (Szegedy et al. 2016).

    `repeats`: rows of a batch for each clip, for `flops`.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0, repeats: int = 1) -> None:
        super().__init__()
        self.model, self.label_smoothing, self.repeats = model, label_smoothing, repeats

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: `video` float [B, 3, T, H, W] (normalised), `target` float [B, classes], rows with sum 1."""
        logits = self.model(batch["video"]).float()
        return {"loss": F.cross_entropy(logits, batch["target"], label_smoothing=self.label_smoothing)}

    def flops(self) -> float:
        """FLOP of one clip's training step, in all of its copies."""
        return FORWARD_AND_BACKWARD * self.repeats * getattr(self.model, "module", self.model).flops()


def build(config: RunConfig) -> ClassificationObjective:
    """The classifier of the run, its encoder from `model.init` where that is given."""
    model = build_model(config.model, config.teachers)
    if config.model.init:
        load_encoder(model, config.model.init)
    return ClassificationObjective(model, config.augment.label_smoothing, config.augment.repeats)

"""Multi-label action detection: every action of every box is its own yes or no (AVA)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mvd_fast.config import RunConfig
from mvd_fast.interop.encoder import load_encoder
from mvd_fast.models import build_model

from .distillation import FORWARD_AND_BACKWARD


class ActionObjective(nn.Module):
    """Binary cross-entropy of the logits, in float32, mean over a batch's boxes and all actions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: `video` float [B, 3, T, H, W] (normalised), `boxes` float [R, 4] and `box_clip` int64 [R] (see
        ActionDetector), `labels` float [R, classes], 0 or 1. Returns `loss`; 0 for a batch without boxes."""
        logits = self.model(batch["video"], batch["boxes"], batch["box_clip"]).float()
        total = F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="sum")
        return {"loss": total / max(1, logits.numel())}

    def flops(self) -> float:
        """FLOP of one clip's training step."""
        return FORWARD_AND_BACKWARD * getattr(self.model, "module", self.model).flops()


def build(config: RunConfig) -> ActionObjective:
    """The detector of the run, its encoder from `model.init` where that is given."""
    model = build_model(config.model, config.teachers)
    if config.model.init:
        load_encoder(model, config.model.init)
    return ActionObjective(model)

"""Multi-label action detection: every action of every box is its own yes or no (AVA)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from mvd_fast.models.detector import ActionDetector

from . import Batch, Flops, Network, Task
from ._finetuning import FineTuneConfig, initialised


class Config(FineTuneConfig):
    """A detector of what the people in given boxes do."""

    needs: ClassVar[frozenset[str]] = frozenset({"video", "boxes"})

    task: Literal["detect"] = "detect"

    def next_command(self, folder: str) -> str:
        return f"mvd-fast ava-evaluate {folder} --annotations CSV --label-map PBTXT --root FOLDER"


class Detect(Task):
    """Binary cross-entropy of the logits, in float32, mean over a batch's boxes and all actions."""

    def __init__(self, network: ActionDetector) -> None:
        super().__init__()
        self.network = network

    def loss(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        """batch: `video` float [B, 3, T, H, W] (normalised), `boxes` float [R, 4] and `box_clip` int64 [R] (see
        ActionDetector), `labels` float [R, classes], 0 or 1. Gives `loss`; 0 for a batch without boxes."""
        logits = network(batch["video"], batch["boxes"], batch["box_clip"]).float()
        total = F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="sum")
        return {"loss": total / max(1, logits.numel())}

    def flops(self) -> Flops:
        return Flops({"forward": self.network.flops()})


def build(config: Config) -> Detect:
    """The detector of the run, its encoder from `init` where that is given."""
    return Detect(initialised(ActionDetector(config.model, config.model.num_classes), config))

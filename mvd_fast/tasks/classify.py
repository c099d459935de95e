"""Fine-tuning on labelled clips: cross-entropy with targets that may be mixed and smoothed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mvd_fast.config.run import DataRequest
from mvd_fast.data.augment import AugmentConfig
from mvd_fast.evaluation.settings import EvaluationConfig
from mvd_fast.models import VideoClassifier

from . import Batch, Flops, Network, Task, Validate
from ._finetuning import FineTuneConfig, LabelledConfig, initialised


class ClassifierConfig(LabelledConfig):
    """A video classifier."""

    head_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout before the head")


class Config(FineTuneConfig):
    """A classifier of clips."""

    needs: ClassVar[frozenset[str]] = frozenset({"video", "labels"})

    task: Literal["classify"] = "classify"
    model: ClassifierConfig
    augment: AugmentConfig = AugmentConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def request(self) -> DataRequest:
        return replace(super().request, augment=self.augment, rows=self.augment.repeats)

    def faults(self) -> Iterator[str]:
        if self.model.num_classes == 1:
            yield "model.num_classes: got 1; a classifier needs at least 2"
        if self.augment.mixes and self.augment.mix_probability and (self.batch.micro_batch_size or self.batch.size) < 2:
            yield (
                "augment.mixup: a single clip has no other to be mixed with; raise batch.micro_batch_size, or switch "
                "mixing off"
            )
        if (
            self.evaluation.list
            and self.evaluation.sampling == "dense"
            and getattr(self.data, "sampling_rate", None) is None
        ):
            yield (
                "evaluation.sampling: dense takes every n-th frame, and data.clip segments has no sampling_rate: "
                "set evaluation.sampling to uniform"
            )

    def missing_files(self) -> Iterator[str]:
        yield from super().missing_files()
        if self.evaluation.list and not Path(self.evaluation.list).exists():
            yield (
                f"evaluation.list: {self.evaluation.list} does not exist; name a list of `path label` lines to "
                "validate on, or leave it empty"
            )

    def next_command(self, folder: str) -> str:
        return f"mvd-fast evaluate {folder} --data LIST --out FOLDER"


class Classify(Task):
    """Cross-entropy in float32; `label_smoothing` of each target is spread over all classes (Szegedy et al. 2016).

    `repeats`: rows of a batch for each clip, for `flops`.
    """

    def __init__(self, network: VideoClassifier, label_smoothing: float = 0.0, repeats: int = 1) -> None:
        super().__init__()
        self.network, self.label_smoothing, self.repeats = network, label_smoothing, repeats

    def loss(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        """batch: `video` float [B, 3, T, H, W] (normalised), `target` float [B, classes], rows with sum 1."""
        logits = network(batch["video"]).float()
        return {"loss": F.cross_entropy(logits, batch["target"], label_smoothing=self.label_smoothing)}

    def validation(self, config: Config, device: torch.device) -> Validate | None:
        if not config.evaluation.list:
            return None
        from mvd_fast.evaluation.views import Validation  # with DALI

        return Validation(config, device).run

    def flops(self) -> Flops:
        return Flops({"forward": self.repeats * self.network.flops()})


def build(config: Config) -> Classify:
    """The classifier of the run, its encoder from `init` where that is given."""
    network = initialised(VideoClassifier(config.model, config.model.num_classes, config.model.head_dropout), config)
    return Classify(network, config.augment.label_smoothing, config.augment.repeats)

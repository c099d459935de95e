"""What the tasks share that fine-tune a pre-trained encoder: `classify` and `detect`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, PositiveInt
from torch import nn

from mvd_fast.config.network import ClipConfig
from mvd_fast.config.run import DataRequest, FineTuneOptimConfig, RunConfig
from mvd_fast.convert.encoder import load_encoder


class LabelledConfig(ClipConfig):
    """A ViT over the tubes of a clip with a head for classes."""

    num_classes: PositiveInt = Field(description="of the head; AVA: the last action")


class FineTuneConfig(RunConfig):
    """A network that learns labels, from a pre-trained encoder."""

    stage: ClassVar[str] = "finetune"

    model: LabelledConfig
    optim: FineTuneOptimConfig
    init: str = Field("", description="checkpoint whose encoder the network starts from; empty: from scratch")

    @property
    def request(self) -> DataRequest:
        model = self.model
        return DataRequest(self.needs, model.image_size, model.num_frames, num_classes=model.num_classes)

    def as_written(self) -> Self:
        return self.replaced(init="")

    def missing_files(self) -> Iterator[str]:
        if self.init and not Path(self.init).exists():
            yield (
                f"init: {self.init} does not exist; name a pre-trained run or checkpoint, or leave it empty to train "
                "from scratch"
            )

    @property
    def start(self) -> str:
        return f"with the encoder of {self.init}" if self.init else super().start


def initialised(network: nn.Module, config: FineTuneConfig) -> nn.Module:
    """The network with the encoder of `init`, where that is given."""
    if config.init:
        load_encoder(network, config.init)
    return network

"""What is trained. One file per task; `task` in a config names the file.

A task is a module with `class Config(RunConfig)`, its settings, and `build(config)`, which gives a `Task`: the network
that is trained, what it needs beside, and the loss of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mvd_fast.config.kinds import TASKS, kind_module, with_plugins
from mvd_fast.config.run import RunConfig

__path__ = with_plugins(__path__, __name__)

# Backward costs twice the forward: one product for the input's gradient, one for the weight's.
FORWARD_AND_BACKWARD = 3

Batch = dict[str, Tensor]
Network = Callable[..., Any]  # the task's network, or the engine that wraps it
# A network, the module that it uses, and what takes a line on the progress -> `top1` and other facts (collective).
Validate = Callable[[Callable[[Tensor], Tensor], nn.Module, Callable[[str], None]], dict[str, Any]]


@dataclass(frozen=True)
class Flops:
    """FLOP of one clip by part: of frozen networks, and of the forward pass of what is trained."""

    trained: dict[str, float]
    frozen: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> float:
        """Of one clip's training step."""
        return sum(self.frozen.values()) + FORWARD_AND_BACKWARD * sum(self.trained.values())


class Task(nn.Module):
    """A network that is trained and the loss that it is trained by.

    `network` is all that learns, and all that a training engine wraps; what a task holds beside it is frozen.
    """

    network: nn.Module

    def loss(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        """Scalars of one micro batch: `loss`, which is minimised, and parts of it, `loss_...`, which are logged."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a network that no engine wraps."""
        return self.loss(self.network, batch)

    def flops(self) -> Flops:
        """FLOP of one clip."""
        raise NotImplementedError

    def frozen(self) -> dict[str, nn.Module]:
        """Networks beside the one that is trained, by title."""
        return {}

    def batches(self, batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
        """The loader's batches, as `loss` is given them."""
        return batches

    def validation(self, config: RunConfig, device: torch.device) -> Validate | None:
        """What a run calls after each epoch; None: nothing."""
        return None

    def train(self, mode: bool = True) -> Task:
        """Of the network alone: frozen networks stay in eval mode."""
        self.training = mode
        self.network.train(mode)
        return self


def build_task(config: RunConfig) -> Task:
    """The task of a run: its network fresh, or as `init` says, and frozen networks loaded."""
    return kind_module(TASKS, config.task).build(config)

"""What is minimised. One file per objective; `objective.kind` in a config names the file whose `build` makes it.

An objective is an `nn.Module` that maps a batch (dict of tensors) to a dict with `loss` and its named parts, all
scalars. Its `model` is the network that is trained: the trainer replaces it by the DeepSpeed engine that wraps it.
`flops()` counts one sample's training step.
"""

from __future__ import annotations

from importlib import import_module

from torch import Tensor, nn

from mvd_fast.config import RunConfig

from .distillation import DistillationObjective
from .pixel import PixelObjective

__all__ = ["Batch", "DistillationObjective", "PixelObjective", "build_objective"]

Batch = dict[str, Tensor]


def build_objective(config: RunConfig) -> nn.Module:
    """The objective of a run with its network (fresh) and its teachers (loaded, frozen)."""
    return import_module(f"mvd_fast.objectives.{config.objective.kind}").build(config)

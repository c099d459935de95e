"""What a process makes of a run alone, before DeepSpeed starts: most of what a user may have got wrong shows here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mvd_fast.config.checks import check_batch
from mvd_fast.config.run import RunConfig
from mvd_fast.data import build_loader
from mvd_fast.data.loader import Loader
from mvd_fast.target_store.store import open_targets
from mvd_fast.tasks import Task, build_task

from . import launch


@dataclass
class Prepared:
    """A run on one rank, ready to be trained; its networks are on the CPU still."""

    config: RunConfig
    place: launch.Placement
    device: torch.device
    micro_batch_size: int
    grad_accum_steps: int
    loader: Loader
    task: Task

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.config.optim.epochs * self.steps_per_epoch

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of labelled data, by label; empty where nothing names them."""
        return self.loader.spec.dataset.class_names

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.task.network.parameters() if p.requires_grad)


def prepare(config: RunConfig, place: launch.Placement | None = None) -> Prepared:
    """Reads the lists and the teachers, and makes the network; place: this process's by default.

    Raises UserError sentences for batches that do not divide, for unusable lists, labels and weights.
    """
    place = place or launch.placement()
    micro, accumulation = check_batch(config, place.world_size)
    device = launch.device()
    targets = open_targets(config, device) if config.stored_widths() else None
    loader = build_loader(config, place.rank, place.world_size, device, micro, accumulation, targets)
    torch.manual_seed(config.seed)
    return Prepared(config, place, device, micro, accumulation, loader, build_task(config))

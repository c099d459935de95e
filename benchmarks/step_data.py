"""Clips from files beside the step's benchmark: what loading costs while the step is computed, and alone."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from mvd_fast.config.load import load_config
from mvd_fast.config.run import RunConfig
from mvd_fast.data import build_loader
from mvd_fast.data.pipeline import PIPELINE_DEPTH
from mvd_fast.target_store.build import Builder
from mvd_fast.target_store.store import open_targets
from mvd_fast.tasks.distill import Distill

PULLS = 16


class Feed:
    """The loader of one side, working ahead as in training. Its batches are thrown away: all sides compute the same
    batch in every step, so that losses can be compared."""

    def __init__(self, config: RunConfig, samples: int, device: torch.device) -> None:
        targets = open_targets(config, device) if config.stored_widths() else None
        self.loader = build_loader(config, 0, 1, device, samples, 1, targets)
        self.batches = self.loader.batches(0)
        self.ahead = config.data.prefetch + PIPELINE_DEPTH + 1

    def wait(self) -> None:
        """For the next batch."""
        next(self.batches)

    def load_seconds(self) -> float:
        """Of a batch while nothing is computed, once what was prepared before has been used up."""
        for _ in range(self.ahead):
            self.wait()
        start = time.perf_counter()
        for _ in range(PULLS):
            self.wait()
        return (time.perf_counter() - start) / PULLS

    def read_seconds(self) -> float | None:
        """Of the stored targets of a batch, which are part of loading it: median; None without a store."""
        if not self.loader.read_targets:
            return None
        spans = []
        for step in range(PULLS):
            start = time.perf_counter()
            self.loader.read_targets(self.loader.schedule.keys(step))
            spans.append(time.perf_counter() - start)
        return statistics.median(spans)


def store_targets(
    file: str, overrides: list[str], task: Distill, folder: Path, clips: int, device: torch.device
) -> RunConfig:
    """The config with a store in `folder`, made as `mvd-fast teachers cache` makes it, by the task's teachers."""
    places = {"teachers.cache.path": folder / "targets"}
    for name, teacher in (("image", task.targets["image"].teacher), ("video", task.targets["video"])):
        places[f"targets.{name}.checkpoint"] = folder / f"{name}.safetensors"
        save_file(teacher.state_dict(), folder / f"{name}.safetensors")
    config = load_config(file, [*overrides, *(f"{key}={json.dumps(str(value))}" for key, value in places.items())])
    Builder(config, device, clips, None, 0, 1).run()
    return config

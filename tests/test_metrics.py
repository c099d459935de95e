"""Logs, phase times and progress."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import nn

from mvd_fast.training.metrics import PhaseTimer, RunLog, measure_peak

CPU = torch.device("cpu")


def updates(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_log_tells_no_update_twice(tmp_path: Path) -> None:
    first = RunLog(tmp_path, 0, tensorboard=True)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": 1.0 / step, "phase_seconds": {"data": 0.1}})
    first.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a line
    second = RunLog(tmp_path, 2, tensorboard=False)
    assert updates(tmp_path) == [1, 2]
    second.write({"step": 3, "loss": 0.5})
    second.close()
    assert updates(tmp_path) == [1, 2, 3]
    assert list((tmp_path / "tensorboard").iterdir())


def test_phases_are_timed_and_forgotten() -> None:
    timer = PhaseTimer(CPU)

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return x

    module = Slow()
    timer.watch("forward", module)
    for _ in range(2):
        module(torch.zeros(1))
    with timer.phase("data"):
        time.sleep(0.01)
    seconds = timer.collect()
    assert 0.04 <= seconds["forward"] < 0.4 and 0.01 <= seconds["data"] < 0.2
    assert timer.collect() == {}


def test_peak_is_a_plausible_rate() -> None:
    assert 1e8 < measure_peak(CPU, torch.float32, size=256) < 1e14

"""`--profile`: a trace of a few steps in the run folder."""

from __future__ import annotations

import gzip
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny_runs
import torch

from mvd_fast.train import main
from mvd_fast.training import launch, trainer
from mvd_fast.training.profiler import STEPS, WARM_UP, Profiler

CPU = torch.device("cpu")


def events(folder: Path) -> list[dict]:
    with gzip.open(folder / "profile" / "trace-rank0.json.gz") as file:
        return json.load(file)["traceEvents"]


@pytest.mark.parametrize(("left", "first"), [(2, 0), (STEPS + 1, 1), (100, WARM_UP)])
def test_a_few_steps_are_recorded_after_a_warm_up(tmp_path: Path, left: int, first: int) -> None:
    said: list[str] = []
    with Profiler(tmp_path, CPU, left, True, said.append) as profiler:
        for step in range(left):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(2) @ torch.ones(2)
            profiler.step()
    recorded = {event["name"] for event in events(tmp_path) if event.get("name", "").startswith("step ")}
    last = min(first + STEPS, left)
    assert recorded == {f"step {step}" for step in range(first, last)}
    assert said == [f"profile of {last - first} steps: {tmp_path / 'profile'}"]


def test_what_is_not_asked_for_is_not_recorded(tmp_path: Path) -> None:
    with Profiler(tmp_path, CPU, 10, False, print) as profiler:
        for _ in range(10):
            profiler.step()
    assert not list(tmp_path.iterdir())


def test_a_runs_profile_is_in_its_folder(tmp_path: Path) -> None:
    inputs = tiny_runs.write_inputs(tmp_path)
    optim = {"base_lr": 0.03, "epochs": 1, "warmup_epochs": 0}
    content = tiny_runs.config(inputs, tmp_path / "run", optim=optim)
    status, output = tiny_runs.run(tiny_runs.write_config(tmp_path / "c.json", content), "--profile")
    assert status == 0, output
    assert f"profile of {STEPS} steps: {tmp_path / 'run' / 'profile'}" in output
    names = [event.get("name") for event in events(tmp_path / "run") if event.get("cat") == "user_annotation"]
    assert names.count("backward") == names.count("optimizer") == STEPS


@pytest.mark.parametrize("options", [[], ["--anomaly"]])
def test_anomaly_detection_lasts_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list) -> None:
    inputs, seen = tiny_runs.write_inputs(tmp_path, clips=8), []

    class Run:
        def __init__(self, *arguments: object) -> None: ...

        def fit(self) -> bool:
            seen.append(torch.is_anomaly_enabled())
            return True

    monkeypatch.setattr(launch, "init_process_group", nullcontext)
    monkeypatch.setattr(trainer, "Trainer", Run)
    config_file = tiny_runs.write_config(tmp_path / "c.json", tiny_runs.config(inputs, tmp_path / "run"))
    assert main(["--config", str(config_file), *options]) == 0
    assert seen == [bool(options)] and not torch.is_anomaly_enabled()

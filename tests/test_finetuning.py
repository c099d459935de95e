"""Whole fine-tuning runs and `mvd-fast evaluate`, started as a user starts them."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from PIL import Image
from safetensors.torch import load_file
from test_probe import save_run, student

from mvd_fast import cli
from mvd_fast.finetune import main as finetune
from mvd_fast.tools.demo.digits import DigitSet, write_digit_set

CLASSES = 80


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_digit_set(folder, DigitSet(train=24, test=9, seed=0))
    save_run(folder / "student", student(), "distill")
    return folder


def config(inputs: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Three epochs of three steps of eight clips with everything on; one file of the validation list is broken."""
    (inputs / "broken.webm").write_bytes(b"no video")
    lines = (inputs / "test.txt").read_text()
    (inputs / "val.txt").write_text(lines + "broken.webm 3\n")
    base = {
        "name": "tiny",
        "run_dir": str(run_dir),
        "precision": "fp32",
        "task": "classify",
        "model": {**tiny_runs.ENCODER, **tiny_runs.CLIP, "num_classes": CLASSES, "drop_path": 0.2, "head_dropout": 0.1},
        "init": str(inputs / "student"),
        "data": {"kind": "labelled", "train": str(inputs / "train.txt"), "threads": 1}
        | {"clip": {"kind": "random", "sampling_rate": 1}, "crop": {"kind": "random_resized", "area": [0.5, 1.0]}},
        "augment": {"repeats": 2, "rand_augment": {"layers": 1}, "random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}
        | {"label_smoothing": 0.1},
        "evaluation": {"list": str(inputs / "val.txt"), "clips": 2, "crops": 3, "batch": 5},
        "batch": {"size": 8, "grad_accum_steps": 2},
        "optim": {"base_lr": 0.1, "epochs": 3, "warmup_epochs": 1, "layer_decay": 0.75, "ema": 0.8},
        "log": {"every": 2, "tensorboard": False},
        "checkpoint": {"every_steps": 2},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    return {**base, **changes}


def start(config_file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mvd_fast.finetune", "--config", str(config_file)]
    return subprocess.Popen(
        command, env=tiny_runs.environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Of the log, without times."""
    timed = ("clips_per_second", "data_wait_share", "seconds", "phase_seconds", "model_flop_utilisation", "peak_flops")
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("finished")
    status, output = tiny_runs.finish(start(tiny_runs.write_config(run_dir / "c.json", config(inputs, run_dir))))
    assert status == 0, output
    assert output.count("validation top-1") == 3
    return run_dir


def test_a_run_validates_every_epoch_and_keeps_the_best(finished: Path) -> None:
    found = [record["validation"] for record in records(finished) if "validation" in record]
    assert [(record["epoch"], record["step"]) for record in found] == [(1, 3), (2, 6), (3, 9)]
    assert all(record["videos"] == 9 and record["left_out"] == 1 for record in found)
    best = json.loads((finished / "summary.json").read_text())["best"]
    assert best == max(found, key=lambda record: (record["top1"], -record["epoch"]))
    assert load_file(finished / "best.safetensors").keys() == load_file(finished / "model.safetensors").keys()
    # What is exported is the average, which lags behind the weights that training goes on with.
    newest = sorted((finished / "checkpoints").iterdir())[-1]
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(
        load_file(newest / "model.safetensors")[name], load_file(finished / "model.safetensors")[name]
    )


def test_killed_and_resumed_run_is_bit_equal(inputs: Path, finished: Path, tmp_path: Path) -> None:
    config_file = tiny_runs.write_config(tmp_path / "c.json", config(inputs, tmp_path))
    process = start(config_file)
    deadline = time.monotonic() + tiny_runs.TIMEOUT
    while not (tmp_path / "log.jsonl").exists() or '"step": 4,' not in (tmp_path / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    status, output = tiny_runs.finish(start(config_file))
    assert status == 0, output
    assert records(tmp_path) == records(finished)
    for file in ("model.safetensors", "best.safetensors"):
        ours, theirs = load_file(tmp_path / file), load_file(finished / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), file


def test_evaluate_command_counts_every_video_once_on_any_number_of_ranks(
    inputs: Path, finished: Path, tmp_path: Path
) -> None:
    """One rank in this process, two by torchrun with five videos each of nine and a broken one; the same files."""
    options = ["evaluate", str(finished / "best.safetensors"), "--data", str(inputs / "val.txt"), "--device", "cpu"]
    assert cli.main([*options, "--out", str(tmp_path / "made" / "one")]) == 1
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "mvd_fast.cli", *options, "--out", str(tmp_path / "two"), "--batch", "4"],
        env=tiny_runs.environment(), capture_output=True, text=True, timeout=tiny_runs.TIMEOUT,
    )  # fmt: skip
    assert "left out: " in done.stderr and "broken.webm" in done.stderr, done.stderr
    one, two = ([json.loads(line) for line in (tmp_path / n / "predictions.jsonl").open()] for n in ("made/one", "two"))
    assert [row["path"] for row in one] == [row["path"] for row in two]
    assert [Path(row["path"]).name for row in one] == [f"{number:05d}.webm" for number in range(9)]
    for left, right in zip(one, two, strict=True):
        assert left["classes"] == right["classes"] and len(left["classes"]) == 5
        assert left["probabilities"] == pytest.approx(right["probabilities"], rel=1e-5)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["videos"] == 9 and list(summary["left_out"]) == [str(inputs / "broken.webm")]
    assert summary["views"] == {"sampling": "dense", "clips": 2, "crops": 3}  # the run's
    assert summary["preprocessing"]["sampling_rate"] == 1
    assert summary["top1"] == pytest.approx(sum(row["label"] == row["classes"][0] for row in one) / 9)
    assert summary["top5"] == pytest.approx(sum(row["label"] in row["classes"] for row in one) / 9)
    table = list(csv.DictReader((tmp_path / "two" / "per_class.csv").open()))
    assert len(table) == CLASSES and sum(int(row["videos"]) for row in table) == 9
    with Image.open(tmp_path / "two" / "confusion.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 400


def test_a_bf16_run_from_scratch_trains(inputs: Path, tmp_path: Path) -> None:
    content = config(inputs, tmp_path, precision="bf16", augment={}, evaluation={})
    content["init"] = ""
    content["optim"] = {"base_lr": 0.03, "epochs": 4, "warmup_epochs": 0, "layer_decay": 1.0, "ema": 0.5}
    content["deepspeed"] = {"zero_optimization": {"stage": 1}}
    status, output = tiny_runs.finish(start(tiny_runs.write_config(tmp_path / "c.json", content)))
    assert status == 0, output
    losses = [record["loss"] for record in records(tmp_path)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model": {**tiny_runs.ENCODER, **tiny_runs.CLIP, "num_classes": 10}},
            "but model.num_classes is 10: labels go from 0 to 9",
        ),
        ({"init": "README.md"}, "README.md cannot be read"),
    ],
)
def test_what_a_run_cannot_start_with(inputs: Path, tmp_path: Path, changes: dict, sentence: str) -> None:
    content = config(inputs, tmp_path, **changes)
    done = subprocess.run(
        [sys.executable, "mvd_fast/finetune.py", "--config", str(tiny_runs.write_config(tmp_path / "c.json", content))],
        env=tiny_runs.environment(), cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_pretraining_configs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(["--config", "vitl"]) == 2
    assert (
        "has task 'distill', which pre-trains and has no classes; start it with mvd_fast/train.py"
        in capsys.readouterr().err
    )


def test_a_student_is_not_evaluated(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(inputs / "student"), "--data", str(inputs / "test.txt")]) == 2
    assert "no classifier; fine-tune it first" in capsys.readouterr().err

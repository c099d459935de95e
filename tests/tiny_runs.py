"""Tiny training runs: a few moving-digit clips, random teachers, and the command line started as a user would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mvd_fast.convert.storage import RUN
from mvd_fast.models import ImageTeacher, VideoTeacher

ENCODER = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"dim": 32, "depth": 1, "num_heads": 2}
CLIP = {"num_frames": 8, "tubelet_size": 2}
TIMEOUT = 500  # seconds; a run takes about ten on quiet cores


def two_decoders(image_target_dim: int = 32, video_target_dim: int = 32, **sizes: int) -> dict[str, int]:
    """Those of MVD's student, by the names of its constructor's arguments."""
    sizes = {**DECODER, **sizes}
    named = {"decoder_dim": sizes["dim"], "decoder_depth": sizes["depth"], "decoder_heads": sizes["num_heads"]}
    return {**named, "image_target_dim": image_target_dim, "video_target_dim": video_target_dim}


def said(task: str, model: dict[str, Any], **data: Any) -> dict[str, str]:
    """Metadata of a run's weights."""
    return {RUN: json.dumps({"task": task, "model": model, "data": data})}


def write_inputs(folder: Path, clips: int = 40) -> Path:
    """Clips, their list and two random teachers; returns the folder."""
    from mvd_fast.tools.demo.digits import DigitSet, write_digit_set  # with PyAV, which tests on a GPU do without

    write_digit_set(folder, DigitSet(train=clips, test=8, seed=0))
    torch.manual_seed(1)
    video = {**ENCODER, **CLIP}
    save_file(ImageTeacher(**ENCODER).state_dict(), folder / "image.safetensors")
    save_file(VideoTeacher(**video).state_dict(), folder / "video.safetensors")
    return folder


def config(inputs: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A distillation run of 2 epochs of 5 steps of 8 clips, every loss logged; `changes` replace whole sections."""
    targets = [
        {"kind": kind, "checkpoint": str(inputs / f"{name}.safetensors"), **ENCODER}
        for name, kind in (("image", "mae"), ("video", "videomae"))
    ]
    base = {
        "task": "distill",
        "name": "tiny",
        "run_dir": str(run_dir),
        "precision": "fp32",
        "model": {**ENCODER, **CLIP, "drop_path": 0.0},
        "decoder": DECODER,
        "targets": targets,
        "mask": {"ratio": 0.6},
        "data": {
            "kind": "video",
            "train": str(inputs / "train.txt"),
            "clip": {"kind": "random", "sampling_rate": 1},
            "threads": 1,
        },
        "batch": {"size": 8},
        "optim": {"base_lr": 0.03, "epochs": 2, "warmup_epochs": 1},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every_steps": 2},
        # Threshold 0: stage 3 partitions even these small tensors.
        "deepspeed": {"zero_optimization": {"stage": 0, "stage3_param_persistence_threshold": 0}},
    }
    return {**base, **changes}


def write_config(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def environment() -> dict[str, str]:
    """One thread per process: the same order of additions in every run, and no fight over the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def start(config_file: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mvd_fast.train", "--config", str(config_file), *arguments]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start_ranks(command: list[str], count: int = 2) -> list[subprocess.Popen[str]]:
    """The same command as ranks of one group, without a launcher, which would end the others when one ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            command,
            env={**environment(), **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and everything printed."""
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, (out or "") + (err or "")


def run(config_file: Path, *arguments: str) -> tuple[int, str]:
    return finish(start(config_file, *arguments))


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step."""
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    found = {record["step"]: record["loss"] for record in records}
    assert len(found) == len(records), "a step was logged twice"
    return found

"""A new task, target, dataset and operator are one new file each, in a folder of MVD_PLUGINS: nothing is edited."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

OPERATOR = '''
"""x * sigmoid(gain * x), as an operator with a reference alone."""

import torch
from torch import Tensor

from mvd_kernels._operator import Operator


def _outputs(x: Tensor, gain: float) -> Tensor:
    return x.new_empty(x.shape)


def _reference(x, gain) -> Tensor:
    return x * torch.sigmoid(gain * x)


gated = Operator("gated", _outputs, reference=_reference)
'''

TARGET = '''
"""The mean colour of each tube, to the power of an exponent: no network, no weights."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from mvd_fast.targets import TargetConfig


class Config(TargetConfig):
    """The mean colour of each tube."""

    kind: Literal["colour"] = "colour"
    exponent: float = Field(1.0, gt=0.0, description="of the colour's distance from grey")

    @property
    def target_dim(self) -> int:
        return 3


class Colour(nn.Module):
    def __init__(self, config, clip):
        super().__init__()
        self.exponent, self.tube = config.exponent, (clip.tubelet_size, clip.patch_size, clip.patch_size)

    def forward(self, video):
        mean = torch.nn.functional.avg_pool3d(video.float(), self.tube).flatten(2).transpose(1, 2)
        return (mean.sign() * mean.abs() ** self.exponent).to(video.dtype)

    def flops(self):
        return 0.0


def build(config, clip):
    return Colour(config, clip)
'''

DATASET = '''
"""Clips of one colour each, which no file holds: a file's name is its colour."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from mvd_fast.data.crops import CroppedConfig
from mvd_fast.data.datasets import Dataset, Inputs


class Config(CroppedConfig):
    """Clips of one colour each."""

    gives: ClassVar[frozenset[str]] = frozenset({"video"})

    kind: Literal["plain"] = "plain"
    side: int = Field(40, ge=8, description="of a frame, pixels")


@dataclass(frozen=True)
class Plain(Dataset):
    extensions: ClassVar[tuple[str, ...]] = (".colour",)

    def check(self, path):
        return SimpleNamespace(width=self.data.side, height=self.data.side)

    def load(self, path, facts, key, by_dali):
        frames = np.full((self.request.num_frames, self.data.side, self.data.side, 3), key.index * 9 % 256, np.uint8)
        return Inputs.of_pixels(frames, self.box(key, self.data.side, self.data.side), self.flipped(key))


def build(data, request, on_gpu):
    return Plain(data, request, on_gpu)
'''

TASK = '''
"""Learns how bright a clip is, through a gate."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from mvd_fast.config.network import ClipConfig
from mvd_fast.config.run import RunConfig
from mvd_fast.models.layers import ClipEncoder
from mvd_fast.models.positions import sincos_3d
from mvd_fast.tasks import Flops, Task
from mvd_kernels.gated import gated


class Config(RunConfig):
    """A network that learns how bright a clip is."""

    needs: ClassVar[frozenset[str]] = frozenset({"video"})

    task: Literal["brightness"] = "brightness"
    model: ClipConfig
    gain: float = Field(1.0, gt=0.0, description="of the gate")


class Network(ClipEncoder):
    def __init__(self, config, gain):
        super().__init__(config)
        self.gain, self.head = gain, nn.Linear(config.embed_dim, 1)
        self.register_buffer("positions", sincos_3d(config.embed_dim, *self.grid), persistent=False)

    def forward(self, video):
        return self.head(gated(self.encode_tubes(video, self.positions).sum().mean(1), self.gain))[:, 0]


class Brightness(Task):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def loss(self, network, batch):
        return {"loss": F.mse_loss(network(batch["video"]).float(), batch["video"].float().mean((1, 2, 3, 4)))}

    def flops(self):
        return Flops({"forward": self.network.encoder_flops(self.network.config.num_tokens)})


def build(config):
    return Brightness(Network(config.model, config.gain))
'''

FILES = {
    "kernels/gated.py": OPERATOR,
    "targets/colour.py": TARGET,
    "datasets/plain.py": DATASET,
    "tasks/brightness.py": TASK,
}


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the four files, and a list for the dataset."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.lstrip())
    clips = folder / "clips"
    clips.mkdir()
    for number in range(16):
        (clips / f"{number}.colour").touch()
    (clips / "train.txt").write_text("".join(f"{number}.colour 0\n" for number in range(16)))
    return folder


def config(plugins: Path, run_dir: Path, task: str) -> Path:
    content: dict[str, Any] = tiny_runs.config(plugins, run_dir, task=task)
    for name in ("targets", "mask", "decoder"):
        del content[name]
    content["data"] = {"kind": "plain", "train": str(plugins / "clips/train.txt"), "crop": "whole", "side": 36}
    if task == "brightness":
        content["gain"] = 2.0
    else:
        colour = {"kind": "colour", "exponent": 0.5, "decoder": {"dim": 16, "depth": 1, "num_heads": 1}}
        content |= {"decoder": tiny_runs.DECODER, "mask": {"ratio": 0.5}}
        content["targets"] = [colour, {**colour, "name": "wide", "normalize": True, "decoder": tiny_runs.DECODER}]
    return tiny_runs.write_config(run_dir.with_suffix(".json"), content)


SCRIPT = """
import json, sys
from mvd_fast import cli
for command in json.loads(sys.argv[1]):
    if status := cli.main(command):
        sys.exit(status)
"""


def run(plugins: Path, *commands: list[str]) -> str:
    """`mvd-fast` with each of the commands, all in one process; what they print."""
    environment = {**tiny_runs.environment(), "MVD_PLUGINS": str(plugins)}
    words = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=tiny_runs.TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("task", ["brightness", "distill"])
def test_new_kinds_train(plugins: Path, tmp_path: Path, task: str) -> None:
    file = config(plugins, tmp_path / "run", task)
    run(plugins, ["train", "--config", str(file)])
    losses = tiny_runs.losses(tmp_path / "run")
    assert len(losses) == 4 and losses[4] < losses[1]
    first = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    parts = {"loss_colour", "loss_wide"} if task == "distill" else set()
    assert {name for name in first if name.startswith("loss_")} == parts


def test_new_targets_are_stored(plugins: Path, tmp_path: Path) -> None:
    file, store = config(plugins, tmp_path / "run", "distill"), f"teachers.cache.path={tmp_path / 'store'}"
    command = ["teachers", "cache", "--config", str(file), "--set", store]
    assert "are as written" in run(plugins, command, [*command, "--verify"])
    identity = json.loads((tmp_path / "store/manifest.json").read_text())["identity"]
    assert identity["targets.wide.exponent"] == 0.5


def test_commands_know_new_kinds(plugins: Path, tmp_path: Path) -> None:
    """`config show`, `keys` and `explain`, `plan`, `doctor`: without an edit."""
    file = str(config(plugins, tmp_path / "run", "brightness"))
    printed = run(
        plugins,
        ["config", "show", file],
        ["config", "keys"],
        ["config", "explain", "gain"],
        ["plan", "--config", file, "--gpus", "1"],
        ["doctor"],
    )
    shown, _, rest = printed.partition("\n# Settings")
    assert json.loads(shown)["gain"] == 2.0 and json.loads(shown)["data"]["side"] == 36
    assert all(key in rest for key in ("| `gain` |", "`data.side`", "exponent`", "`brightness`"))
    assert "gain (task brightness): of the gate; default 1.0" in rest
    assert "training step" in rest
    _, _, report = rest.partition("\nVersions")
    assert all(name in report for name in ("brightness", "colour", "plain", "gated (cpu)"))


def test_an_unknown_setting_of_a_new_kind_is_refused(plugins: Path, tmp_path: Path) -> None:
    file = config(plugins, tmp_path / "run", "distill")
    content = json.loads(file.read_text())
    content["targets"][0]["exponnent"] = 2.0
    file.write_text(json.dumps(content))
    with pytest.raises(AssertionError, match=r"targets\[0\]\.exponnent: unknown key, did you mean 'exponent'\?"):
        run(plugins, ["config", "show", str(file)])

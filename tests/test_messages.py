"""What a training run says: at its start and its end, of what a user got wrong, and after a signal."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from mvd_fast import cli
from mvd_fast.arguments import add_train_arguments
from mvd_fast.config.load import list_recipes, load_config
from mvd_fast.errors import UserError
from mvd_fast.training import deepspeed_start, launch, messages

ALONE = launch.Placement()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_inputs(tmp_path_factory.mktemp("inputs"), clips=16)


def config_file(inputs: Path, folder: Path, **changes: Any) -> Path:
    content = tiny_runs.config(inputs, folder / "run", **{"log": {"every": 100, "tensorboard": False}, **changes})
    return tiny_runs.write_config(folder / "c.json", content)


def start(*arguments: str) -> subprocess.Popen[str]:
    """`mvd-fast train` in a group of its own, as a terminal starts it."""
    command = [sys.executable, "-m", "mvd_fast.cli", "train", *arguments]
    return subprocess.Popen(
        command, env=tiny_runs.environment(), stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    while not (file.exists() and file.read_text()):
        assert process.poll() is None, tiny_runs.finish(process)
        time.sleep(0.05)


# ---- a run from its start to its end ----


def test_a_run_says_what_it_starts_its_first_loss_and_what_it_left(inputs: Path, tmp_path: Path) -> None:
    """And started once more, that it is finished, without training anything."""
    file, folder = config_file(inputs, tmp_path), tmp_path / "run"
    status, said = tiny_runs.finish(start("--config", str(file)))
    assert status == 0, said
    lines = said.splitlines()
    assert lines[0] == f"mvd-fast: tiny in {folder}, starting 1 rank ..."
    facts = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert facts["data"] == f"16 videos of {inputs / 'train.txt'}"
    assert facts["ranks"].startswith("1 on the CPU (") and facts["ranks"].endswith("; fp32, ZeRO 0")
    assert facts["network"] == "distill, 0.0675 M parameters trained"
    assert facts["batch"] == "8 = micro batch 8 x accumulation 1 x 1 rank"
    assert facts["schedule"] == "2 epochs of 2 steps: 4 steps" and facts["start"] == "from scratch"
    assert any(line.startswith("tiny 1/4 eta ") and " loss " in line for line in lines)
    assert any(line.startswith("mvd-fast: finished: 4 steps; this start took ") for line in lines)
    assert facts["weights"] == str(folder / "model.safetensors") and Path(facts["weights"]).is_file()
    assert facts["next"] == f"mvd-fast probe {folder} --train LIST --test LIST"
    assert lines[-1].startswith("  next")
    assert list(tiny_runs.losses(folder)) == [1, 4]

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, said = tiny_runs.finish(start("--config", str(file)))
    assert status == 0 and f"mvd-fast: {folder} is finished: 4 of 4 steps\n" in said
    assert "  anew      give another folder: --run-dir FOLDER\n" in said
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_ctrl_c_saves_once_and_a_later_start_says_where_it_goes_on(inputs: Path, tmp_path: Path) -> None:
    file, folder = config_file(inputs, tmp_path, optim={"epochs": 500, "warmup_epochs": 1}), tmp_path / "run"
    process = start("--config", str(file))
    wait_for(folder / "log.jsonl", process)  # the first loss
    os.killpg(process.pid, signal.SIGINT)
    status, said = tiny_runs.finish(process)
    assert status == 143, said
    assert "Traceback" not in said and said.count("mvd-fast: saves after this step, then stops; Ctrl-C once more") == 1
    assert "mvd-fast: stopped after step " in said and f"  saved     {folder}\n" in said
    process = start("--config", str(file))
    lines = []
    while not lines or "start" not in lines[-1].split()[:1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    os.killpg(process.pid, signal.SIGTERM)
    assert tiny_runs.finish(process)[0] in (143, -signal.SIGTERM)  # saved, or before it could be
    assert lines[-1].startswith("  start     resumed at step ") and "checkpoints/step-0000" in lines[-1]


def test_ctrl_c_before_the_first_step_is_one_sentence(inputs: Path, tmp_path: Path) -> None:
    process = start("--config", str(config_file(inputs, tmp_path)))
    assert process.stdout.readline().startswith("mvd-fast: tiny in ")
    os.killpg(process.pid, signal.SIGINT)
    status, said = tiny_runs.finish(process)
    assert (status, said.strip()) == (130, "mvd-fast: stopped by Ctrl-C; what the last checkpoint holds is kept")


def test_ctrl_c_of_several_ranks_saves_and_shows_no_traceback(inputs: Path, tmp_path: Path) -> None:
    """Of the launcher either, which gets no Ctrl-C."""
    file = config_file(inputs, tmp_path, optim={"epochs": 500, "warmup_epochs": 1})
    process = start("--config", str(file), "--ranks", "2")
    wait_for(tmp_path / "run" / "log.jsonl", process)
    os.killpg(process.pid, signal.SIGINT)
    status, said = tiny_runs.finish(process)
    assert status == 143, said
    assert "Traceback" not in said and "DeepSpeed" not in said.split("\n", 1)[1]
    assert said.count("mvd-fast: stopped after step ") == 1 and "  ranks     2 on the CPU" in said


# ---- what a user got wrong ----


def classifier(inputs: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """A run that fine-tunes; `changes` replace whole sections."""
    content = tiny_runs.config(inputs, folder / "run", task="classify")
    for name in ("targets", "decoder", "mask"):
        del content[name]
    content["model"] = {**tiny_runs.ENCODER, **tiny_runs.CLIP, "num_classes": 80}
    content["data"] |= {"kind": "labelled"}
    return content | changes


def test_what_all_ranks_find_is_said_once_before_deepspeed_starts(inputs: Path, tmp_path: Path) -> None:
    """A label that no class has, in a list for validation."""
    (tmp_path / "val.txt").write_text(f"{inputs / 'train' / '00000.webm'} 80\n")
    content = classifier(inputs, tmp_path, evaluation={"list": str(tmp_path / "val.txt")}, deepspeed={})
    file = tiny_runs.write_config(tmp_path / "c.json", content)
    no_deepspeed = "import sys; sys.modules['deepspeed'] = None; from mvd_fast.train import main; sys.exit(main())"
    ranks = tiny_runs.start_ranks([sys.executable, "-c", no_deepspeed, "--config", str(file)])
    said = [tiny_runs.finish(process) for process in ranks]
    assert [status for status, _ in said] == [2, 2], said
    together = "".join(text for _, text in said)
    assert together.count("has label 80, but model.num_classes is 80") == 1 and "rank 1" not in together
    assert "Traceback" not in together


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "no-run", "--data", "no-list"],
        ["ava-evaluate", "no-run", "--annotations", "no.csv", "--label-map", "no.pbtxt"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_all_ranks_of_a_test_find_is_said_once(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "mvd_fast.cli", *arguments]
    said = [tiny_runs.finish(process) for process in tiny_runs.start_ranks(command)]
    assert [status for status, _ in said] == [2, 2], said
    assert said[0][1].startswith("mvd-fast: error: ") and said[0][1].count("\n") == 1 and said[1][1] == ""


def test_wrong_arguments_are_said_once() -> None:
    command = [sys.executable, "-m", "mvd_fast.train", "--config", "vitl", "--bogus"]
    said = [tiny_runs.finish(process) for process in tiny_runs.start_ranks(command)]
    assert [status for status, _ in said] == [2, 2]
    assert "unrecognized arguments: --bogus" in said[0][1] and said[1][1] == ""


@pytest.mark.parametrize(
    "arguments, said, status",
    [
        (("--ranks", "2"), "mvd-fast: error: --ranks 2 starts ranks, but a launcher has started this process", 2),
        (("--dry-run", "--set", "data.train=/nowhere"), "mvd-fast: error: data.train: /nowhere does not exist", 2),
        (("--dry-run", "--set", "batch.size=7"), "mvd-fast: error: batch.size 7 is not a multiple of 2 ranks", 2),
        (("--dry-run",), "mvd-fast: tiny, dry run", 0),
    ],
)
def test_what_needs_no_group_of_ranks_is_said_once(
    inputs: Path, tmp_path: Path, arguments: tuple[str, ...], said: str, status: int
) -> None:
    """The ranks that have nothing to say leave, and none waits for them."""
    command = [sys.executable, "-m", "mvd_fast.train", "--config", str(config_file(inputs, tmp_path)), *arguments]
    (first, heard), (_, second) = [tiny_runs.finish(process) for process in tiny_runs.start_ranks(command)]
    assert first == status and heard.startswith(said) and second == ""


def test_what_one_rank_finds_is_said_with_its_number() -> None:
    script = """
import sys
from mvd_fast.errors import UserError
from mvd_fast.training import launch, messages
with launch.init_process_group():
    mine = [UserError("no list here"), None, UserError("no list here"), UserError("no disk")][launch.rank()]
    try:
        launch.raise_together(mine)
    except UserError as error:
        messages.complain(error, launch.rank(), launch.world_size())
"""
    ranks = tiny_runs.start_ranks([sys.executable, "-c", script], count=4)
    said = [process.communicate(timeout=tiny_runs.TIMEOUT)[1] for process in ranks]
    assert said == ["mvd-fast: error: no list here (ranks 0, 2)\nno disk (rank 3)\n", "", "", ""]


def test_an_error_of_one_rank_alone_has_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    alone, together = UserError("mine"), UserError("ours")
    together.everywhere = True
    for rank in (0, 1):
        messages.complain(alone, rank, 2)
        messages.complain(together, rank, 2)
    messages.complain(alone, 0, 1)
    assert capsys.readouterr().err.splitlines() == [
        "mvd-fast: error (rank 0): mine",
        "mvd-fast: error: ours",
        "mvd-fast: error (rank 1): mine",
        "mvd-fast: error: mine",
    ]


# ---- the dry run ----


def test_a_dry_run_checks_loads_one_batch_and_leaves_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(config_file(inputs, tmp_path))
    assert cli.main(["train", "--config", file, "--dry-run", "--ranks", "2"]) == 0
    said = capsys.readouterr().err
    assert "  batch     8 = micro batch 4 x accumulation 1 x 2 ranks\n" in said
    assert "    video   float32 4 x 3 x 8 x 32 x 32, " in said and "    mask    bool 4 x 64, 56.2% set\n" in said
    assert "0 of 4 samples replaced" in said and " MB per rank (predicted), of " in said
    assert said.endswith("mvd-fast: dry run: nothing was trained\n")
    assert not (tmp_path / "run").exists()

    assert cli.main(["train", "--config", file, "--dry-run", "--ranks", "3"]) == 2
    assert "batch.size 8 is not a multiple of 3 ranks" in capsys.readouterr().err
    for clip in (inputs / "train").iterdir():
        (tmp_path / clip.name).write_bytes(b"no video")
    (tmp_path / "list.txt").write_text("".join(f"{number:05d}.webm\n" for number in range(16)))
    assert cli.main(["train", "--config", file, "--dry-run", "--set", f"data.train={tmp_path / 'list.txt'}"]) == 2
    assert "mvd-fast: error: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["distill", "classify"])
def test_memory_of_a_dry_run_is_what_the_planner_says(inputs: Path, tmp_path: Path, kind: str) -> None:
    """For pre-training, where both know the batch; for a classifier, the more the larger the batch is."""
    from mvd_fast.tools.plan.gpus import find_gpu
    from mvd_fast.tools.plan.plan import Plan
    from mvd_fast.tools.plan.preview import memory_bytes
    from mvd_fast.training.prepare import prepare

    content = classifier(inputs, tmp_path) if kind == "classify" else tiny_runs.config(inputs, tmp_path / "run")
    config = load_config(str(tiny_runs.write_config(tmp_path / "c.json", content)))
    run = prepare(config, ALONE)
    batch = next(run.loader.batches(0))
    run.loader.close()
    found = memory_bytes(run, batch)
    if kind == "distill":
        assert found == Plan(config, find_gpu("h100"), 1, 16, "").peak_bytes(0)
    else:
        half = {name: value[:4] for name, value in batch.items()}
        assert memory_bytes(run, half) < found


# ---- words ----


@pytest.mark.parametrize("recipe", [name for name in list_recipes() if not name.startswith("demo/")])
def test_what_comes_next_can_be_given(recipe: str) -> None:
    """The command is one, its recipe exists, and its settings are settings of it."""
    command = load_config(recipe).next_command("runs/mine")
    program, name, *words = command.split()
    assert program == "mvd-fast" and name in cli.COMMANDS and "runs/mine" in command
    if "--config" in words:
        parser = argparse.ArgumentParser()
        add_train_arguments(parser)
        arguments = parser.parse_args(words)
        assert load_config(arguments.config, arguments.set) != load_config(arguments.config)


def test_only_the_finished_run_of_this_config_is_called_finished(tmp_path: Path) -> None:
    config = load_config("vitl", [f"run_dir={tmp_path}"])
    (tmp_path / "config.json").write_text(config.model_dump_json())
    summary = {"finished": True, "step": 7, "steps": 7}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert messages.finished_before(config) == []  # its weights are gone
    (tmp_path / "model.safetensors").touch()
    assert messages.finished_before(config)[0] == f"mvd-fast: {tmp_path} is finished: 7 of 7 steps"
    assert messages.finished_before(load_config("vitl", [f"run_dir={tmp_path}", "optim.epochs=401"])) == []
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "finished": False}))
    assert messages.finished_before(config) == []


def test_the_lines_of_a_recipe_fit_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "cpu_name", lambda: "AMD EPYC 9654")
    task = types.SimpleNamespace(network=torch.nn.Linear(3, 4))
    loader = types.SimpleNamespace(paths=["x"] * 240_000)
    place = launch.Placement(0, 64, 0)
    for recipe in ("vitb_from_vitb", "mae_vitl", "finetune/k400_vitb"):
        run = types.SimpleNamespace(
            config=load_config(recipe), place=place, device=torch.device("cpu"),
            micro_batch_size=16, grad_accum_steps=1, loader=loader, task=task,
            steps_per_epoch=234, total_steps=93_600, trained_parameters=94_400_000, class_names=("abseiling", "zumba"),
        )  # fmt: skip
        lines = messages.outline(run, messages.start_of(run.config, None, 0, 234))
        assert max(map(len, lines)) <= 80, lines


# ---- DeepSpeed's start ----


def test_compiling_is_said_first_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """DeepSpeed prints on every rank that it has been built; that is not shown."""
    said_before = []

    def compiled() -> None:
        said_before.append(capsys.readouterr().err)
        print("DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully")

    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(init_distributed=compiled))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "device", lambda: torch.device("cpu"))
    deepspeed_start.start_deepspeed()
    assert "compiling DeepSpeed's communication between CPU ranks, once" in said_before[0]
    (deepspeed_start.extension_folder() / f"{deepspeed_start.EXTENSION}.so").touch()
    deepspeed_start.start_deepspeed()
    assert said_before[1] == "" and capsys.readouterr() == ("", "")


def test_the_extension_belongs_to_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To each of its paths, as the compiler's command names them."""
    (tmp_path / "env").mkdir()
    (tmp_path / "link").symlink_to("env")
    folders = []
    for name in ("env", "link", "env"):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr(sys, "prefix", str(tmp_path / name))
        folders.append(deepspeed_start.extension_folder())
        assert folders[-1].parents[1] == tmp_path / name / "torch_extensions"
    assert folders[0] == folders[2] and folders[0].name == folders[1].name == deepspeed_start.EXTENSION
    assert not folders[0].samefile(folders[1])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    assert deepspeed_start.extension_folder().parent == tmp_path / "mine"


def test_set_up_compiles_it() -> None:
    root = Path(__file__).parents[1]
    planned = subprocess.run(["make", "-n", "-B", "setup"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert "python -m mvd_fast.training.deepspeed_start" in planned

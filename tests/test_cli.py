"""The command line: what reaches which module, how errors look, and that asking for help costs nothing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import types

import pytest

from mvd_fast import cli
from mvd_fast.arguments import add_train_arguments
from mvd_fast.config.base import ConfigError
from mvd_fast.config.load import config_from_arguments, load_config


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the modules behind the subcommands; what they were called with, by name."""
    calls: dict[str, object] = {}
    for name in ("train", "finetune", "tools.doctor", "tools.demo", "data", "data.check"):
        module = types.ModuleType(f"mvd_fast.{name}")
        module.main = lambda *argv, name=name: calls.setdefault(name, argv) and None
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


def test_help_imports_nothing_heavy():
    code = """
import sys
from mvd_fast import cli
try:
    cli.main(["--help"])
except SystemExit as stop:
    assert not stop.code
print("heavy:", sorted({"torch", "pydantic", "numpy", "deepspeed", "nvidia"} & set(sys.modules)))
"""
    done = run_python(code)
    assert done.returncode == 0 and done.stdout.endswith("heavy: []\n"), done.stderr
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)
    assert max(map(len, done.stdout.splitlines())) <= 80


HELP_OF_ALL = """
import contextlib, io, json, runpy, sys
from mvd_fast import cli

def shown(call):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            call()
        except SystemExit as stop:
            assert not stop.code
    return out.getvalue(), sorted(set(%r) & set(sys.modules))

def script(path):
    sys.argv = [path, "--help"]
    runpy.run_path(path, run_name="__main__")

found = {name: shown(lambda: cli.main([*name.split(), "--help"])) for name in cli.COMMANDS}
found |= {name: shown(lambda: script(name)) for name in %r}
print(json.dumps(found))
"""
# Each takes most of a second of CPU to import, or much of it.
HEAVY = ["torch", "deepspeed", "nvidia.dali", "triton", "sklearn", "scipy", "matplotlib", "timm", "transformers"]
SCRIPTS = ["mvd_fast/train.py", "mvd_fast/finetune.py"]


@pytest.fixture(scope="module")
def help_of_all() -> dict[str, tuple[str, list[str]]]:
    """What `--help` of every command and script prints, and which heavy modules have been imported by then."""
    done = run_python(HELP_OF_ALL % (HEAVY, SCRIPTS))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [*cli.COMMANDS, *SCRIPTS])
def test_help_of_every_command_is_cheap_and_names_its_program(help_of_all, name):
    text, heavy = help_of_all[name]
    program = "mvd-fast COMMAND" if name == "help" else name if name in SCRIPTS else f"mvd-fast {name}"
    assert text.startswith((f"usage: {program} ", f"usage: {program}\n"))
    assert heavy == []


@pytest.mark.parametrize("name", [*cli.COMMANDS, ""])
def test_help_of_a_command_by_name(help_of_all, name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["help", *name.split()])
    assert not stop.value.code and capsys.readouterr().out == help_of_all[name or "help"][0]


def test_help_of_a_group_lists_its_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["help", "config"])
    shown = capsys.readouterr().out
    assert not stop.value.code and "\n  list " in shown and "\n  show " in shown and "doctor" not in shown


@pytest.mark.parametrize("name", [*cli.COMMANDS, *sorted({name.split()[0] for name in cli.COMMANDS if " " in name})])
def test_help_fits_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*name.split(), "--help"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_config_show_does_not_import_torch():
    code = """
import sys
from mvd_fast import cli
cli.main(["config", "show", "no-such-recipe"])
raise SystemExit("torch" in sys.modules)
"""
    done = run_python(code)
    assert done.returncode == 0
    assert done.stderr.startswith("mvd-fast: error: config no-such-recipe does not exist")


@pytest.mark.parametrize(
    "argv, name, received",
    [
        (
            ["train", "--config", "vitl", "--set", "a=1"],
            "train",
            (["--config", "vitl", "--set", "a=1"], "mvd-fast train"),
        ),
        (["finetune", "--help"], "finetune", (["--help"], "mvd-fast finetune")),
        (["doctor"], "tools.doctor", ()),
        (["demo"], "tools.demo", ([],)),
        (["demo", "--size", "quick", "--out", "d"], "tools.demo", (["--size", "quick", "--out", "d"],)),
        (["data", "check", "a b.txt", "--root", "/d"], "data.check", (["a b.txt", "--root", "/d"],)),
    ],
)
def test_command_reaches_its_module(calls, argv, name, received):
    assert cli.main(argv) == 0
    assert calls == {name: received}


def test_status_of_the_module_is_passed_on(calls, monkeypatch):
    monkeypatch.setattr(sys.modules["mvd_fast.train"], "main", lambda *argv: 3)
    assert cli.main(["train"]) == 3


def test_value_error_is_one_line_without_traceback(calls, monkeypatch, capsys):
    def refuse(*argv):
        raise ConfigError("batch.size 7 does not fit")

    monkeypatch.setattr(sys.modules["mvd_fast.train"], "main", refuse)
    assert cli.main(["train"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "mvd-fast: error: batch.size 7 does not fit\n" and shown.out == ""


def test_other_errors_keep_their_traceback(calls, monkeypatch):
    def fail(*argv):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(sys.modules["mvd_fast.train"], "main", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["train"])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["trian"], "unknown subcommand 'trian', did you mean 'train'?"),
        (["zzz"], "unknown subcommand 'zzz'; there are: train, finetune"),
        (["config", "shwo"], "unknown subcommand of config 'shwo', did you mean 'show'?"),
        (["data", "chekc"], "unknown subcommand of data 'chekc', did you mean 'check'?"),
    ],
)
def test_unknown_subcommand_names_the_nearest(argv, said, capsys):
    assert cli.main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_word_after_set_that_sets_nothing_is_refused(capsys):
    assert cli.main(["config", "show", "vitl", "--set", "optim.epochs=3", "vitb"]) == 2
    assert "--set takes KEY=VALUE with a dotted key, such as optim.epochs=100, not 'vitb'" in capsys.readouterr().err


def test_bad_option_exits_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--size", "huge"])
    assert stop.value.code == 2 and "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, option, value, kind",
    [
        ("data check LIST", "--min-frames", "-3", "whole number from 1"),
        ("data check LIST", "--processes", "0", "whole number from 1"),
        ("data show LIST", "--seed", "-1", "whole number from 0"),
        ("demo", "--seed", "-1", "whole number from 0"),
        ("demo", "--seed", str(2**63), "whole number from 0"),
        ("convert SRC DST --to mvd", "--heads", "0", "whole number from 1"),
        ("convert SRC DST --to mvd", "--image-size", "-8", "whole number from 1"),
        ("convert SRC DST --to mvd", "--frames", "0", "whole number from 1"),
        ("probe RUN --train LIST --test LIST", "--regularisation", "0", "number above 0"),
        ("probe RUN --train LIST --test LIST", "--temperature", "inf", "number above 0"),
        ("probe RUN --train LIST --test LIST", "--lr", "nan", "number above 0"),
        ("probe RUN --train LIST --test LIST", "--weight-decay", "-0.1", "number from 0"),
        ("ava-evaluate RUN --annotations CSV --label-map MAP", "--threshold", "nan", "number from 0"),
        ("plan --config vitl --gpus 8", "--decode-fps", "nan", "number above 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(command, option, value, kind, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), option, value])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and said.startswith(f"mvd-fast {command.split(' ')[0]}")
    assert said.endswith(f"error: argument {option}: {value!r} is not a {kind}{' on' if 'from' in kind else ''}")


def test_config_show_prints_what_loads_equal(tmp_path, capsys):
    assert cli.main(["config", "show", "vitl", "--set", "optim.epochs=100", "name=short"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["optim"]["epochs"] == 100 and "extends" not in json.loads(shown)
    (tmp_path / "shown.json").write_text(shown)
    assert load_config(str(tmp_path / "shown.json")) == load_config("vitl", ["optim.epochs=100", "name=short"])


def test_config_list_has_one_line_for_each_recipe(capsys):
    assert cli.main(["config", "list"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["vits_from_vitl"].startswith("distill 384/12/6 <- image 1024/24, video 1024/24; 224 px x 16 frames")
    assert lines["mae_vith"].endswith("224 px; batch 4096, 800 epochs") and "demo/student" in lines


@pytest.mark.parametrize(
    "key, said",
    [
        ("optim.epochs", "optim.epochs: times that the data is gone through; it must be given\n"),
        ("targets.image.weight", "targets[].weight: of its loss; 0: it is not computed; default 1.0\n"),
        ("data.clip", "data.clip (kind labelled): `random`, `center`, `segments`: which frames of a video"),
        ("data.clip.kind", "data.clip (kind labelled): `random`, `center`, `segments`: which frames of a video"),
        ("teachers.cache", "teachers.cache: a section, with the keys teachers.cache.path, teachers.cache.views\n"),
    ],
)
def test_config_explain(key, said, capsys):
    assert cli.main(["config", "explain", key]) == 0
    assert capsys.readouterr().out.startswith(said)


def test_config_explain_of_what_there_is_not(capsys):
    assert cli.main(["config", "explain", "optim.epoch"]) == 2
    assert "no setting 'optim.epoch', did you mean 'optim.epochs'?" in capsys.readouterr().err


def test_a_reader_who_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mvd_fast.cli", "config", "list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    name, version = capsys.readouterr().out.split(maxsplit=1)
    assert name == "mvd-fast" and version.strip()


def test_no_argument_shows_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 0 and "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [[], ["--local_rank=1"], ["--local-rank", "1"]])
def test_train_arguments(rank):
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    given = ["--set", "seed=4", "log.every=3", "--config", "vitl", "--set", "name=x", "--run-dir", "runs/7", *rank]
    arguments = parser.parse_args(given)
    assert arguments.resume == "auto"
    config = config_from_arguments(arguments)
    assert (config.seed, config.log.every, config.name, config.output_dir) == (4, 3, "x", "runs/7")
    assert "local" not in parser.format_help()
    assert config_from_arguments(parser.parse_args(["--config", "vitl"])) == load_config("vitl")


def test_a_librarys_value_error_keeps_its_traceback(calls, monkeypatch):
    """Only our own sentences are for the user; anything else is a fault of the program and must be seen whole."""
    monkeypatch.setattr(sys.modules["mvd_fast.train"], "main", lambda *argv: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["train"])


def test_a_fault_of_our_own_code_keeps_its_traceback_and_a_users_error_is_one_sentence(tmp_path, monkeypatch, capsys):
    """Through the package's own code: a list whose reading fails inside, then one that the user wrote wrongly."""
    from mvd_fast.data import lists

    listed = tmp_path / "list.txt"
    listed.write_text('"never closed.mp4 0\n')
    assert cli.main(["data", "check", str(listed)]) == 2
    assert "is never closed" in capsys.readouterr().err
    monkeypatch.setattr(lists, "parse_line", lambda line, exists: tuple(zip("a", "bc", strict=True)))
    with pytest.raises(ValueError, match="longer"):
        cli.main(["data", "check", str(listed)])

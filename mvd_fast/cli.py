"""The command `mvd-fast`: one word or two choose what runs; each imports what it needs only when it is chosen."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mvd_fast.arguments import add_set_argument
from mvd_fast.errors import INTERRUPTED, UserError
from mvd_fast.names import print_safely
from mvd_fast.training import launch

if TYPE_CHECKING:
    pass

PROGRAM = "mvd-fast"
READER_LEFT = 141  # as of a program that SIGPIPE ends
Arguments = list[str]
Run = Callable[[Arguments], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    The sentence of a `UserError` goes to stderr and the status is its; Ctrl-C is one sentence and INTERRUPTED. Other
    exceptions keep their traceback, but for that of a reader who has left (`mvd-fast config list | head`).
    """
    print_safely()
    place = launch.Placement()
    try:
        place = launch.placement()
        status = _run(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
        return READER_LEFT
    except UserError as error:
        from mvd_fast.training.messages import complain

        complain(error, place.rank, place.world_size)
        return error.status
    except KeyboardInterrupt:
        if place.rank == 0:
            print(f"\n{PROGRAM}: stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED


def _run(argv: Arguments, group: str = "") -> int | None:
    """Runs the command that the first word of `argv` names, or the second where the first names a group."""
    prefix = f"{group} " if group else ""
    commands = {name.removeprefix(prefix): found for name, found in COMMANDS.items() if name.startswith(prefix)}
    parser = _parser(prefix + "COMMAND", commands)
    chosen = parser.parse_args(argv[:1] or ["--help"])  # what follows belongs to the command
    if chosen.version:
        print(f"{PROGRAM} {_version()}")
        return 0
    if chosen.command in commands:
        return commands[chosen.command].run(argv[1:])
    words = list(dict.fromkeys(name.split()[0] for name in commands))
    if chosen.command in words:
        return _run(argv[1:], chosen.command)
    raise UserError(_unknown(chosen.command, words, group))


def _unknown(name: str, words: list[str], group: str) -> str:
    import difflib

    found = difflib.get_close_matches(name, words, n=1)
    hint = f", did you mean {found[0]!r}?" if found else ";"
    of = f" of {group}" if group else ""
    return f"unknown subcommand{of} {name!r}{hint} there are: {', '.join(words)}"


def _parser(what: str, commands: dict[str, Command]) -> argparse.ArgumentParser:
    width = max(map(len, commands))
    lines = (f"  {name:{width}} {command.summary}" for name, command in commands.items())
    parser = argparse.ArgumentParser(
        PROGRAM,
        usage=f"{PROGRAM} {what} ...",
        description=f"Masked video distillation.\n`{PROGRAM} {what} --help` says what a command takes.",
        epilog="commands:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="one of those below")
    return parser


def _train(argv: Arguments) -> int:
    from mvd_fast.train import main as train

    return train(argv, f"{PROGRAM} train")


def _finetune(argv: Arguments) -> int:
    from mvd_fast.finetune import main as finetune

    return finetune(argv, f"{PROGRAM} finetune")


def _help(argv: Arguments) -> int | None:
    return main([*argv, "--help"])


def _doctor(argv: Arguments) -> int | None:
    argparse.ArgumentParser(f"{PROGRAM} doctor", description=COMMANDS["doctor"].summary).parse_args(argv)
    from mvd_fast.tools.doctor import main as doctor

    return doctor()


def _bench_step(argv: Arguments) -> int:
    """pytest on a file of the checkout, which no module of this package imports."""
    program, file = f"{PROGRAM} bench step", Path(__file__).parents[1] / "benchmarks" / "bench_step.py"
    parser = argparse.ArgumentParser(
        program,
        usage=f"{program} [-h] [OPTION ...]",
        description=COMMANDS["bench step"].summary,
        epilog="The same as `pytest benchmarks/bench_step.py OPTION ...`: --config, --set, --batch, --recipes, --data, "
        "--fp32, which its --help explains under 'the whole training step', and pytest's and pytest-benchmark's own, "
        "such as --benchmark-json=FILE.",
    )
    parser.parse_known_args(argv)
    if not file.is_file():
        raise UserError("bench runs in a checkout, beside its folder benchmarks/, which an installed package lacks")
    return subprocess.call([sys.executable, "-m", "pytest", str(file), *argv])


def _config_show(argv: Arguments) -> None:
    from mvd_fast.config.load import load_config

    program = f"{PROGRAM} config show"
    parser = argparse.ArgumentParser(
        program,
        usage=f"{program} [-h] CONFIG [--set KEY=VALUE [KEY=VALUE ...]]",  # argparse would put CONFIG last
        description=COMMANDS["config show"].summary,
    )
    parser.add_argument("config", metavar="CONFIG", help="JSON file or name of a recipe, such as vitl")
    add_set_argument(parser)
    chosen = parser.parse_args(argv)
    print(load_config(chosen.config, chosen.set).model_dump_json(indent=2))


def _config_keys(argv: Arguments) -> None:
    argparse.ArgumentParser(f"{PROGRAM} config keys", description=COMMANDS["config keys"].summary).parse_args(argv)
    from mvd_fast.config.reference import reference

    print(reference(), end="")


def _config_explain(argv: Arguments) -> None:
    parser = argparse.ArgumentParser(f"{PROGRAM} config explain", description=COMMANDS["config explain"].summary)
    parser.add_argument("key", metavar="KEY", help="dotted, such as optim.epochs, or a section, such as data.crop")
    chosen = parser.parse_args(argv)
    from mvd_fast.config.reference import explain

    print(explain(chosen.key))


def _config_list(argv: Arguments) -> None:
    from mvd_fast.config.load import list_recipes, load_config

    argparse.ArgumentParser(f"{PROGRAM} config list", description=COMMANDS["config list"].summary).parse_args(argv)
    recipes = list_recipes()
    width = max(map(len, recipes), default=0)
    for name, path in recipes.items():
        config = load_config(str(path))
        print(f"{name:{width}}  {config.describe()}; batch {config.batch.size}, {config.optim.epochs} epochs")


class Command(NamedTuple):
    run: Run
    summary: str


def _at(module: str, function: str = "main") -> Run:
    """A function of mvd_fast that takes the arguments; imported when it is called."""
    return lambda argv: getattr(import_module(f"mvd_fast.{module}"), function)(argv)


COMMANDS = {
    "train": Command(_train, "train one config, as mvd_fast/train.py does"),
    "finetune": Command(_finetune, "train on labelled videos, as mvd_fast/finetune.py does"),
    "evaluate": Command(_at("evaluation.evaluate"), "test a classifier on a list, with several views of each video"),
    "demo": Command(_at("tools.demo"), "both stages on a small synthetic video set, with a report"),
    "data check": Command(_at("data.check"), "name every unusable file of a list, and what would load faster"),
    "data show": Command(_at("data.show_command"), "what training sees of a list or file, as pictures"),
    "teachers cache": Command(_at("target_store.command"), "store the teachers' features, once for all epochs"),
    "convert": Command(_at("convert.convert"), "a checkpoint in the form of MVD, VideoMAE, Hugging Face or timm"),
    "probe": Command(_at("evaluation.commands", "probe_main"), "classify by frozen features: linear, k-NN, attentive"),
    "features": Command(_at("evaluation.commands", "features_main"), "store a checkpoint's features of videos"),
    "ava-map": Command(_at("evaluation.ava_commands", "map_main"), "AVA's frame mAP of a file of detections"),
    "ava-evaluate": Command(
        _at("evaluation.ava_commands", "evaluate_main"), "AVA's frame mAP of a trained detector, and its detections"
    ),
    "config explain": Command(_config_explain, "what a setting means, its default and who reads it"),
    "config keys": Command(_config_keys, "every setting with its default and meaning"),
    "config list": Command(_config_list, "name the recipes, one a line"),
    "config show": Command(_config_show, "print a config with everything that it extends, as JSON"),
    "plan": Command(_at("tools.plan.command"), "memory, time, storage of a run on GPUs that need not be there"),
    "bench step": Command(_bench_step, "time the training step against the authors' way of doing it"),
    "doctor": Command(_doctor, "versions, devices, which implementation each op uses and why"),
    "help": Command(_help, "what a command takes: `mvd-fast help COMMAND`"),
}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(PROGRAM)
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())

"""The command `mvd-fast`: one word chooses what runs; each imports what it needs only when it is chosen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mvd_fast.errors import UserError

if TYPE_CHECKING:
    from mvd_fast.config import RunConfig

PROGRAM = "mvd-fast"
Arguments = list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status.

    The sentence of a `UserError` goes to stderr and the status is 2. Other exceptions keep their traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    chosen = parser.parse_args(argv[:1] or ["--help"])  # what follows belongs to the subcommand
    if chosen.version:
        print(f"{PROGRAM} {_version()}")
        return 0
    try:
        command = _choose(COMMANDS, chosen.command, "subcommand")
        return command.run(argv[1:]) or 0
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2


def _train(argv: Arguments) -> int | None:
    from mvd_fast.train import main as train

    return train(argv)


def _finetune(argv: Arguments) -> int | None:
    from mvd_fast.finetune import main as finetune

    return finetune(argv)


def _evaluate(argv: Arguments) -> int | None:
    from mvd_fast.downstream.evaluate import main as evaluate

    return evaluate(argv)


def _doctor(argv: Arguments) -> int | None:
    argparse.ArgumentParser(f"{PROGRAM} doctor", description=COMMANDS["doctor"].summary).parse_args(argv)
    from mvd_fast.doctor import main as doctor

    return doctor()


def _demo(argv: Arguments) -> int | None:
    from mvd_fast.demo import main as demo

    return demo(argv)


def _convert(argv: Arguments) -> int | None:
    from mvd_fast.interop.convert import main as convert

    return convert(argv)


def _bench(argv: Arguments) -> int | None:
    return _run_nested("bench", BENCH_COMMANDS, argv)


def _bench_step(argv: Arguments) -> int | None:
    from importlib import import_module
    from pathlib import Path

    folder = Path(__file__).parents[1] / "benchmarks"  # holds the yardstick, which no training needs
    if not (folder / "step.py").is_file():
        raise UserError("bench runs in a checkout, beside its folder benchmarks/, which an installed package lacks")
    sys.path.insert(0, str(folder))
    return import_module("step").main(argv)


def _plan(argv: Arguments) -> int | None:
    from mvd_fast.planning.plan import main as plan

    return plan(argv)


def _probe(argv: Arguments) -> int | None:
    from mvd_fast.downstream.commands import probe_main

    return probe_main(argv)


def _features(argv: Arguments) -> int | None:
    from mvd_fast.downstream.commands import features_main

    return features_main(argv)


def _ava_map(argv: Arguments) -> int | None:
    from mvd_fast.downstream.ava_commands import map_main

    return map_main(argv)


def _ava_evaluate(argv: Arguments) -> int | None:
    from mvd_fast.downstream.ava_commands import evaluate_main

    return evaluate_main(argv)


def _data(argv: Arguments) -> int | None:
    return _run_nested("data", DATA_COMMANDS, argv)


def _data_check(argv: Arguments) -> int | None:
    from mvd_fast.data.check import main as check

    return check(argv)


def _teachers(argv: Arguments) -> int | None:
    return _run_nested("teachers", TEACHERS_COMMANDS, argv)


def _teachers_cache(argv: Arguments) -> int | None:
    from mvd_fast.targets.build import main as cache

    return cache(argv)


def _config(argv: Arguments) -> int | None:
    return _run_nested("config", CONFIG_COMMANDS, argv)


def _config_show(argv: Arguments) -> None:
    from mvd_fast.config_file import load_config

    parser = argparse.ArgumentParser(f"{PROGRAM} config show", description=CONFIG_COMMANDS["show"].summary)
    parser.add_argument("config", metavar="CONFIG", help="JSON file or name of a recipe, such as vitl")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override")
    chosen = parser.parse_args(argv)
    print(load_config(chosen.config, chosen.overrides).model_dump_json(indent=2))


def _config_list(argv: Arguments) -> None:
    from mvd_fast.config_file import list_recipes, load_config

    argparse.ArgumentParser(f"{PROGRAM} config list", description=CONFIG_COMMANDS["list"].summary).parse_args(argv)
    recipes = list_recipes()
    width = max(map(len, recipes), default=0)
    for name, path in recipes.items():
        print(f"{name:{width}}  {_one_line(load_config(str(path)))}")


def _one_line(config: RunConfig) -> str:
    model, optim = config.model, config.optim
    given = {"image": config.teachers.image, "video": config.teachers.video}
    teachers = [f"{role} {teacher.embed_dim}/{teacher.depth}" for role, teacher in given.items() if teacher]
    source = f" <- {', '.join(teachers)}" if teachers else ""
    shape = f"{model.image_size} px" + (f" x {model.num_frames} frames" if model.num_frames > 1 else "")
    return (
        f"{model.kind} {model.embed_dim}/{model.depth}/{model.num_heads}{source}; {shape}; "
        f"batch {config.batch.size}, {optim.epochs} epochs"
    )


class Command(NamedTuple):
    run: Callable[[Arguments], int | None]
    summary: str


COMMANDS = {
    "train": Command(_train, "train one config; the same as mvd_fast/train.py"),
    "finetune": Command(_finetune, "train a classifier on labelled videos; the same as mvd_fast/finetune.py"),
    "evaluate": Command(_evaluate, "test a classifier on a list with several views of each video"),
    "demo": Command(_demo, "make a small video set, train both teachers and a student on it, and write a report"),
    "data": Command(_data, "look after data: `data check LIST` scans every file of a list"),
    "teachers": Command(_teachers, "`teachers cache --config FILE` stores the teachers' features, once for all epochs"),
    "convert": Command(_convert, "a checkpoint in the names and files of MVD, VideoMAE, Hugging Face or timm"),
    "probe": Command(_probe, "classify clips from a checkpoint's frozen features: linear, k-NN, attentive"),
    "features": Command(_features, "store a checkpoint's features of videos"),
    "ava-map": Command(_ava_map, "AVA's frame mAP of a file of detections, by the official protocol"),
    "ava-evaluate": Command(_ava_evaluate, "AVA's frame mAP of a trained action detector; writes its detections"),
    "config": Command(_config, "`config list` names the recipes, `config show CONFIG` prints a resolved one"),
    "plan": Command(_plan, "what a run will take on GPUs that need not be there: memory, time, decoding, storage"),
    "bench": Command(_bench, "`bench step` times the training step against the authors' way of computing it"),
    "doctor": Command(_doctor, "print versions, devices, and which implementation each op uses and why"),
}
DATA_COMMANDS = {"check": Command(_data_check, "report every unusable file of a list, by name")}
BENCH_COMMANDS = {"step": Command(_bench_step, "yardstick and engine in turn: seconds by phase, ratio, memory")}
TEACHERS_COMMANDS = {"cache": Command(_teachers_cache, "run the teachers once over views of every clip; resumable")}
CONFIG_COMMANDS = {
    "show": Command(_config_show, "print a config with everything that it extends, as JSON"),
    "list": Command(_config_list, "name the recipes, one a line"),
}


def _run_nested(group: str, commands: dict[str, Command], argv: Arguments) -> int | None:
    parser = argparse.ArgumentParser(
        f"{PROGRAM} {group}", epilog=_listing(commands), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", metavar="COMMAND", help=", ".join(commands))
    chosen = parser.parse_args(argv[:1] or ["--help"])
    return _choose(commands, chosen.command, f"subcommand of {group}").run(argv[1:])


def _choose(commands: dict[str, Command], name: str, what: str) -> Command:
    if name in commands:
        return commands[name]
    import difflib

    found = difflib.get_close_matches(name, commands, n=1)
    hint = f", did you mean {found[0]!r}?" if found else ";"
    raise UserError(f"unknown {what} {name!r}{hint} there are: {', '.join(commands)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Masked video distillation: train and inspect. `COMMAND --help` says what a command takes.",
        epilog=_listing(COMMANDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=", ".join(COMMANDS))
    return parser


def _listing(commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    return "commands:\n" + "\n".join(f"  {name:{width}} {command.summary}" for name, command in commands.items())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(PROGRAM)
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())

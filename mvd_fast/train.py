"""The script that DeepSpeed starts: `deepspeed mvd_fast/train.py --config configs/vitb_from_vitb.json`.

Also `python -m mvd_fast.train` and `mvd-fast train`, on one rank.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started as a script, Python puts this file's folder first on the path, where `data` or `models` would shadow other
# packages; the checkout's root is what was meant.
_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

import argparse  # noqa: E402
import contextlib  # noqa: E402
import os  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

from mvd_fast.arguments import add_train_arguments  # noqa: E402
from mvd_fast.config.base import ConfigError  # noqa: E402
from mvd_fast.config.checks import missing_files  # noqa: E402
from mvd_fast.config.load import config_from_arguments  # noqa: E402
from mvd_fast.config.run import RunConfig  # noqa: E402
from mvd_fast.errors import INTERRUPTED, SAVED, UserError  # noqa: E402
from mvd_fast.files import make_folder  # noqa: E402
from mvd_fast.names import print_safely  # noqa: E402
from mvd_fast.training import launch, messages  # noqa: E402

if TYPE_CHECKING:
    from mvd_fast.tasks import Validate
    from mvd_fast.training.prepare import Prepared

Check = Callable[[RunConfig], None]


def main(
    argv: Sequence[str] | None = None,
    program: str = "mvd_fast/train.py",
    purpose: str = "train one config",
    check: Check = lambda config: None,
    script: str = __file__,
) -> int:
    """Trains one config; gives the exit status.

    0: the schedule is finished; 1: a loss was not finite; 2: a user's error; 143: saved after SIGTERM or Ctrl-C; 130:
    Ctrl-C where nothing was saved. `program` and `purpose` are for the help text; `check` may refuse a config with a
    ConfigError; `script` is what each of several ranks runs.
    """
    print_safely()
    place = launch.Placement()
    try:
        place = launch.placement()
        args = _parse(argv, program, purpose, place)
        return _run(args, check, script, place)
    except UserError as error:
        messages.complain(error, place.rank, place.world_size)
        return error.status
    except KeyboardInterrupt:
        if place.rank == 0:
            messages.say("", "mvd-fast: stopped by Ctrl-C; what the last checkpoint holds is kept")
        return INTERRUPTED


def _parse(argv: Sequence[str] | None, program: str, purpose: str, place: launch.Placement) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program, description=purpose)
    add_train_arguments(parser)
    with contextlib.ExitStack() as quiet:
        if place.rank:  # all ranks have the same arguments, and the same to say of them
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        return parser.parse_args(argv)


def _run(args: argparse.Namespace, check: Check, script: str, place: launch.Placement) -> int:
    if args.ranks and (place.world_size > 1 or "RANK" in os.environ):
        error = UserError(f"--ranks {args.ranks} starts ranks, but a launcher has started this process as one: drop it")
        error.everywhere = True
        raise error
    if args.dry_run and place.rank:
        return 0  # rank 0 does it alone
    fault = prepared = validate = None
    try:
        config = _config(args, check)
        if args.dry_run:
            return _dry_run(config, place._replace(world_size=args.ranks or place.world_size))
        if args.resume == "auto" and (done := messages.finished_before(config)):
            if place.rank == 0:
                messages.say(*done)
            return 0
        if args.ranks and args.ranks > 1:
            return _start_ranks(args, script)
        if place.rank == 0:
            messages.say(messages.opening(config, place.world_size))
        make_folder(config.output_dir)
        prepared, validate = _prepare(config, place)
    except UserError as error:
        if place.world_size == 1 or args.dry_run:
            error.everywhere = True
            raise
        fault = error
    with launch.init_process_group():
        launch.raise_together(fault)
        return _train(prepared, validate, args)


def _dry_run(config: RunConfig, place: launch.Placement) -> int:
    from mvd_fast.tools.plan.preview import preview

    prepared, _ = _prepare(config, place)
    preview(prepared)
    return 0


def _start_ranks(args: argparse.Namespace, script: str) -> int:
    """The same run on several ranks, each in a process of its own."""
    from mvd_fast.training.launcher import run_ranks

    messages.say(f"mvd-fast: {args.ranks} ranks by DeepSpeed's launcher ...")
    arguments = ["--config", args.config, "--resume", args.resume, "--run-dir", args.run_dir]
    arguments += ["--set", *args.set] if args.set else []
    arguments += [f"--{switch}" for switch in ("profile", "anomaly") if getattr(args, switch)]
    threads = len(os.sched_getaffinity(0)) // args.ranks if launch.device().type == "cpu" else None
    return run_ranks(args.ranks, script, arguments, threads)


def _config(args: argparse.Namespace, check: Check) -> RunConfig:
    config = config_from_arguments(args)
    check(config)
    if missing := missing_files(config):
        raise ConfigError("\n".join(missing))
    return config


def _prepare(config: RunConfig, place: launch.Placement) -> tuple[Prepared, Validate | None]:
    from mvd_fast.training.prepare import prepare

    prepared = prepare(config, place)
    return prepared, prepared.task.validation(config, prepared.device)


def _train(prepared: Prepared, validate: Validate | None, args: argparse.Namespace) -> int:
    import torch

    from mvd_fast.training.finite import NonFiniteLossError
    from mvd_fast.training.trainer import Trainer

    try:
        with torch.autograd.set_detect_anomaly(args.anomaly):
            return 0 if Trainer(prepared, args.resume, validate, args.profile).fit() else SAVED
    except NonFiniteLossError as error:  # on all ranks
        if launch.rank() == 0:
            messages.say(f"mvd-fast: error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main(program="python -m mvd_fast.train" if __spec__ else "mvd_fast/train.py"))

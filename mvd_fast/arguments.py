"""Command-line arguments that several commands take, and their types."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    return _whole_from(1, text)


def whole(text: str) -> int:
    """For argparse: a whole number from 0 on, such as a seed."""
    return _whole_from(0, text)


def _whole_from(least: int, text: str) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def above_zero(text: str) -> float:
    """For argparse: a finite number above 0."""
    if not (value := _number(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def from_zero(text: str) -> float:
    """For argparse: a finite number from 0 on."""
    if not (value := _number(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def _number(text: str) -> float:
    """NaN for what is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """`--config`, required where there is no default, and `--set`."""
    shown = f" (default: {default})" if default else ", such as vitl"
    parser.add_argument(
        "--config",
        required=default is None,
        default=default,
        metavar="FILE",
        help=f"JSON file or name of a recipe{shown}",
    )
    add_set_argument(parser)


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """`--set KEY=VALUE ...`, the overrides of `load_config`."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override values, such as optim.epochs=100 seed=1; may be repeated",
    )


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `train.py` and `mvd-fast train` take, and the rank that DeepSpeed's launcher appends."""
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="{auto,never,PATH}",
        help="auto: from the newest valid checkpoint of the run; never: start anew; or the path of one",
    )
    parser.add_argument("--run-dir", default="", metavar="FOLDER", help="where checkpoints and logs go")
    parser.add_argument(
        "--ranks",
        type=positive,
        metavar="N",
        help="start N on this machine by DeepSpeed's launcher, one for each GPU (default: 1, this process)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check files, labels, batch and memory, load one batch, and train nothing",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write a trace of three steps, and on a GPU a snapshot of its memory, into the run folder's profile/",
    )
    parser.add_argument(
        "--anomaly",
        action="store_true",
        help="find the operation whose gradient is NaN, by torch.autograd.detect_anomaly; slow",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """How a network is run: `--precision`, `--device`, and `--threads` for its clips."""
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=positive, default=2, help="that decode (default: %(default)s)")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What a checkpoint of others may not tell: `--heads`, `--positions`."""
    parser.add_argument("--heads", type=positive, help="attention heads, where the width does not tell")
    parser.add_argument("--positions", choices=("3d", "1d"), help="where the checkpoint does not tell")

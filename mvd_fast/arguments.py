"""Command-line arguments that several commands take, and their types."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """How a network is run: `--precision`, `--device`, and `--threads` for its clips."""
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=positive, default=2, help="that decode (default: %(default)s)")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What a checkpoint of others may not tell: `--heads`, `--positions`."""
    parser.add_argument("--heads", type=positive, help="attention heads, where the width does not tell")
    parser.add_argument("--positions", choices=("3d", "1d"), help="where the checkpoint does not tell")

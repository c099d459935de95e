"""`mvd-fast bench step`: the whole distillation step against the authors' way of computing it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from less_work import RECIPES

from mvd_fast.arguments import add_config_arguments, positive
from mvd_fast.config_file import load_config
from mvd_fast.files import make_folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("mvd-fast bench step", description=__doc__.split(": ", 1)[1])
    add_config_arguments(parser, default="vitb_from_vitb")
    parser.add_argument("--batch", type=positive, default=2, help="clips of a step (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--recipes", default="exact", help=f"comma-separated, or all: {', '.join(RECIPES)} (default: %(default)s)"
    )
    parser.add_argument("--data", metavar="LIST", help="a short list of clips to load beside the step, and to store")
    parser.add_argument("--fp32", action="store_true", help="also the yardstick in float32")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    names = list(RECIPES) if args.recipes == "all" else args.recipes.split(",")
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"--recipes: {unknown[0]!r} is unknown; there are: all, {', '.join(RECIPES)}")
    if args.json:
        make_folder(Path(args.json).parent)
    from step import bench

    bench(args, config, names)
    return 0

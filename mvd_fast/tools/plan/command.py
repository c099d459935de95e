"""`mvd-fast plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from mvd_fast.arguments import above_zero, add_config_arguments, positive
from mvd_fast.config.load import load_config
from mvd_fast.files import write_text

from .figures import Figure
from .gpus import GPUS, NETWORK_GB_S, find_gpu

if TYPE_CHECKING:
    from rich.table import Table


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a config's figures, and writes them with --json; 0."""
    arguments = _parser().parse_args(argv)
    config = load_config(arguments.config, arguments.set)
    from rich.console import Console

    from .plan import Plan, count_clips

    clips, source = count_clips(config, arguments.clips)
    plan = Plan(
        config,
        find_gpu(arguments.gpu),
        arguments.gpus,
        clips,
        source,
        arguments.share_of_peak,
        arguments.network_gb_s,
        arguments.decode_fps,
    )
    figures = plan.figures()
    title = f"{config.name} on {arguments.gpus} x {plan.gpu.title}, ZeRO {config.zero_stage}, {config.precision}"
    Console(width=max(120, Console().width), highlight=False).print(_table(title, figures))
    if arguments.json:
        rows = [asdict(figure) for figure in figures]
        content = {"config": config.name, "gpus": arguments.gpus, "gpu": asdict(plan.gpu), "figures": rows}
        write_text(arguments.json, json.dumps(content, indent=1) + "\n")
    return 0


def _table(title: str, figures: Sequence[Figure]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("from what")
    section = None
    for figure in figures:
        if figure.section != section:
            table.add_section()
            table.add_row(f"[bold]{figure.section}[/]", "", "", "", "")
            section = figure.section
        table.add_row(figure.figure, figure.shown, figure.unit, figure.kind, figure.source)
    return table


def _share(text: str) -> float:
    value = above_zero(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 1: it is a share, such as 0.4")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mvd-fast plan",
        description="What a run will take: parameters, FLOP, memory under each ZeRO stage, time, decoding, storage. "
        "Needs neither GPU nor data nor checkpoints.",
    )
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="how many, over all machines")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(GPUS)} (default: %(default)s)")
    parser.add_argument("--clips", type=positive, metavar="N", help="training samples; default: lines of data.train")
    parser.add_argument(
        "--share-of-peak", type=_share, metavar="X", help="of the published bf16 peak; default: from a measured step"
    )
    parser.add_argument(
        "--network-gb-s",
        type=above_zero,
        default=NETWORK_GB_S,
        metavar="R",
        help="GB/s of each GPU to other machines, one direction (default: %(default)s)",
    )
    parser.add_argument("--decode-fps", type=above_zero, metavar="R", help="frames a second that a GPU decodes")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    return parser

"""`mvd-fast demo`: both stages of MVD on a small video set of moving digits, and a report of what was learned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mvd_fast.arguments import whole

DEFAULT_OUT = {"full": "runs/demo", "medium": "runs/demo-medium", "quick": "runs/demo-quick"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; what an earlier call finished is skipped, what it left half done is resumed."""
    parser = argparse.ArgumentParser("mvd-fast demo", description=__doc__)
    parser.add_argument("--size", choices=tuple(DEFAULT_OUT), default="full", help="quick: a few minutes")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where everything goes (default: runs/demo, runs/demo-<size>)"
    )
    parser.add_argument("--seed", type=whole, default=0, help="of the clips and all three trainings (%(default)s)")
    args = parser.parse_args(argv)

    from mvd_fast.tools.demo.run import Demo

    Demo(args.out or Path(DEFAULT_OUT[args.size]), args.size, args.seed).run()
    return 0

"""`mvd-fast teachers cache`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mvd_fast.arguments import add_config_arguments, positive
from mvd_fast.config.base import ConfigError
from mvd_fast.config.checks import missing_files
from mvd_fast.config.load import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Builds, goes on with, or verifies the store of a config; 0 when this process's part is complete."""
    arguments = _parser().parse_args(argv)
    from mvd_fast.tasks.distill import Config

    config = load_config(arguments.config, arguments.set)
    if not isinstance(config, Config):
        raise ConfigError(f"config {config.name} has task {config.task!r}; targets are stored for task 'distill'")
    if not config.teachers.cache.path:
        raise ConfigError("teachers.cache.path is empty; name the store's folder: --set teachers.cache.path=FOLDER")
    if missing := missing_files(config):
        raise ConfigError("\n".join(missing))
    from .build import build_store, verify_store

    if arguments.verify:
        print(f"{verify_store(config)} rows of {config.teachers.cache.path} are as written")
    else:
        build_store(config, arguments.batch, arguments.rows_per_shard, arguments.shard)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mvd-fast teachers cache",
        description="Run the teachers once over teachers.cache.views views of every clip and store their features in "
        "teachers.cache.path. Goes on where an earlier call stopped. Ranks of a launcher share the work.",
    )
    add_config_arguments(parser)
    parser.add_argument("--shard", metavar="I/N", help="this process is number I (from 0) of N that share the work")
    parser.add_argument("--batch", type=positive, metavar="B", help="clips at a time; default: the micro batch, or 16")
    parser.add_argument("--rows-per-shard", type=positive, metavar="R", help="default: as many as fill 256 MiB")
    parser.add_argument("--verify", action="store_true", help="read a complete store against its checksums instead")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser

"""The script that DeepSpeed starts: `deepspeed mvd_fast/train.py --config configs/vitb_from_vitb.json`.

Also `python -m mvd_fast.train` and `mvd-fast train`, on one rank.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Started as a script, Python puts this file's folder first on the path, where `data` or `models` would shadow other
# packages; the checkout's root is what was meant.
_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

import argparse  # noqa: E402
import logging  # noqa: E402
import socket  # noqa: E402
from collections.abc import MutableMapping, Sequence  # noqa: E402

from mvd_fast.config_file import ConfigError, add_train_arguments, config_from_arguments, missing_files  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Trains one config; 0 when the schedule is finished, 2 for a user's error, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(prog="mvd_fast/train.py", description="train one config")
    add_train_arguments(parser)
    args = parser.parse_args(argv)
    try:
        config = config_from_arguments(args)
        if missing := missing_files(config):
            raise ConfigError("\n".join(missing))
        return _run(config, args.resume)
    except ValueError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            sys.stderr.write(f"mvd-fast: error: {error}\n")
        return 2


def _run(config, resume: str) -> int:
    _quiet_logs()
    _single_process_defaults()
    import deepspeed
    import torch.distributed as dist

    from mvd_fast.trainer import NonFiniteLossError, Trainer

    deepspeed.init_distributed()
    try:
        return 0 if Trainer(config, resume).fit() else 143
    except NonFiniteLossError as error:
        sys.stderr.write(f"mvd-fast: error: {error}\n")
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _quiet_logs() -> None:
    """Our warnings and worse to the terminal; other libraries' remarks about a machine without a GPU stay out."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    choose_accelerator(os.environ)
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)


def choose_accelerator(environment: MutableMapping[str, str]) -> None:
    """Tells DeepSpeed to use the CPU where torch sees no GPU; left to itself it warns about that in every process."""
    import torch

    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")


def _single_process_defaults() -> None:
    """Without a launcher: one rank on this machine, on a free port."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


if __name__ == "__main__":
    sys.exit(main())

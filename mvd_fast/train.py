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
from collections.abc import Callable, Sequence  # noqa: E402

from mvd_fast.arguments import add_train_arguments  # noqa: E402
from mvd_fast.config import RunConfig  # noqa: E402
from mvd_fast.config_file import ConfigError, config_from_arguments, missing_files  # noqa: E402
from mvd_fast.errors import UserError  # noqa: E402
from mvd_fast.names import print_safely  # noqa: E402
from mvd_fast.training import launch  # noqa: E402


def main(
    argv: Sequence[str] | None = None,
    program: str = "mvd_fast/train.py",
    purpose: str = "train one config",
    check: Callable[[RunConfig], None] = lambda config: None,
) -> int:
    """Trains one config; 0 when the schedule is finished, 2 for a user's error, 143 after SIGTERM.

    `program` and `purpose` are for the help text; `check` may refuse a config with a ConfigError.
    """
    parser = argparse.ArgumentParser(prog=program, description=purpose)
    add_train_arguments(parser)
    args = parser.parse_args(argv)
    print_safely()
    rank = ""
    try:
        place = launch.placement()
        rank = f" (rank {place.rank})" if place.world_size > 1 else ""
        config = config_from_arguments(args)
        check(config)
        if missing := missing_files(config):
            raise ConfigError("\n".join(missing))
        return _run(config, args)
    except UserError as error:
        sys.stderr.write(f"mvd-fast: error{rank}: {error}\n")
        return 2


def _run(config: RunConfig, args: argparse.Namespace) -> int:
    with launch.init_process_group():
        import torch

        from mvd_fast.downstream.views import Validation
        from mvd_fast.training.finite import NonFiniteLossError
        from mvd_fast.training.trainer import Trainer

        validate = Validation(config, launch.device()).run if config.evaluation.list else None
        try:
            with torch.autograd.set_detect_anomaly(args.anomaly):
                return 0 if Trainer(config, args.resume, validate, args.profile).fit() else 143
        except NonFiniteLossError as error:  # on all ranks
            if launch.rank() == 0:
                sys.stderr.write(f"mvd-fast: error: {error}\n")
            return 1


if __name__ == "__main__":
    sys.exit(main(program="python -m mvd_fast.train" if __spec__ else "mvd_fast/train.py"))

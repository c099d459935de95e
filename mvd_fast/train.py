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
import time  # noqa: E402
from collections.abc import Callable, Iterator, MutableMapping, Sequence  # noqa: E402
from contextlib import contextmanager  # noqa: E402

from mvd_fast.arguments import add_train_arguments  # noqa: E402
from mvd_fast.config import RunConfig  # noqa: E402
from mvd_fast.config_file import ConfigError, config_from_arguments, missing_files  # noqa: E402
from mvd_fast.errors import UserError  # noqa: E402

LETTING_GO = 0.2  # seconds for threads that only wait for their turn

# Rank, world size and local rank of a task of `srun` and of Open MPI's `mpirun`.
TASK_VARIABLES = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


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
    try:
        config = config_from_arguments(args)
        check(config)
        if missing := missing_files(config):
            raise ConfigError("\n".join(missing))
        return _run(config, args.resume)
    except UserError as error:
        _complain(error)
        return 2


@contextmanager
def distributed() -> Iterator[None]:
    """This process as one rank of DeepSpeed's group, as a launcher says or alone.

    At the end the group is left, and its threads get time to let go of the last collectives' tensors. For that they
    need the interpreter; one that asks for it when Python shuts down aborts the process (PyTorch's issue 190489).
    DeepSpeed keeps references to the group, so leaving it does not end the threads.
    """
    _adopt_ranks(os.environ)
    _quiet_logs()
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed()
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(LETTING_GO)


def _run(config, resume: str) -> int:
    with distributed():
        from mvd_fast.trainer import NonFiniteLossError, Trainer

        try:
            return 0 if Trainer(config, resume).fit() else 143
        except NonFiniteLossError as error:
            _complain(error)
            return 1


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


def _adopt_ranks(environment: MutableMapping[str, str]) -> None:
    """Finds out which rank this is: told by a launcher, by srun or mpirun, or the only one, on a free port."""
    if "RANK" in environment:
        return
    for rank, size, local in TASK_VARIABLES:
        if int(environment.get(size, 1)) > 1:
            if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
                raise ConfigError(
                    f"this is one of {environment[size]} tasks, but MASTER_ADDR and MASTER_PORT are not set; export "
                    "the first node's name and a free port before the tasks start"
                )
            environment.update(RANK=environment[rank], WORLD_SIZE=environment[size], LOCAL_RANK=environment[local])
            return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _complain(error: Exception) -> None:
    rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    sys.stderr.write(f"mvd-fast: error{rank}: {error}\n")


if __name__ == "__main__":
    sys.exit(main(program="python -m mvd_fast.train" if __spec__ else "mvd_fast/train.py"))

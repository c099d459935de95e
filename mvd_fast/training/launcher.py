"""Several ranks on this machine by DeepSpeed's launcher, which one signal stops after they have saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from mvd_fast.errors import SAVED

from . import launch

SAVING_TIME = 60.0  # seconds that an interrupted training has to save


def run_ranks(ranks: int, script: str | Path, arguments: Sequence[str], threads: int | None = None) -> int:
    """Runs a script of ours on so many ranks, each with so many OpenMP threads; gives their exit status.

    Ctrl-C and SIGTERM to this process become one SIGTERM to every rank, and time to save. Where they have not saved,
    the KeyboardInterrupt or SystemExit goes on.
    """
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--num_accelerators", str(ranks), "--no_local_rank", "--log_level", "critical"),
        *("--master_port", str(launch.free_port()), str(script), *arguments),
    ]
    environment = dict(os.environ)
    launch.choose_accelerator(environment)
    if threads:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    # A session of its own: Ctrl-C then reaches us alone, and the launcher lives on to see its processes end.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(SAVED))
    try:
        return process.wait()
    except (KeyboardInterrupt, SystemExit):
        if (status := _stop_family(process)) != SAVED:
            raise
        return status
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop_family(launcher: subprocess.Popen[bytes]) -> int:
    """SIGTERM to the ranks; what has not saved and left after SAVING_TIME is killed. Gives their exit status."""
    runner = psutil.Process(launcher.pid)
    family = runner.children(recursive=True)
    _terminate(runner)
    try:
        psutil.wait_procs(family, timeout=SAVING_TIME)
    finally:  # another Ctrl-C ends the waiting
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    return launcher.wait()


def _terminate(runner: psutil.Process) -> None:
    """The ranks, which are grandchildren of DeepSpeed's command; before there are any, what would start them.

    Not their own children, which are for the ranks to end.
    """
    for helper in runner.children() or [runner]:
        with suppress(psutil.NoSuchProcess):
            for process in helper.children() or [helper]:
                process.terminate()

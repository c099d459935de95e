"""Ctrl-C reaches a command's worker processes through their parent alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import tiny_runs

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from mvd_fast.data.workers import no_interrupts, worker_pool

def work(file):
    Path(file).touch()
    time.sleep(10_000)

if __name__ == "__main__":
    files = [Path(sys.argv[1], str(number)) for number in range(8)]
    try:
        with worker_pool(2) as pool:
            with no_interrupts():
                jobs = [pool.submit(work, str(file)) for file in files]
            while not (files[0].exists() and files[1].exists()):
                time.sleep(0.05)
            os.killpg(0, signal.SIGINT)
            jobs[0].result()
    except KeyboardInterrupt:
        print("stopped", sum(file.exists() for file in files))
"""


def test_a_pool_ends_at_once_and_quietly(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=tiny_runs.TIMEOUT, start_new_session=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped 2\n", "")


def test_only_what_is_started_inside_is_shielded() -> None:
    from mvd_fast.data.workers import no_interrupts

    with no_interrupts():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

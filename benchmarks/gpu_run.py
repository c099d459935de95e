"""Runs the operators' tests and benchmarks for benchmarks/gpu.sh, and writes what they gave as one JSON.

Every file is a process of its own: an illegal access on CUDA ends everything that the process would do after it.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import torch

import mvd_kernels
from mvd_kernels._dispatch import extension
from mvd_kernels._triton import HAS_TRITON, triton

NOTHING_COLLECTED = 5
GRACE = 15  # seconds that an interrupted pytest has for its reports
LINES = 30  # of the log of a part that did not end well
COUNTS = ("passed", "failed", "skipped")


def run(file: str, seconds: float, arguments: Sequence[str], scratch: Path) -> dict:
    """One file under pytest for at most `seconds`: counts, failures, rows of benchmarks, the log unless all is well."""
    report, rows, log = (scratch / f"{Path(file).stem}.{kind}" for kind in ("xml", "json", "log"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", file]
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "-k", built_here(), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            # Plugins of the machine are none of ours.
            env=os.environ | {"MVD_BENCH_JSON": str(rows), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )
        finished = wait(process, seconds)
    found = results(report, finished) | {"finished": finished, "exit": process.returncode}
    found["seconds"] = round(time.monotonic() - started, 1)
    if rows.is_file():
        found |= json.loads(rows.read_text())
    text = log.read_text(errors="replace").splitlines()
    if not is_well(found):
        found["log"] = text[-LINES:]
    print(f"{file}: {text[-1] if text else 'no output'} [exit {process.returncode}]", flush=True)
    return found


def built_here() -> str:
    """For pytest's -k, of names and marks: what is of the C++ extension and of the DALI plugin where they are built."""
    there = {"cpp": extension()[0] is not None, "dali": any(Path("mvd_fast/data").glob("_dali_plugin*.so"))}
    return " and ".join(f"not {name}" for name, built in there.items() if not built)


def wait(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it ends by itself. When its time is up it is interrupted, which leaves it its reports, then killed."""
    try:
        process.wait(max(seconds, 0))
        return process.returncode >= 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return False


def is_well(part: dict) -> bool:
    return part["finished"] and part["exit"] in (0, NOTHING_COLLECTED)


def results(report: Path, finished: bool) -> dict:
    """Counts and failures of pytest's JUnit report, which is not there if pytest was killed."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    counts: Counter[str] = Counter()
    failures = {}
    # The report calls a test that was interrupted passed.
    for case in cases if finished else cases[:-1]:
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        if problem is not None:
            failures[case.get("name", "")] = (problem.get("message") or problem.text or "").strip()[:500]
        skipped = case.find("skipped") is not None
        counts["failed" if problem is not None else "skipped" if skipped else "passed"] += 1
    return {name: counts[name] for name in COUNTS} | {"failures": failures}


def test_files() -> dict[str, list[str]]:
    """Files and pytest's arguments for each: the operators' whole, of the engine's what is marked `gpu`."""
    operators = [f"tests/test_{name}.py" for name in mvd_kernels.operators()]
    chosen: dict[str, list[str]] = {file: [] for file in operators if Path(file).is_file()}
    engine = [str(file) for file in sorted(Path("tests").glob("test_*.py")) if "pytest.mark.gpu" in file.read_text()]
    engine = [file for file in engine if file not in chosen]
    if find_spec("pydantic") is None:
        print(f"left out, as pydantic is not installed here: {', '.join(engine)}", flush=True)
        return chosen
    return chosen | {file: ["-m", "gpu"] for file in engine}


def total(parts: dict[str, dict]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts.values()) for name in COUNTS}


def machine() -> dict[str, object]:
    facts: dict[str, object] = {
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": first_line("git", "rev-parse", "HEAD"),
        "device": "none: a trial on the CPU",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def first_line(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def run_all(deadline: float, arguments: Sequence[str], scratch: Path) -> dict:
    """Tests side by side, for at most half of the time, as they wait for compilers more than for the GPU; then the
    benchmarks one after another, each with its share of what is left."""
    chosen = test_files()
    half = (deadline - time.monotonic()) / 2
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda file: run(file, half, [*chosen[file], *arguments], scratch), chosen)
        tests = dict(zip(chosen, found, strict=True))
    benchmarks = {}
    files = sorted(map(str, Path("benchmarks").glob("bench_*.py")))
    for number, file in enumerate(files):
        share = (deadline - time.monotonic()) / (len(files) - number) - GRACE
        benchmarks[file] = run(file, share, arguments, scratch)
    parts = {"tests": tests, "benchmarks": benchmarks}
    rows = [row for part in benchmarks.values() for row in part.pop("rows", [])]
    measured = {name: fact for part in benchmarks.values() for name, fact in part.pop("machine", {}).items()}
    return {
        "machine": measured | machine(),
        **{kind: {"total": total(found), "files": found} for kind, found in parts.items()},
        "rows": rows,
    }


def main() -> int:
    out, seconds, *arguments = sys.argv[1:]
    deadline = time.monotonic() + float(seconds)
    if not torch.cuda.is_available() and os.environ.get("MVD_GPU_ON_CPU") != "1":
        print("gpu.sh needs a CUDA device, and torch sees none; MVD_GPU_ON_CPU=1 tries it without", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        found = run_all(deadline, arguments, Path(scratch))
    aside = Path(f"{out}.new")
    aside.write_text(json.dumps(found, indent=1) + "\n")
    aside.replace(out)
    kinds = [found[kind] for kind in ("tests", "benchmarks")]
    well = all(is_well(part) for kind in kinds for part in kind["files"].values())
    print(f"{out}: tests {kinds[0]['total']}, benchmarks {kinds[1]['total']}{'' if well else '; not all is well'}")
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())

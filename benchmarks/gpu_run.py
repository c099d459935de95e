"""Runs the operators' tests and benchmarks for benchmarks/gpu.sh, and writes what they gave as one JSON.

Every file is a process of its own: an illegal access on CUDA ends everything that the process would do after it. The
JSON is pytest-benchmark's, of all files together, with `parts`: how every file ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch

import mvd_kernels
from mvd_kernels._dispatch import extension
from mvd_kernels._triton import HAS_TRITON, triton

GRACE = 15  # seconds that an interrupted pytest has for its reports
LINES = 30  # of the log of a part that did not end well
WELL = (0, 5)  # exits of pytest: all passed, nothing was collected


def run(file: str, seconds: float, options: Sequence[str]) -> dict:
    """One file under pytest for at most `seconds`, then it is interrupted, which leaves it its reports, then killed."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", built_here(), *options]
    command = ["timeout", "--signal=INT", f"--kill-after={GRACE}", str(max(seconds, 1)), *pytest]
    started = time.monotonic()
    # Plugins of the machine are none of ours.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    text = done.stdout.splitlines() or ["no output"]
    print(f"{file}: {text[-1]} [exit {done.returncode}]", flush=True)
    found = {"exit": done.returncode, "said": text[-1], "seconds": round(time.monotonic() - started, 1)}
    return found if done.returncode in WELL else found | {"log": text[-LINES:]}


def built_here() -> str:
    """For pytest's -k, of names and marks: what is of the C++ extension and of the DALI plugin where they are built."""
    there = {"cpp": extension()[0] is not None, "dali": any(Path("mvd_fast/data").glob("_dali_plugin*.so"))}
    return " and ".join(f"not {name}" for name, built in there.items() if not built)


def test_files() -> dict[str, list[str]]:
    """Files and pytest's options for each: the operators' whole, of the engine's what is marked `gpu`."""
    operators = [f"tests/test_{name}.py" for name in mvd_kernels.operators()]
    chosen: dict[str, list[str]] = {file: [] for file in operators if Path(file).is_file()}
    engine = [str(file) for file in sorted(Path("tests").glob("test_*.py")) if "pytest.mark.gpu" in file.read_text()]
    engine = [file for file in engine if file not in chosen]
    if lacking := [name for name in ("einops", "pydantic") if find_spec(name) is None]:
        verb = "is" if len(lacking) == 1 else "are"
        print(f"left out, as {' and '.join(lacking)} {verb} not installed here: {', '.join(engine)}", flush=True)
        return chosen
    return chosen | {file: ["-m", "gpu"] for file in engine}


def run_all(out: Path, deadline: float, bench_seconds: str, options: Sequence[str], scratch: Path) -> bool:
    """Tests side by side, for at most half of the time, as they wait for compilers more than for the GPU; then the
    benchmarks one after another, each with its share of what is left. Returns whether all is well."""
    chosen, half = test_files(), (deadline - time.monotonic()) / 2
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ended = pool.map(lambda file: run(file, half, [*chosen[file], *options]), chosen)
        whole = {"parts": dict(zip(chosen, ended, strict=True)), "machine_info": machine(), "benchmarks": []}
    write(out, whole)
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError:  # as gpu.sh has said
        return False
    files = sorted(map(str, Path("benchmarks").glob("bench_*.py")))
    for number, file in enumerate(files):
        share = (deadline - time.monotonic()) / (len(files) - number) - GRACE
        rows = scratch / f"{Path(file).stem}.json"
        timing = ["-p", "pytest_benchmark.plugin", f"--benchmark-json={rows}", f"--benchmark-max-time={bench_seconds}"]
        whole["parts"][file] = run(file, share, [*timing, "--benchmark-quiet", *options])
        if rows.is_file() and (text := rows.read_text()):
            found = json.loads(text)
            whole["benchmarks"] += found.pop("benchmarks")
            whole |= found | {"machine_info": found["machine_info"] | machine()}
        write(out, whole)
    return all(part["exit"] in WELL for part in whole["parts"].values())


def write(out: Path, content: dict) -> None:
    aside = Path(f"{out}.new")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(out)


def machine() -> dict[str, object]:
    facts = {"torch": torch.__version__, "triton": triton.__version__ if HAS_TRITON else None}
    if not torch.cuda.is_available():
        return facts | {"device": "none: a trial on the CPU"}
    properties = torch.cuda.get_device_properties(0)
    query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader || true"
    driver = subprocess.run(query, shell=True, capture_output=True, text=True).stdout
    return facts | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "driver": driver.split("\n")[0],
    }


def main() -> int:
    out, seconds, bench_seconds, *options = sys.argv[1:]
    deadline = time.monotonic() + float(seconds)
    if not torch.cuda.is_available() and os.environ.get("MVD_GPU_ON_CPU") != "1":
        print("gpu.sh needs a CUDA device, and torch sees none; MVD_GPU_ON_CPU=1 tries it without", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        well = run_all(Path(out), deadline, bench_seconds, options, Path(scratch))
    print(f"{out}{'' if well else '; not all is well'}")
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())

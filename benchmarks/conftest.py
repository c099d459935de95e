"""`pytest benchmarks/`: every operator against eager PyTorch and torch's own best, on CUDA where there is one.

Prints a table, and writes the rows as JSON to the file that MVD_BENCH_JSON names. MVD_BENCH_SECONDS: how long a case
is timed (3 by default).
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest
import torch
from compare import Comparison, copy_peak, gemm_peak, table

from mvd_kernels._dispatch import extension

_session = Comparison(seconds_per_case=float(os.environ.get("MVD_BENCH_SECONDS", "3")))


@pytest.fixture
def compare() -> Comparison:
    torch.compiler.reset()  # else a function compiled for one case is compiled for any shape in the next one
    return _session


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    module = extension()[0]
    facts: dict[str, object] = {"torch": torch.__version__, "python": platform.python_version()}
    if _session.device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    else:
        facts |= {
            "device": f"{_processor()}, {torch.get_num_threads()} threads",
            "instruction set": module.isa_name() if module else "none: the C++ extension is not built",
        }
    for dtype in (torch.float32, torch.bfloat16):
        facts[f"GEMM peak {str(dtype).removeprefix('torch.')} GFLOP/s"] = round(
            gemm_peak(_session.device, dtype) / 1e9, 1
        )
    facts["copy GB/s"] = round(copy_peak(_session.device) / 1e9, 1)
    return facts


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _session.rows:
        return
    terminalreporter.section("measured on")
    facts = machine()
    for name, value in facts.items():
        terminalreporter.write_line(f"{name}: {value}")
    terminalreporter.section("medians; ratio = time of the side / time of ours in the same round")
    for line in table(_session.rows):
        terminalreporter.write_line(line)
    if path := os.environ.get("MVD_BENCH_JSON"):
        Path(path).write_text(json.dumps({"machine": facts, "rows": _session.as_json()}, indent=1))

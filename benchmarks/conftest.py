"""`pytest benchmarks/`, with pytest-benchmark: every operator against eager PyTorch and torch's own best.

A group of benchmarks is a case, a benchmark is a side of it. Of pytest-benchmark's options, those that choose how long
(`--benchmark-min-rounds`, `--benchmark-max-time`), `--benchmark-timer` and `--benchmark-disable-gc` hold for the rounds
in turn as well; with `--benchmark-disable` sides are checked and not timed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import DEVICE, Case, copy_peak, gemm_peak, phases_table, table
from less_work import RECIPES

from mvd_kernels._dispatch import extension

try:
    from pytest_benchmark.utils import load_timer
except ImportError:
    raise pytest.UsageError(
        "benchmarks/ needs pytest-benchmark: pip install pytest-benchmark -c constraints.txt"
    ) from None

BATCH = {"cpu": 2, "cuda": 16}[DEVICE]
ROWS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("step", "the whole training step (bench_step.py)")
    group.addoption("--config", default="vitb_from_vitb", help="JSON file or name of a recipe (%(default)s)")
    group.addoption("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change its settings")
    group.addoption("--batch", type=int, default=BATCH, help="clips of a step (%(default)s)")
    group.addoption(
        "--recipes", default="exact", help=f"comma-separated, or all: {', '.join(RECIPES)} (default: %(default)s)"
    )
    group.addoption("--data", metavar="LIST", help="a short list of clips to load beside the step, and to store")
    group.addoption("--fp32", action="store_true", help="also the yardstick in float32")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def compare(benchmark, pytestconfig: pytest.Config) -> Callable[[Case, str], None]:
    """Check a side of a case, time it in turn with the others, and give `benchmark` its rounds and figures."""
    option = pytestconfig.getoption

    def run(case: Case, side: str) -> None:
        def prepare() -> None:
            case.check(side)
            if benchmark.enabled:
                timer = load_timer(option("benchmark_timer")).target
                seconds = float(option("benchmark_max_time"))
                case.measure(option("benchmark_min_rounds"), seconds, timer, not option("benchmark_disable_gc"))

        benchmark.group = case.name
        benchmark.pedantic(case.sides[side].call, setup=prepare)  # what prepare raises leaves no timing
        if benchmark.enabled:
            benchmark.stats.stats.data[:] = case.rounds[side]
            benchmark.extra_info.update(case.figures(side))
            pytestconfig.stash[ROWS].append(benchmark.stats)

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """What the figures belong to; nothing in it changes between runs on one machine."""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if DEVICE == "cuda":
        return facts | {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    module = extension()[0]
    isa = module.isa_name() if module else "none: the C++ extension is not built"
    return facts | {"device": f"{_processor()}, {torch.get_num_threads()} threads", "instruction set": isa}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peaks() -> dict[str, float]:
    found = {f"GEMM {str(dtype)[6:]} GFLOP/s": gemm_peak(dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16)}
    return found | {"copy GB/s": copy_peak() / 1e9}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json["peaks"] = peaks()


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.stash[ROWS]:
        return
    terminalreporter.section("measured on")
    for name, value in pytest_benchmark_generate_machine_info().items():
        terminalreporter.write_line(f"{name}: {value}")
    terminalreporter.write_line("; ".join(f"{name} {value:.1f}" for name, value in peaks().items()))
    terminalreporter.section("medians; ratio: the reference's time / the side's in the same round")
    for line in (*table(config.stash[ROWS]), "", *phases_table(config.stash[ROWS])):
        terminalreporter.write_line(line)

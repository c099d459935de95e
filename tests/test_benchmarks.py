"""The harness of the benchmarks: what it refuses, what it counts, and that pytest-benchmark has all of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import MOST_ROUNDS, Case, Side, WrongResultError, flops_of, memory_of, table

KIB = 1024
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
X = torch.tensor([1.0, 2.0, -4.0])


@pytest.fixture(autouse=True)
def no_peaks(monkeypatch) -> None:
    """The machine's peaks are not measured."""
    monkeypatch.setattr("harness.gemm_peak", lambda dtype: {torch.float32: 1e12, torch.bfloat16: 4e12}[dtype])
    monkeypatch.setattr("harness.copy_peak", lambda: 1e10)
    monkeypatch.setattr("harness.DEVICE", "cpu")


def gives(*results: torch.Tensor):
    return lambda: results


# ---- checking ----


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [
        (gives(X + torch.tensor([0.0, 0.05, 0.0])), "result 0 of ours is 1.2e-02 off eager's; 1.0e-02 is accepted"),
        (gives(X * torch.tensor([1.0, torch.nan, 1.0])), "result 0 of ours is nan off eager's"),
        (gives(X[:2]), r"result 0 of ours is \[2\], of eager \[3\]"),
        (gives(X, X), "ours gives 2 results, eager 1"),
    ],
)
def test_a_side_with_a_wrong_result_is_not_timed(ours, sentence):
    case = Case("case", {"ours": ours, "eager": gives(X), "third": gives(X)}, tolerance=1e-2)
    with pytest.raises(WrongResultError, match=sentence):
        case.check("ours")
    case.check("third")
    case.measure(3, 0.0)
    assert case.rounds.keys() == {"eager", "third"}


def test_every_result_is_checked_and_each_side_by_its_own_tolerance():
    right, close = gives(X, X), gives(X + torch.tensor([0.0, 0.03, 0.0]), X)  # 0.03 / 4 is within 0.01
    sides = {"ours": right, "eager": right, "third": gives(X, 2 * X), "close": close, "strict": Side(close, 1e-3)}
    case = Case("case", sides, tolerance=1e-2)
    for good in ("ours", "eager", "close"):
        case.check(good)
    with pytest.raises(WrongResultError, match="result 1 of third"):
        case.check("third")
    with pytest.raises(WrongResultError, match="of strict is"):
        case.check("strict")


def test_a_side_that_raises_leaves_the_others():
    case = Case("case", {"ours": lambda: 1 / 0, "eager": gives(X)})
    case.check("eager")
    with pytest.raises(ZeroDivisionError):
        case.check("ours")


def test_facts_are_compared_instead_of_results():
    sides = {"ours": lambda: X, "eager": lambda: X.flip(0)}
    Case("sum", sides, facts=lambda x: [x.sum()]).check("ours")
    with pytest.raises(WrongResultError):
        Case("first", sides, facts=lambda x: [x[0]]).check("ours")


# ---- timing ----


def test_ratios_rates_and_goals(monkeypatch):
    """With a clock that says: ours 2 ms, then 4, the other one always three times that of the round."""
    calls: dict[str, int] = {}

    def clock(call, timer, number: int) -> float:
        calls[call.name] = calls.get(call.name, 0) + 1
        return (2e-3 if calls[call.name] % 2 else 4e-3) * call.factor

    class Timed(SimpleNamespace):
        def __call__(self) -> torch.Tensor:
            return X

    monkeypatch.setattr("harness.clock", clock)
    ours, eager = Timed(name="ours", factor=1), Timed(name="eager", factor=3)
    four = Side(Timed(name="four", factor=6), samples=4, flops=6e9, dtype=torch.bfloat16, more=lambda: {"own": 1})
    case = Case("products", {"ours": ours, "eager": eager, "four": four}, flops=6e9, goal=2.0, memory_goal=0.25)
    case.measure(10, 0.0)
    case.measure(10, 0.0)  # has been done
    assert calls == {"ours": 10, "eager": 10, "four": 10}
    mine, theirs, fours = (case.figures(side) for side in case.sides)
    assert (mine["ratio"], theirs["ratio"], fours["ratio"]) == (pytest.approx(3.0), 1.0, pytest.approx(2.0))
    assert (mine["GFLOP/s"], mine["share_of_peak"]) == (pytest.approx(2000), pytest.approx(2.0))
    assert (fours["share_of_peak"], fours["own"]) == (pytest.approx(1 / 12), 1)
    assert [(row["goal"], row["memory_goal"]) for row in (mine, theirs)] == [(2.0, 0.25), (None, None)]
    copies = Case("copies", {"ours": ours, "eager": eager}, bytes=6e6)
    copies.measure(10, 0.0)
    copied = copies.figures("ours")
    assert (copied["GFLOP/s"], copied["GB/s"], copied["share_of_peak"]) == (0, pytest.approx(2), pytest.approx(0.2))


def test_sides_alternate_and_the_time_is_that_of_the_call():
    order = []

    def sleeper(name: str, seconds: float):
        def side() -> torch.Tensor:
            order.append(name)
            time.sleep(seconds)
            return X

        return side

    case = Case("sleep", {"ours": sleeper("a", 0.001), "eager": sleeper("b", 0.01)})
    case.measure(6, 0.0)
    assert "".join(order[-12:]) == "baab" * 3
    assert min(case.rounds["ours"]) >= 0.001 and min(case.rounds["eager"]) >= 0.01


def test_rounds_end_with_the_time_or_their_number():
    quick = Case("quick", {"ours": gives(X), "eager": gives(X)})
    quick.measure(3, 1e9)
    assert len(quick.rounds["ours"]) == MOST_ROUNDS
    more = Case("more", {"ours": gives(X), "eager": gives(X)})
    more.measure(MOST_ROUNDS + 5, 0.0)
    assert len(more.rounds["ours"]) == MOST_ROUNDS + 5


def test_the_timer_is_read_around_all_calls_of_a_round():
    ticks = iter(range(1000))
    case = Case("timer", {"ours": gives(X), "eager": gives(X)}, calls=4)
    case.measure(3, 0.0, timer=lambda: next(ticks))
    assert case.rounds == {"ours": [0.25] * 3, "eager": [0.25] * 3}


@pytest.mark.parametrize(
    ("call", "temporary", "results"),
    [
        (lambda x: x + 1, 0, 256 * KIB),
        (lambda x: ((x + 1) * (x + 2)).sum(), 3 * 256 * KIB, 4),
        (lambda x: (x + 1)[:1], 256 * KIB, 4),  # a small view that keeps all memory of what it is a view of
        (lambda x: [x + 1, (x + 2) + 3], 256 * KIB, 2 * 256 * KIB),
        (lambda x: x, 0, 0),
    ],
)
def test_memory_of_known_allocations(call, temporary, results):
    x = torch.ones(256 * KIB // 4)
    memory = memory_of(lambda: call(x))
    assert memory.results == results
    assert memory.temporary == pytest.approx(temporary, abs=64)  # scalars are tensors too


def test_flops_of_products_on_the_meta_device():
    x, weight = torch.empty(2, 5, 3, device="meta", requires_grad=True), torch.empty(7, 3, device="meta")
    assert flops_of(lambda: x @ weight.T) == 2 * 2 * 5 * 3 * 7
    assert flops_of(lambda: torch.autograd.grad((x @ weight.T).sum(), x)) == 2 * (2 * 2 * 5 * 3 * 7)


def test_table():
    def row(side: str, seconds: float, **info: object) -> SimpleNamespace:
        common = {"goal": None, "memory_goal": None, "GB/s": 0.0}
        stats = SimpleNamespace(median=seconds)
        return SimpleNamespace(group="attention fwd", params={"side": side}, stats=stats, extra_info=common | info)

    mib = KIB * KIB
    ours = {"ratio": 2.0, "GFLOP/s": 250.0, "share_of_peak": 0.71, "temporary_bytes": 3 * mib, "result_bytes": mib // 2}
    sdpa = {"ratio": 1.0, "GFLOP/s": 0.0, "share_of_peak": None, "temporary_bytes": 0, "result_bytes": mib}
    rows = [row("ours", 0.0125, **ours, goal=2.5, memory_goal=0.25), row("SDPA", 0.025, **sdpa)]
    title, first, second = (" ".join(line.split()) for line in table(rows))
    assert title == "case side ms ratio goal GFLOP/s GB/s peak temporary results (MiB)"
    assert first == "attention fwd ours 12.500 2.00x 2.5 250.0 71% 3.0 0.5 at most 25% of the reference's temporary"
    assert second == "SDPA 25.000 1.00x 0.0 1.0"


def test_the_packages_import_nothing_of_the_benchmarks():
    names = "|".join(sorted(file.stem for file in BENCHMARKS.glob("*.py")))
    imports = re.compile(rf"^\s*(from|import) ({names}|benchmarks)\b|import_module\([\"'](bench|step)", re.MULTILINE)
    files = [file for folder in ("mvd_fast", "kernels") for file in (BENCHMARKS.parent / folder).rglob("*.py")]
    assert len(files) > 50 and not [str(file) for file in files if imports.search(file.read_text())]


# ---- under pytest-benchmark ----

BENCHMARK = """
import pytest
import torch
from harness import Case

X = torch.ones(4)
SIDES = {"ours": lambda: X * 2, "eager": lambda: X + X, "wrong": lambda: X * 3}


@pytest.fixture(scope="module", params=["first", "second"])
def case(request):
    return Case(f"double, {request.param}", SIDES, bytes=32)


@pytest.mark.parametrize("side", SIDES)
def test_double(compare, case, side):
    compare(case, side)
"""


@pytest.fixture
def benchmark_run(tmp_path):
    """Runs BENCHMARK with options of pytest-benchmark."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "bench_double.py").write_text(BENCHMARK)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:xdist", "-p", "no:cacheprovider"]
        paths = [str(BENCHMARKS), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": ""}
        command += ["--benchmark-min-rounds=7", "--benchmark-max-time=0", *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run


def test_json_groups_and_compare(benchmark_run, tmp_path):
    """Each side is a benchmark of its case's group; a wrong one fails and is in no file."""
    first = benchmark_run("--benchmark-json=first.json", "--benchmark-autosave")
    assert "2 failed, 4 passed" in first.stdout, first.stdout + first.stderr
    assert "WrongResultError: double, first: result 0 of wrong is 5.0e-01 off eager's" in first.stdout
    found = json.loads((tmp_path / "first.json").read_text())
    assert {(one["group"], one["params"]["side"]) for one in found["benchmarks"]} == {
        (f"double, {name}", side) for name in ("first", "second") for side in ("ours", "eager")
    }
    for one in found["benchmarks"]:
        assert len(one["stats"]["data"]) == 7  # the rounds in turn, not a call of pytest-benchmark's own
        assert one["extra_info"]["GB/s"] == pytest.approx(32 / one["stats"]["median"] / 1e9)
        assert one["params"]["side"] == "ours" or one["extra_info"]["ratio"] == 1.0
    assert found["machine_info"]["torch"] == torch.__version__ and found["peaks"]["copy GB/s"] > 0
    second = benchmark_run("--benchmark-compare", "-k", "not wrong")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "machine_info is different" not in second.stderr
    for text in ("'double, first': 4 tests", "test_double[first-ours] (NOW)", "test_double[first-ours] (0001"):
        assert text in second.stdout


def test_without_timing_sides_are_checked(benchmark_run):
    result = benchmark_run("--benchmark-disable", "--benchmark-json=none.json")
    assert "2 failed, 4 passed" in result.stdout and "GB/s" not in result.stdout

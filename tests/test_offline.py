"""The offline gate: which kernels it compiles, what it says of bad ones, and how it predicts times."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvd_kernels import _dispatch, _token_rows, offline, operators
from mvd_kernels._triton import Launch, record_launches, triton

DATA = Path(__file__).parent / "data"
COMMITTED = json.loads((DATA / "kernels_table.json").read_text())
ON_TRITON = [name for name in operators() if _dispatch._operators[name].triton]
GOOD = {"registers": 128, "shared": 1024, "spills": 0, "threads": 256}


@pytest.fixture(scope="module")
def launches() -> list[tuple[str, str, Launch]]:
    return list(offline.cases())


def outside_the_interpreter(*command: object, **variables: str) -> subprocess.CompletedProcess:
    """Run Python where kernels are compiled: here they are interpreted, where there is no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


# ---- what is compiled ----


@pytest.mark.parametrize("name", ON_TRITON)
def test_every_triton_operator_has_cases(launches, name):
    assert [case for operator, case, _ in launches if operator == name]


def test_every_kernel_is_in_a_case(launches):
    modules = [_token_rows, *(importlib.import_module(f"mvd_kernels.{name}") for name in ON_TRITON)]
    ours = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {offline.function_of(launch.kernel).__name__ for _, _, launch in launches} == ours


def test_launches_that_are_remembered_are_those_of_triton(tmp_path):
    result = outside_the_interpreter(DATA / "launches.py", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    launches, remembered = map(int, result.stdout.split())
    assert 0 < launches // 3 <= remembered < launches  # the third round at least


def test_the_table_has_exactly_what_is_launched():
    script = "from mvd_kernels.offline import *; print(*named_builds(list(cases())), sep='\\n')"
    result = outside_the_interpreter("-c", script)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == sorted(COMMITTED["kernels"]), "write the table anew"


@pytest.mark.parametrize(
    ("value", "specialise", "kind"),
    [
        (1, True, "constexpr"),
        (1, False, "i32"),
        (2**31 - 1, True, "i32"),
        (2**31, True, "i64"),
        (True, True, "constexpr"),
        (1.0, True, "fp32"),
        (torch.empty(1, dtype=torch.bfloat16), True, "*bf16"),
    ],
)
def test_arguments_are_typed_as_triton_does(value, specialise, kind):
    assert offline._type(value, specialise) == kind


# ---- what is wrong with a kernel ----


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"spills": 8}, "k spills 8 bytes on sm_90; use smaller blocks or more warps"),
        ({"shared": 227 * 1024 + 1}, "k needs 232449 bytes of shared memory on sm_90, which has 232448"),
        ({"registers": 255, "threads": 512}, "k needs 255 registers in 512 threads on sm_90"),
    ],
)
def test_what_no_table_excuses(changed, sentence):
    table = {"k": {"sm_90": GOOD | changed}}
    assert offline.problems(table, table, same_version=True) == [sentence]


def test_other_numbers_count_for_the_same_triton_only():
    name, targets = next(iter(COMMITTED["kernels"].items()))
    doctored = copy.deepcopy(COMMITTED["kernels"])
    doctored[name]["sm_90"]["registers"] += 1
    (problem,) = offline.problems(COMMITTED["kernels"], doctored, same_version=True)
    assert problem.startswith(f"{name} on sm_90 was {doctored[name]['sm_90']} and is {targets['sm_90']}; if that is")
    assert not offline.problems(COMMITTED["kernels"], doctored, same_version=False)


@pytest.mark.parametrize("same_version", [True, False])
def test_kernels_in_one_of_both_only(same_version):
    now, before = {"new": {"sm_80": GOOD}}, {"old": {"sm_80": GOOD}}
    assert offline.problems(now, before, same_version) == [
        "new is not in the table; write it anew",
        "old is in the table and not launched any more",
    ]


def test_the_program_on_a_kernel_that_spills(tmp_path):
    table = tmp_path / "table.json"
    script = DATA / "spilling_kernel.py"
    absent = outside_the_interpreter(script, table)
    assert (absent.returncode, absent.stderr) == (1, f"there is no table {table}; --update writes one\n")

    table.write_text(json.dumps({"made with": "triton 0", "kernels": {}}))
    result = outside_the_interpreter(script, table, "--workers", "1")
    first, second = result.stderr.splitlines()
    name = "__main__._spilling_kernel *fp32 BLOCK=32768 num_warps=1"
    assert first.startswith(f"{name} spills ") and first.endswith(" bytes on sm_80; use smaller blocks or more warps")
    assert second == f"{name} is not in the table; write it anew"
    assert result.stdout.endswith("1 kernels compiled for sm_80; 2 problems\n")
    assert result.returncode == 1

    updated = outside_the_interpreter(script, table, "--workers", "1", "--update")
    assert updated.returncode == 1  # the table is written, and the kernel spills all the same
    written = json.loads(table.read_text())
    assert written["made with"] == f"triton {triton.__version__}"
    assert written["kernels"][name]["sm_80"]["spills"] > 4 * 3 * 255  # bytes of what finds no register


def test_the_interpreter_is_refused(tmp_path):
    command = [sys.executable, "-m", "mvd_kernels.offline", str(tmp_path / "table.json")]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 1
    assert "leave TRITON_INTERPRET unset" in result.stderr


# ---- predicted times ----


def launch_of(dtype: torch.dtype, flops: float, moved: float) -> Launch:
    def kernel() -> None:
        """Has a name."""

    return Launch(kernel, (1,), (torch.empty(1, dtype=dtype, device="meta"),), {}, flops, moved)


@pytest.mark.parametrize(
    ("dtype", "flops", "moved", "seconds", "bound"),
    [
        (torch.bfloat16, 312e9, 2.039e9 / 2, 1e-3, "compute"),
        (torch.bfloat16, 312e9 / 2, 2.039e9, 1e-3, "memory"),
        (torch.float32, 52e9, 0, 1e-3, "compute"),
        (torch.int8, 624e9, 0, 1e-3, "compute"),
    ],
)
def test_the_roofline_of_an_a100(dtype, flops, moved, seconds, bound):
    predicted, bounded_by = offline.predicted(launch_of(dtype, flops, moved), offline.A100)
    assert predicted == pytest.approx(seconds)
    assert bounded_by == bound


def test_the_roofline_says_that_it_is_predicted():
    head, titles, line = offline.roofline([("op", "case", launch_of(torch.bfloat16, 989e9, 3.35e6))])
    assert head.startswith("predicted, not measured")
    assert titles.endswith("(predicted, not measured)")
    assert line.split() == ["op", "case", "kernel", "989000.0", "3.35", "295223.9", "3169.87", "1000.00", "compute"]


def test_grids_of_large_batches_fit():
    """CUDA takes 2^31 - 1 blocks along x, and 65535 along y: batches belong to x."""
    rows = torch.empty(70_000, 1, 384, device="meta")
    with record_launches() as launched:
        _token_rows.sum_rows(rows)
    assert [one.grid({"BLOCK": 128}) for one in launched] == [(70_000, 3), (1, 3)]


def test_work_of_launches_by_hand(launches):
    work = {(case, offline.function_of(one.kernel).__name__): (one.flops, one.bytes) for _, case, one in launches}
    rows, width = 2 * 1568, 768
    moved = 4 * rows * width * 2 + 2 * width * 2 + 2 * rows * 4  # x, branch, sum, normed; weight, bias; mean, rstd
    assert work["decoder 768 bfloat16 add", "_forward_kernel"] == (8 * rows * width, moved)
    rows = 2 * 1408
    moved = (3 * rows * width + width * width) * 2  # x, target, gradient; weight
    assert work["ViT-B bfloat16", "_loss_kernel"] == (2 * rows * width * width, moved)
    rows, values = 2 * 160, 3 * 2 * 16 * 16
    moved = rows * values + (width * values + 2 * rows * width) * 2  # bytes; weight; positions, tokens
    assert work["ViT-B bfloat16 bytes", "_embed_kernel"] == (2 * rows * values * width, moved)

"""The harness of the benchmarks: what it refuses, what it counts."""

from __future__ import annotations

import json
import time

import pytest
import torch
from compare import MIN_ROUNDS, Comparison, Row, WrongResultError, memory_of, table

KIB = 1024


@pytest.fixture
def compare(monkeypatch) -> Comparison:
    """The harness on the CPU, without measuring the machine's peaks."""
    monkeypatch.setattr("compare.gemm_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr("compare.copy_peak", lambda device: 1e10)
    return Comparison(device="cpu", seconds_per_case=0.0)


def gives(*results: torch.Tensor):
    return lambda: results


X = torch.tensor([1.0, 2.0, -4.0])


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [
        (gives(X + torch.tensor([0.0, 0.05, 0.0])), "result 0 of ours is 1.2e-02 off eager's; 1.0e-02 is accepted"),
        (gives(X * torch.tensor([1.0, torch.nan, 1.0])), "result 0 of ours is nan off eager's"),
        (gives(X[:2]), r"result 0 of ours is \[2\], of eager \[3\]"),
        (gives(X, X), "ours gives 2 results, eager 1"),
    ],
)
def test_a_side_with_a_wrong_result_is_not_timed(compare, ours, sentence):
    with pytest.raises(WrongResultError, match=sentence):
        compare("case", {"ours": ours, "eager": gives(X)}, tolerance=1e-2)
    assert compare.rows == []


def test_every_side_is_checked_and_every_result(compare):
    right = gives(X, X)
    with pytest.raises(WrongResultError, match="result 1 of third"):
        compare("case", {"ours": right, "eager": right, "third": gives(X, 2 * X)}, tolerance=1e-2)
    close = gives(X + torch.tensor([0.0, 0.03, 0.0]), X)  # 0.03 / 4 is within 0.01
    compare("case", {"ours": right, "eager": right, "third": close}, tolerance=1e-2)
    assert [row.side for row in compare.rows] == ["ours", "eager", "third"]


def test_facts_are_compared_instead_of_results(compare):
    sides = {"ours": lambda: X, "shuffled": lambda: X.flip(0)}
    compare("sum", sides, tolerance=0, facts=lambda x: [x.sum()])
    with pytest.raises(WrongResultError):
        compare("first", sides, tolerance=0, facts=lambda x: [x[0]])


def test_ratios_rates_and_goals(compare, monkeypatch):
    """With a clock that says: ours 2 ms, then 4, the other one always three times that of the round."""
    calls: dict[str, int] = {}

    def clock(side, device: str) -> float:
        calls[side.name] = calls.get(side.name, 0) + 1
        own = 2e-3 if calls[side.name] % 2 else 4e-3
        return own * side.factor

    class Timed:
        def __init__(self, name: str, factor: float) -> None:
            self.name, self.factor = name, factor

        def __call__(self) -> torch.Tensor:
            return X

    monkeypatch.setattr("compare.clock", clock)
    sides = {"ours": Timed("ours", 1), "eager": Timed("eager", 3)}
    ours, eager = compare("products", sides, tolerance=0, flops=6e9, goal=2.0, memory_goal=0.25)
    assert calls == {"ours": MIN_ROUNDS, "eager": MIN_ROUNDS}
    assert (ours.rounds, ours.seconds, ours.ratio) == (MIN_ROUNDS, pytest.approx(3e-3), 1.0)
    assert (eager.seconds, eager.ratio) == (pytest.approx(9e-3), pytest.approx(3.0))
    assert (ours.gflops, ours.share_of_peak) == (pytest.approx(2000), pytest.approx(2.0))
    assert (ours.goal, ours.memory_goal, eager.goal, eager.memory_goal) == (None, None, 2.0, 0.25)
    copied, _ = compare("copies", sides, tolerance=0, bytes=6e6)
    assert (copied.gflops, copied.gbytes, copied.share_of_peak) == (0, pytest.approx(2), pytest.approx(0.2))
    assert json.loads(json.dumps(compare.as_json()))[1]["goal"] == 2.0


def test_sides_alternate_and_the_time_is_that_of_the_call(compare):
    order = []

    def sleeper(name: str, seconds: float):
        def side() -> torch.Tensor:
            order.append(name)
            time.sleep(seconds)
            return X

        return side

    ours, slow = compare("sleep", {"ours": sleeper("a", 0.001), "slow": sleeper("b", 0.01)}, tolerance=0)
    assert "".join(order[-2 * MIN_ROUNDS :]) == "baab" * (MIN_ROUNDS // 2)
    assert ours.seconds >= 0.001
    assert slow.seconds >= 0.01
    assert slow.ratio > 1


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
    memory = memory_of(lambda: call(x), "cpu")
    assert memory.results == results
    assert memory.temporary == pytest.approx(temporary, abs=64)  # scalars are tensors too


def test_table():
    rows = [
        Row("attention fwd", "ours", 0.0125, 1.0, 250.0, 0.0, 0.71, 3 * KIB * KIB, KIB * KIB // 2),
        Row("attention fwd", "SDPA", 0.025, 2.0, 125.0, 0.0, 0.355, 0, KIB * KIB, goal=2.0, memory_goal=0.25),
    ]
    title, ours, sdpa = (" ".join(line.split()) for line in table(rows))
    assert title == "case side ms ratio goal GFLOP/s GB/s peak temporary results (MiB)"
    assert ours == "attention fwd ours 12.500 1.00x 250.0 71% 3.0 0.5"
    assert sdpa == "SDPA 25.000 2.00x 2 125.0 36% 0.0 1.0 ours at most 25% of this temporary"

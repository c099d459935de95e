"""Two or more ways to compute the same thing, timed against each other: interleaved, checked equal first.

No timing leaves this file without its result having been compared with the second side's. Ratios are medians over
rounds of the ratio within a round, so that what else the machine does falls on all sides alike. Memory is what torch's
allocator hands out: what NumPy, or a library inside an operator, takes for itself is not in it.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Side = Callable[[], Tensor | Iterable[Tensor]]
MIN_ROUNDS, MAX_ROUNDS = 10, 60


class WrongResultError(AssertionError):
    """A side does not compute what the second side computes."""


class Memory(NamedTuple):
    """Bytes that a call takes from torch's allocator beyond what was held before."""

    temporary: int
    """the most held at once, less the results: what the call needs beyond what it returns"""
    results: int
    """entries of what it returns, as far as they are new: a scalar in the storage of a matrix counts as a scalar"""


@dataclass(frozen=True)
class Row:
    """One side of one case."""

    case: str
    side: str
    seconds: float
    """median over rounds"""
    ratio: float
    """median over rounds of this side's time / the first side's in the same round: how much faster the first one is"""
    gflops: float
    gbytes: float
    share_of_peak: float | None
    """of the matrix product's rate if the case counts FLOP, else of the copy's bandwidth, both measured in this run"""
    temporary_bytes: int
    """largest memory held at once during the call beyond what was there before and what it returns"""
    result_bytes: int
    """memory of what the call returns; what it returns of its arguments is not counted"""
    goal: float | None = None
    """for the ratio of this side"""
    memory_goal: float | None = None
    """for temporary_bytes of the first side / of this side, at most"""
    rounds: int = 0
    device: str = ""


@dataclass
class Comparison:
    """The fixture `compare`; collects the rows of a session."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seconds_per_case: float = 3.0
    rows: list[Row] = field(default_factory=list)

    def __call__(
        self,
        case: str,
        sides: Mapping[str, Side],
        *,
        tolerance: float,
        flops: float = 0.0,
        bytes: float = 0.0,
        goal: float | None = None,
        memory_goal: float | None = None,
        dtype: torch.dtype | None = None,
        facts: Callable[..., Iterable[Tensor]] | None = None,
    ) -> list[Row]:
        """Check all sides against the second, time them in turn, keep and return a row for each.

        The first side is ours; `goal` is the ratio it should reach against the second, `memory_goal` the share of the
        second's temporary memory that it may need. Each side is one whole call that returns what is compared: outputs,
        gradients. `tolerance`: largest error / largest entry, per tensor. `flops` and `bytes` of one call; `dtype`
        (that of the first result, if not given) chooses the measured peak. `facts` takes what a side returns and gives
        what is compared instead, for sides that draw random numbers.

        Raises:
            WrongResultError: if a side's results are further than that from the second's; then nothing is timed.
        """
        results = {name: _tensors(facts(side()) if facts else side()) for name, side in sides.items()}
        ours, against = list(sides)[:2]
        for name in sides:
            if name != against:
                _check(case, name, results[name], against, results[against], tolerance)
        dtype = dtype or results[ours][0].dtype
        del results
        memory = {name: memory_of(side, self.device) for name, side in sides.items()}
        times = self._time(sides)
        peak = gemm_peak(self.device, dtype) if flops else copy_peak(self.device)
        rows = []
        for name, seconds in times.items():
            median = statistics.median(seconds)
            rate = (flops or bytes) / median
            rows.append(
                Row(
                    case,
                    name,
                    median,
                    statistics.median(theirs / own for theirs, own in zip(seconds, times[ours], strict=True)),
                    flops / median / 1e9,
                    bytes / median / 1e9,
                    rate / peak if rate else None,
                    memory[name].temporary,
                    memory[name].results,
                    goal if name == against else None,
                    memory_goal if name == against else None,
                    len(seconds),
                    self.device,
                )
            )
        self.rows += rows
        return rows

    def _time(self, sides: Mapping[str, Side]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in sides}
        started = time.perf_counter()
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() - started > self.seconds_per_case:
                break
            # Who goes first alternates, as the one after a long call finds other caches.
            order = list(sides.items())
            for name, side in order if number % 2 else reversed(order):
                times[name].append(clock(side, self.device))
        return times

    def as_json(self) -> list[dict]:
        return [asdict(row) for row in self.rows]


def clock(side: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = side()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def memory_of(side: Side, device: str) -> Memory:
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = _tensors(side())
        torch.cuda.synchronize()
        peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = _tensors(side())
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        sizes = list(itertools.accumulate((change for _, change in changes), initial=0))
        peak, held = max(sizes), sizes[-1]
    returned = min(held, sum(part.numel() * part.element_size() for part in results))
    return Memory(temporary=peak - returned, results=returned)


@functools.cache
def gemm_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of torch's matrix product, the best of what it reaches in `dtype` and in float32."""
    size = 8192 if device == "cuda" else 2048
    best = _gemm_rate(device, torch.float32, size, size)
    if dtype in (torch.bfloat16, torch.float16):
        rate = _gemm_rate(device, dtype, size // 8, size)
        if rate > best / 2:  # else the processor emulates the dtype, and all rows would take minutes
            rate = max(rate, _gemm_rate(device, dtype, size, size))
        best = max(best, rate)
    return best


def _gemm_rate(device: str, dtype: torch.dtype, rows: int, size: int) -> float:
    a, b = (torch.randn(count, size, device=device).to(dtype) for count in (rows, size))
    linear = functools.partial(torch.nn.functional.linear, a, b)
    linear()
    return 2 * rows * size**2 / min(clock(linear, device) for _ in range(9))


@functools.cache
def copy_peak(device: str) -> float:
    """Bytes/s of a copy that no cache holds, read and written."""
    source = torch.ones(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / min(clock(lambda: target.copy_(source), device) for _ in range(7))


def table(rows: Iterable[Row]) -> list[str]:
    """The rows as lines of text."""
    titles = (
        f"{'ms':>9} {'ratio':>7} {'goal':>5} {'GFLOP/s':>8} {'GB/s':>6} {'peak':>5} {'temporary':>9} {'results':>7}"
    )
    lines = [f"{'case':<58} {'side':<16} {titles}  (MiB)"]
    previous = ""
    for row in rows:
        lines.append(_line(row, row.case if row.case != previous else ""))
        previous = row.case
    return lines


def _line(row: Row, case: str) -> str:
    gflops, gbytes = (f"{value:.1f}" if value else "" for value in (row.gflops, row.gbytes))
    share = "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"
    goal = "" if row.goal is None else f"{row.goal:g}"
    memory_goal = "" if row.memory_goal is None else f"  ours at most {row.memory_goal:.0%} of this temporary"
    return (
        f"{case:<58} {row.side:<16} {row.seconds * 1e3:9.3f} {row.ratio:6.2f}x {goal:>5} {gflops:>8} {gbytes:>6} "
        f"{share:>5} {row.temporary_bytes / 2**20:9.1f} {row.result_bytes / 2**20:7.1f}{memory_goal}"
    )


def _tensors(result: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [part.detach() for part in ([result] if isinstance(result, Tensor) else result)]


def _check(case: str, name: str, actual: list[Tensor], against: str, expected: list[Tensor], tolerance: float) -> None:
    if len(actual) != len(expected):
        raise WrongResultError(f"{case}: {name} gives {len(actual)} results, {against} {len(expected)}")
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        which = f"{case}: result {number} of {name}"
        if ours.shape != theirs.shape:
            raise WrongResultError(f"{which} is {list(ours.shape)}, of {against} {list(theirs.shape)}")
        if not ours.numel():
            continue
        theirs = theirs.to(ours.device)  # a side of plain NumPy is on the CPU
        error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30)
        if not error <= tolerance:  # NaN is wrong too
            raise WrongResultError(f"{which} is {error:.1e} off {against}'s; {tolerance:.1e} is accepted")

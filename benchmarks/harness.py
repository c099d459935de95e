"""A case of a benchmark: the same thing computed in several ways, checked, then timed in turn.

pytest-benchmark times one function after another, so that whatever else the machine does falls on one of them. Here the
sides of a case take turns, and each side's test hands its rounds to its own `benchmark` (the fixture `compare` of
conftest.py). A ratio is a median over rounds of the ratio within a round. Memory is what torch's allocator hands out:
what NumPy, or a library inside an operator, takes for itself is not in it.
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_ROUNDS = 60

Call = Callable[[], Tensor | Iterable[Tensor]]


class WrongResultError(AssertionError):
    """A side does not compute what the reference computes."""


class Memory(NamedTuple):
    """Bytes that a call takes from torch's allocator beyond what was held before."""

    temporary: int
    """the most held at once, less the results: what the call needs beyond what it returns"""
    results: int
    """entries of what it returns, as far as they are new: a scalar in the storage of a matrix counts as a scalar"""


@dataclass(frozen=True)
class Side:
    """One way to compute a case: `call` is all of it and returns what is compared, outputs and gradients."""

    call: Call
    tolerance: float = 0.0
    """largest error / largest entry, per tensor"""
    flops: float = 0.0
    bytes: float = 0.0
    dtype: torch.dtype | None = None
    samples: int = 1
    """made by a call; ratios are per sample"""
    phases: Callable[[], dict[str, float]] = dict
    """seconds of parts of the calls since it was last asked"""
    more: Callable[[], dict[str, Any]] = dict
    """further entries of `extra_info`, once all rounds are done"""


@dataclass
class Case:
    """Sides, the first of which is ours, and what holds for all that are given as plain functions."""

    name: str
    sides: Mapping[str, Call | Side]
    tolerance: float = 0.0
    flops: float = 0.0
    """of one call: what has to be computed, however much a side computes"""
    bytes: float = 0.0
    """that one call has to read and write"""
    dtype: torch.dtype | None = None
    """chooses the measured peak; that of the reference's first result, if not given"""
    reference: str = "eager"
    """the side that the others are checked against, and that ratios are to"""
    goal: float | None = None
    """for the ratio of ours"""
    memory_goal: float | None = None
    """for our temporary memory / the reference's, at most"""
    facts: Callable[..., Iterable[Tensor]] | None = None
    """takes what a side returns and gives what is compared instead, for sides that draw random numbers"""
    calls: int = 1
    """in a round, for calls that take no longer than reading the clock"""
    timer: Callable[[], float] | None = None
    """in place of that of pytest-benchmark's options"""
    rounds: dict[str, list[float]] = field(init=False, default_factory=dict)
    """seconds of a call, by side"""

    def __post_init__(self) -> None:
        common = (self.tolerance, self.flops, self.bytes, self.dtype)
        self.sides = {name: one if isinstance(one, Side) else Side(one, *common) for name, one in self.sides.items()}

    # ---- checking ----

    def check(self, side: str) -> None:
        """Raises what is wrong with a side: WrongResultError, or whatever its call raised."""
        if side in self._wrong:
            raise self._wrong[side]

    @functools.cached_property
    def _wrong(self) -> dict[str, Exception]:
        torch.compiler.reset()  # else a function compiled for one case is compiled for any shape in the next one
        expected, found = self._results(self.reference), {}
        self.dtype = self.dtype or expected[0].dtype
        for name in self.sides:
            if name != self.reference:
                try:
                    self._compare(name, self._results(name), expected)
                except Exception as error:  # whatever it is: the other sides are timed all the same
                    found[name] = error
        return found

    def _results(self, side: str) -> list[Tensor]:
        result = self.sides[side].call()
        return _tensors(self.facts(result) if self.facts else result)

    def _compare(self, side: str, results: list[Tensor], expected: list[Tensor]) -> None:
        if len(results) != len(expected):
            sentence = f"{side} gives {len(results)} results, {self.reference} {len(expected)}"
            raise WrongResultError(f"{self.name}: {sentence}")
        accepted = self.sides[side].tolerance
        for number, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
            which = f"{self.name}: result {number} of {side}"
            if ours.shape != theirs.shape:
                raise WrongResultError(f"{which} is {list(ours.shape)}, of {self.reference} {list(theirs.shape)}")
            if not ours.numel():
                continue
            theirs = theirs.to(ours.device).double()  # a side of plain NumPy is on the CPU
            error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
            if not error <= accepted:  # NaN is wrong too
                raise WrongResultError(f"{which} is {error:.1e} off {self.reference}'s; {accepted:.1e} is accepted")

    # ---- timing ----

    def measure(
        self, at_least: int, seconds: float, timer: Callable[[], float] = time.perf_counter, collect: bool = True
    ) -> None:
        """Time all right sides in turn, unless that has been done: `at_least` rounds, and `seconds` for each side.

        collect: Python's garbage may be collected meanwhile.
        """
        if self.rounds:
            return
        right = [name for name in self.sides if name not in self._wrong]
        self._memory = {name: memory_of(self.sides[name].call) for name in right}
        for name in right:
            self.sides[name].phases()  # of the calls before
        self._phases: dict[str, list[dict[str, float]]] = {name: [] for name in right}
        rounds: dict[str, list[float]] = {name: [] for name in right}
        with ExitStack() as stack:
            if not collect and gc.isenabled():
                gc.disable()
                stack.callback(gc.enable)
            started = time.perf_counter()
            for number in range(max(at_least, MOST_ROUNDS)):
                if number >= at_least and time.perf_counter() - started > seconds * len(right):
                    break
                # Who goes first alternates, as the one after a long call finds other caches.
                for name in right if number % 2 else reversed(right):
                    rounds[name].append(clock(self.sides[name].call, self.timer or timer, self.calls))
                    self._phases[name].append(self.sides[name].phases())
        self.rounds = rounds

    def figures(self, name: str) -> dict[str, Any]:
        """`extra_info` of a side whose rounds are done."""
        side, seconds, memory = self.sides[name], statistics.median(self.rounds[name]), self._memory[name]
        peak = gemm_peak(side.dtype or self.dtype) if side.flops else copy_peak()
        rate = (side.flops or side.bytes) / seconds
        ours, phases = name == next(iter(self.sides)), self._phases[name]
        return {
            "ratio": self.ratio(name),
            "goal": self.goal if ours else None,
            "GFLOP/s": side.flops / seconds / 1e9,
            "GB/s": side.bytes / seconds / 1e9,
            "share_of_peak": rate / peak if rate else None,
            "temporary_bytes": memory.temporary,
            "memory_goal": self.memory_goal if ours else None,
            "result_bytes": memory.results,
            "samples": side.samples,
            "phases": {part: statistics.median(one[part] for one in phases) for part in phases[0]},
            "device": DEVICE,
            **side.more(),
        }

    def ratio(self, name: str) -> float:
        """How much faster than the reference a side is: median over rounds of the reference's time / the side's."""
        side, reference = self.sides[name], self.sides[self.reference]
        pairs = zip(self.rounds[self.reference], self.rounds[name], strict=True)
        return statistics.median(theirs / own for theirs, own in pairs) * side.samples / reference.samples


def clock(call: Callable[[], object], timer: Callable[[], float] = time.perf_counter, calls: int = 1) -> float:
    """Seconds of one call, the device's work included. On a GPU its cache holds nothing of the call before."""
    if DEVICE == "cuda":
        _flush_cache()
        torch.cuda.synchronize()
    start = timer()
    for _ in range(calls):
        result = call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    seconds = (timer() - start) / calls
    del result
    return seconds


@functools.cache
def _cache_buffer() -> Any:
    from triton.runtime import driver

    return driver.active.get_empty_cache_for_benchmark()


def _flush_cache() -> None:
    """As triton.testing.do_bench does."""
    _cache_buffer().zero_()


def flops_of(call: Callable[[], object]) -> float:
    """FLOP of a call on tensors of the meta device: of its matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def memory_of(call: Call) -> Memory:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = _tensors(call())
        torch.cuda.synchronize()
        peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = _tensors(call())
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        sizes = list(itertools.accumulate((change for _, change in changes), initial=0))
        peak, held = max(sizes), sizes[-1]
    returned = min(held, sum(part.numel() * part.element_size() for part in results))
    return Memory(temporary=peak - returned, results=returned)


def _tensors(result: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [part.detach() for part in ([result] if isinstance(result, Tensor) else result)]


# ---- the machine ----


@functools.cache
def gemm_peak(dtype: torch.dtype) -> float:
    """FLOP/s of torch's matrix product, the best of what it reaches in `dtype` and in float32."""
    size = 8192 if DEVICE == "cuda" else 2048
    best = _gemm_rate(torch.float32, size, size)
    if dtype in (torch.bfloat16, torch.float16):
        rate = _gemm_rate(dtype, size // 8, size)
        if rate > best / 2:  # else the processor emulates the dtype, and all rows would take minutes
            rate = max(rate, _gemm_rate(dtype, size, size))
        best = max(best, rate)
    return best


def _gemm_rate(dtype: torch.dtype, rows: int, size: int) -> float:
    a, b = (torch.randn(count, size, device=DEVICE).to(dtype) for count in (rows, size))
    linear = functools.partial(torch.nn.functional.linear, a, b)
    linear()
    return 2 * rows * size**2 / min(clock(linear) for _ in range(9))


@functools.cache
def copy_peak() -> float:
    """Bytes/s of a copy that no cache holds, read and written."""
    source = torch.ones(2**30 if DEVICE == "cuda" else 2**28, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return 2 * source.numel() / min(clock(lambda: target.copy_(source)) for _ in range(7))


# ---- the table ----


def table(rows: Iterable[Any]) -> list[str]:
    """Lines of text. rows: `benchmark.stats` of the sides, in order."""
    lines = [
        f"{'case':<58} {'side':<20} {'ms':>9} {'ratio':>7} {'goal':>5} {'GFLOP/s':>8} {'GB/s':>6} {'peak':>5} "
        f"{'temporary':>9} {'results':>7}  (MiB)"
    ]
    previous = None
    for row in rows:
        info = row.extra_info
        gflops, gbytes = (f"{info[unit]:.1f}" if info[unit] else "" for unit in ("GFLOP/s", "GB/s"))
        share = "" if info["share_of_peak"] is None else f"{info['share_of_peak']:.0%}"
        goal = "" if info["goal"] is None else f"{info['goal']:.2g}"
        memory = f"  at most {info['memory_goal']:.0%} of the reference's temporary" if info["memory_goal"] else ""
        lines.append(
            f"{row.group if row.group != previous else '':<58} {row.params['side']:<20} {row.stats.median * 1e3:9.3f} "
            f"{info['ratio']:6.2f}x {goal:>5} {gflops:>8} {gbytes:>6} {share:>5} "
            f"{info['temporary_bytes'] / 2**20:9.1f} {info['result_bytes'] / 2**20:7.1f}{memory}"
        )
        previous = row.group
    return lines


def phases_table(rows: Iterable[Any]) -> list[str]:
    """Of the sides that give phases, or what their loaders take: seconds."""
    rows = [row for row in rows if row.extra_info["phases"]]
    names = dict.fromkeys(name for row in rows for name in row.extra_info["phases"])
    alone = [name for name in ("loading alone", "reading alone") if any(name in row.extra_info for row in rows)]
    lines = [f"{'side':<28} {'samples':>7} " + " ".join(f"{name:>14}" for name in (*names, *alone))] if rows else []
    for row in rows:
        seconds = row.extra_info["phases"] | {name: row.extra_info.get(name) for name in alone}
        cells = ("" if seconds.get(name) is None else f"{seconds[name]:.4f}" for name in (*names, *alone))
        side = f"{row.params['side']:<28} {row.extra_info['samples']:>7} "
        lines.append(side + " ".join(f"{cell:>14}" for cell in cells))
    return lines

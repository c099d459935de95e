"""What a run says while it goes: JSONL, TensorBoard, time per phase, share of the machine's peak."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvd_fast.config.run import RunConfig
from mvd_fast.files import write_text
from mvd_fast.models.frozen import DTYPES
from mvd_fast.tasks import Task

from . import launch
from .progress import ProgressLine


def measure_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a square matrix product in `dtype`: the best of a few runs, what the machine can reach.

    size: of the matrices' sides, at most. A product that takes a tenth of a second is large enough: CPUs without bf16
    arithmetic would need minutes for larger ones.
    """
    limit = size or (2048 if device.type == "cpu" else 8192)
    for side in (side for side in (limit // 8, limit // 4, limit // 2, limit) if side):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = float("inf")
        for _ in range(4):
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            best = min(best, time.perf_counter() - start)
        if best > 0.1:
            break
    return 2.0 * side**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PhaseTimer:
    """Seconds spent in named phases since the last `collect`.

    On CUDA phases are bracketed by events, read only when collected; on the CPU by the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._mark()
        with torch.profiler.record_function(name):
            yield
        self._spans.append((name, start, self._mark()))

    def watch(self, name: str, module: nn.Module) -> None:
        """Times every forward pass of a module."""
        starts: list[Any] = []
        module.register_forward_pre_hook(lambda *_: starts.append(self._mark()))
        module.register_forward_hook(lambda *_: self._spans.append((name, starts.pop(), self._mark())))

    def collect(self) -> dict[str, float]:
        """Seconds per phase; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            totals[name] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        self._spans.clear()
        return dict(totals)


class LossWindow:
    """Losses since the last log line, summed on the device; a checkpoint carries them over an interruption."""

    def __init__(self, step: int = 0) -> None:
        self._open(step)

    def _open(self, step: int) -> None:
        self.first = step  # steps done when the window opened
        self.sums: dict[str, Tensor] = {}  # of this rank, over micro batches
        self._opened = time.perf_counter()

    def start_clock(self) -> None:
        """The steps begin now, not when the window was made."""
        self._opened = time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Adds one micro batch's losses, scalars."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def close(self, step: int) -> tuple[int, dict[str, float], float]:
        """(steps, the ranks' mean sums, seconds that the window was open); opens the next one (collective)."""
        found = step - self.first, self._over_ranks(), time.perf_counter() - self._opened
        self._open(step)
        return found

    def _over_ranks(self) -> dict[str, float]:
        """The ranks' mean sums, fetched from the device in one go (collective)."""
        if not self.sums:
            return {}
        return dict(zip(self.sums, launch.mean(torch.stack(list(self.sums.values()))).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint (collective)."""
        return {"first": self.first, "sums": self._over_ranks()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Goes on with a window that a checkpoint holds: `first`, and the ranks' mean `sums`."""
        self.first = state["first"]
        self.sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}


class RunLog:
    """JSONL and TensorBoard, both cut back to `start_step` when a run resumes, so that no step is told twice."""

    def __init__(self, run_dir: Path, start_step: int, tensorboard: bool) -> None:
        self.path = run_dir / "log.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= start_step]
            write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 - open for the whole run
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """One line of JSONL; its numbers (one level of nesting) to TensorBoard."""
        self._file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in _numbers(record):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line cut short by a crash: dropped


def _numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, value


class Metrics:
    """What a run measures: losses, phases and rates; in `log.jsonl`, TensorBoard and a progress bar.

    Every rank measures; rank 0 writes and shows.
    """

    def __init__(self, config: RunConfig, task: Task, grad_accum_steps: int, device: torch.device) -> None:
        self.config, self.grad_accum_steps, self.device = config, grad_accum_steps, device
        self.window, self.timer = LossWindow(), PhaseTimer(device)
        self._flops = task.flops().step
        for name, network in {"forward": task.network, **task.frozen()}.items():
            self.timer.watch(name, network)
        self._log: RunLog | None = None
        self._peak = 0.0

    @contextmanager
    def open(self, run_dir: Path, step: int, total_steps: int) -> Iterator[None]:
        """For as long as the run goes on, from `step` steps done."""
        leads = launch.rank() == 0
        if leads:
            self._log = RunLog(run_dir, step, self.config.log.tensorboard)
            self._peak = measure_peak(self.device, DTYPES[self.config.precision])
        try:
            with ProgressLine(self.config.name, total_steps, step, enabled=leads) as self.progress:
                self.window.start_clock()
                yield
        finally:
            if self._log:
                self._log.close()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times what is done inside."""
        return self.timer.phase(name)

    def write(self, record: dict[str, Any]) -> None:
        """One line of the log."""
        if self._log:
            self._log.write(record)

    def log(self, step: int, epoch: float, facts: dict[str, Any]) -> None:
        """One record: losses are means over the steps since the last one, over micro batches and ranks (collective).

        epoch: done so far. facts: of this step, such as the learning rate.
        """
        steps, sums, seconds = self.window.close(step)
        phases = self.timer.collect()
        clips = steps * self.config.clips_per_step
        record = {
            "step": step,
            "epoch": epoch,
            **{name: value / (steps * self.grad_accum_steps) for name, value in sums.items()},
            "clips_per_second": clips / seconds,
            "data_wait_share": phases.get("data", 0.0) / seconds,
            "seconds": seconds,
            "phase_seconds": phases,
            **facts,
        }
        if self._log:
            record["model_flop_utilisation"] = clips / launch.world_size() * self._flops / seconds / self._peak
            record["peak_flops"] = self._peak
            self._log.write(record)
        self.progress.advance(_notes(record))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint (collective)."""
        return self.window.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window.load_state_dict(state, self.device)


def _notes(record: dict[str, Any]) -> list[str]:
    """Of a step, the most important first."""
    losses = [f"{name} {value:.4f}" for name, value in record.items() if name.startswith("loss")]
    rate = record["clips_per_second"]
    pace = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
    return [*losses[:1], f"{pace} clips/s", f"data wait {record['data_wait_share']:.0%}", *losses[1:]]

"""`--profile`: a trace of a few steps, and a GPU's memory snapshot, in the run folder."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from mvd_fast.files import written_aside

from . import launch

WARM_UP, STEPS = 3, 3
SNAPSHOT_ENTRIES = 200_000  # allocations and frees that a memory snapshot goes back


class Profiler:
    """Records `STEPS` steps after `WARM_UP`, earlier where fewer are left; each rank writes files of its own.

    `trace-rank0.json.gz` opens in https://ui.perfetto.dev, `memory-rank0.pickle` (GPUs only) in
    https://pytorch.org/memory_viz.
    """

    def __init__(
        self, run_dir: Path, device: torch.device, steps_left: int, enabled: bool, say: Callable[[str], None]
    ) -> None:
        """say: takes one line, when the files are written."""
        self.folder, self._device, self._say = run_dir / "profile", device, say
        self._wait = max(0, min(WARM_UP, steps_left - STEPS)) if enabled and steps_left else None  # None: not again
        self._trace: torch.profiler.profile | None = None
        self._recorded = 0

    def __enter__(self) -> Profiler:
        self._start_if_due()
        return self

    def step(self) -> None:
        """After each training step."""
        if self._trace is not None:
            self._trace.step()
            self._recorded += 1
            if self._recorded == STEPS:
                self._finish()
        elif self._wait:
            self._wait -= 1
            self._start_if_due()

    def __exit__(self, *_: object) -> None:
        if self._trace is not None:
            self._finish()

    def _start_if_due(self) -> None:
        if self._wait != 0:
            return
        self._wait = None
        kinds = torch.profiler.ProfilerActivity
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=SNAPSHOT_ENTRIES)
        self._trace = torch.profiler.profile(
            activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])], record_shapes=True, profile_memory=True
        )
        self._trace.start()

    def _finish(self) -> None:
        trace, self._trace = self._trace, None
        trace.stop()
        name = f"rank{launch.rank()}"
        with written_aside(self.folder / f"trace-{name}.json.gz") as aside:
            trace.export_chrome_trace(str(aside))
        if self._device.type == "cuda":
            with written_aside(self.folder / f"memory-{name}.pickle") as aside:
                aside.write_bytes(pickle.dumps(torch.cuda.memory._snapshot(), protocol=4))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._say(f"profile of {self._recorded} steps: {self.folder}")

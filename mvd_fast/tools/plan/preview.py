"""`train --dry-run`: what the first step would need is read, counted and loaded, and nothing is trained."""

from __future__ import annotations

import time

import psutil
import torch
from torch import Tensor

from mvd_fast.training import messages
from mvd_fast.training.prepare import Prepared

from .dry_run import step_bytes, task_without_memory
from .memory import count_parameters, input_bytes, peak_bytes, state_bytes, teacher_bytes


def preview(run: Prepared) -> None:
    """Says what would be trained, one batch of this rank, and the memory that a rank will need.

    Raises UserError where no batch can be made of the files.
    """
    messages.say(f"mvd-fast: {run.config.name}, dry run", *messages.outline(run, ""))
    began = time.perf_counter()
    try:
        batch = next(run.loader.batches(0))
    finally:
        run.loader.close()
    seconds = time.perf_counter() - began
    rows = {
        "one batch": f"in {seconds:.1f} s, {run.loader.replaced} of {len(batch['index'])} samples replaced",
        **{f"  {name}": _described(value) for name, value in batch.items() if name != "index"},
        "memory": f"{_size(memory_bytes(run, batch))} per rank (predicted), of {_there(run)}",
    }
    messages.say(*messages.aligned(rows), "mvd-fast: dry run: nothing was trained")


def memory_bytes(run: Prepared, batch: dict[str, Tensor]) -> float:
    """The most that a rank will hold, as `mvd-fast plan` predicts it; batch: one micro batch."""
    config = run.config
    task = task_without_memory(config)
    state = state_bytes(
        config, *count_parameters(task.network), config.zero_stage, run.place.world_size, run.grad_accum_steps
    )
    activations = step_bytes(config, run.micro_batch_size, batch).peak
    return peak_bytes(state, activations, teacher_bytes(task) + input_bytes(config, run.micro_batch_size))


def _described(value: Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.")
    shape = " x ".join(map(str, value.shape))
    if value.dtype == torch.bool:
        return f"{kind} {shape}, {value.float().mean():.1%} set"
    return f"{kind} {shape}, {value.min():.4g} to {value.max():.4g}" if value.numel() else f"{kind} {shape}"


def _there(run: Prepared) -> str:
    if run.device.type == "cuda":
        return f"{_size(torch.cuda.get_device_properties(run.device).total_memory)} of the GPU"
    return f"{_size(psutil.virtual_memory().total)} of the machine for all its ranks"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

"""What a run says on the terminal at its start and at its end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvd_fast.config.run import RunConfig
from mvd_fast.files import BEST, CONFIG, SUMMARY, WEIGHTS
from mvd_fast.machine import cpu_name
from mvd_fast.names import printable

from .progress import time_left

if TYPE_CHECKING:
    import torch

    from .prepare import Prepared


def say(*lines: str) -> None:
    """To stderr, at once."""
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()


# ---- the start ----


def opening(config: RunConfig, ranks: int) -> str:
    """The first line, before anything slow is done."""
    return f"mvd-fast: {config.name} in {config.output_dir}, starting {_ranks(ranks)} ..."


def outline(run: Prepared, start: str) -> list[str]:
    """What is about to be trained, on what, for how long. start: where from."""
    config, ranks, names = run.config, run.place.world_size, run.class_names
    what, samples = config.data.files, config.request.samples
    masks = f", {samples} masks each" if samples > 1 else ""
    parts = f"micro batch {run.micro_batch_size} x accumulation {run.grad_accum_steps} x {_ranks(ranks)}"
    rows = {
        "data": f"{len(run.loader.paths):,} {what} of {config.data.train}{masks}",
        "classes": f"{len(names)}, {printable(names[0])} to {printable(names[-1])}" if names else "",
        "ranks": f"{ranks} on {device_name(run.device)}; {config.precision}, ZeRO {config.zero_stage}",
        "network": f"{config.task}, {run.trained_parameters / 1e6:.3g} M parameters trained",
        **config.inputs(),
        "batch": f"{config.batch.size} = {parts}",
        "schedule": f"{config.optim.epochs} epochs of {run.steps_per_epoch:,} steps: {run.total_steps:,} steps",
        "start": start,
    }
    return aligned(rows)


def device_name(device: torch.device) -> str:
    """Of a rank's device; for a CPU also why it is one."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    why = "DS_ACCELERATOR says so" if torch.cuda.is_available() else "torch sees no GPU"
    return f"the CPU ({cpu_name()}), as {why}"


def start_of(config: RunConfig, checkpoint: Path | None, step: int, per_epoch: int) -> str:
    """Where a run starts from."""
    if checkpoint:
        return f"resumed at step {step:,}, epoch {step / per_epoch:.2f}, from {checkpoint}"
    return config.start


# ---- the end ----


def finished(config: RunConfig, steps: int, seconds: float, best: dict[str, Any]) -> list[str]:
    """After the schedule's last step; seconds: since this start."""
    return [f"mvd-fast: finished: {steps:,} steps; this start took {time_left(seconds)}", *_results(config, best)]


def stopped(config: RunConfig, step: int, steps: int) -> list[str]:
    """After a signal."""
    rows = {"saved": config.output_dir, "next": "the same command goes on from there"}
    return [f"mvd-fast: stopped after step {step:,} of {steps:,}", *aligned(rows)]


def finished_before(config: RunConfig) -> list[str]:
    """Of a run whose folder holds the finished run of this very config; empty where there is something to do."""
    folder = Path(config.output_dir)
    summary, saved = _read(folder / SUMMARY), _read(folder / CONFIG)
    wanted = config.model_dump(mode="json")
    same = {**saved, "run_dir": ""} == {**wanted, "run_dir": ""}
    if not (summary.get("finished") and same and (folder / WEIGHTS).is_file()):
        return []
    return [
        f"mvd-fast: {folder} is finished: {summary['step']:,} of {summary['steps']:,} steps",
        *_results(config, summary.get("best", {})),
        *aligned({"anew": "give another folder: --run-dir FOLDER"}),
    ]


def _results(config: RunConfig, best: dict[str, Any]) -> list[str]:
    folder = Path(config.output_dir)
    found = f"{folder / BEST}, top-1 {best['top1']:.2%} after epoch {best['epoch']}" if best else ""
    return aligned({"weights": str(folder / WEIGHTS), "best": found, "next": config.next_command(config.output_dir)})


# ---- text ----


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def aligned(rows: dict[str, str]) -> list[str]:
    """Indented lines `name  text`; rows without text are left out."""
    return [f"  {name:10}{text}" for name, text in rows.items() if text]


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def complain(error: Exception, rank: int, ranks: int) -> None:
    """A user's error, on one rank where it is the same on all."""
    everywhere = getattr(error, "everywhere", False) or ranks == 1
    if rank == 0 or not everywhere:
        say(f"mvd-fast: error{'' if everywhere else f' (rank {rank})'}: {error}")

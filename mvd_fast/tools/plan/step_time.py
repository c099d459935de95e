"""Seconds of a step by phase: the slowest of arithmetic, memory and starting kernels; nothing overlaps but decoding.

Rates come from one measured step (`gpus.MEASURED`): its teachers, whose products are large, give the share of the
matrix product's rate that large work reaches; its student, whose products are small, gives the time that starting the
kernels of a block takes, below which no smaller work goes.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvd_fast.config.run import RunConfig
from mvd_fast.models.layers import Block
from mvd_fast.tasks import Task

from .gpus import GPUS, GPUS_PER_MACHINE, MEASURED, Gpu

# The measured step: FLOP of one clip of each phase, and blocks of its student (12, and 2 in each decoder).
MEASURED_TEACHER_FLOP = 641.5e9
MEASURED_BLOCKS = 16
MEASURED_PARAMETERS = 116.9e6

# AdamW on bf16 weights, bytes a parameter: reads gradient, master and moments (2 + 4 + 8), makes a float32 gradient and
# reads it (4 + 4), writes master, moments and weight (4 + 8 + 2).
UPDATE_BYTES = 36

LARGE_WORK_SHARE = MEASURED_TEACHER_FLOP * MEASURED.samples / MEASURED.teachers / MEASURED.peak
REACHED_OF_PUBLISHED = MEASURED.peak / (GPUS[MEASURED.gpu].tflops_bf16 * 1e12)
FORWARD_LAUNCH = MEASURED.forward / MEASURED_BLOCKS
BACKWARD_LAUNCH = MEASURED.backward / MEASURED_BLOCKS
UPDATE_SHARE = UPDATE_BYTES * MEASURED_PARAMETERS / MEASURED.optimiser / (GPUS[MEASURED.gpu].memory_gb_s * 1e9)


@dataclass(frozen=True)
class Phase:
    """Seconds of one step on one GPU, and what they are limited by."""

    name: str
    seconds: float
    limit: str  # arithmetic, memory, kernel launches, links
    work: str  # how the seconds were found


def flop_by_phase(task: Task, config: RunConfig) -> dict[str, float]:
    """FLOP of one clip's training step. They add up to `task.flops().step`, and recomputed blocks come on top."""
    flops = task.flops()
    forward = sum(flops.trained.values())
    frozen = {title.replace("_", " "): flop for title, flop in flops.frozen.items()}
    return {**frozen, **flops.trained, "backward": (3 if config.model.activation_checkpointing else 2) * forward}


def phases(
    task: Task,
    config: RunConfig,
    gpu: Gpu,
    ranks: int,
    stage: int,
    micro: int,
    accumulation: int,
    share: float | None,
    network_gb_s: float,
) -> list[Phase]:
    """The phases of one step. `share`: of the published peak that arithmetic reaches, None: as measured."""
    published = (gpu.tflops_bf16 if config.precision == "bf16" else gpu.tflops_fp32) * 1e12
    share = LARGE_WORK_SHARE * REACHED_OF_PUBLISHED if share is None else share
    clips = micro / config.request.samples
    found = []
    for name, flop in flop_by_phase(task, config).items():
        busy, started = flop * clips / (published * share), launch_seconds(task, config, name)
        limit = "arithmetic" if busy >= started else "kernel launches"
        work = f"{flop * clips / 1e12:.3g} TFLOP at {published * share / 1e12:.0f} TFLOP/s; launches {started:.3g} s"
        found.append(Phase(name, accumulation * max(busy, started), limit, work))
    trained = sum(p.numel() for p in task.network.parameters() if p.requires_grad)
    moved = UPDATE_BYTES * trained / (ranks if stage else 1)
    rate = UPDATE_SHARE * gpu.memory_gb_s * 1e9
    found.append(Phase("optimiser", moved / rate, "memory", f"{moved / 1e9:.3g} GB at {rate / 1e9:.0f} GB/s"))
    if ranks > 1:
        found.append(_communication(config, gpu, ranks, stage, trained, accumulation, network_gb_s))
    return found


def launch_seconds(task: Task, config: RunConfig, name: str) -> float:
    """Below which a micro batch's phase does not go: blocks x measured seconds to start one block's kernels."""
    if name != "backward" and name not in task.flops().trained:
        return 0.0  # frozen: the measured teachers were limited by arithmetic
    total = sum(isinstance(module, Block) for module in task.network.modules())
    encoder = config.model.depth
    blocks = {"student encoder": encoder, "student decoders": total - encoder}.get(name, total)
    if name != "backward":
        return blocks * FORWARD_LAUNCH
    again = FORWARD_LAUNCH if config.model.activation_checkpointing else 0.0
    return blocks * (BACKWARD_LAUNCH + again)


def _communication(
    config: RunConfig, gpu: Gpu, ranks: int, stage: int, trained: int, accumulation: int, network_gb_s: float
) -> Phase:
    """A ring sends (n - 1) / n of the data once for a reduce-scatter or an all-gather, and twice for an all-reduce."""
    width = 2 if config.precision == "bf16" else 4
    reduced = accumulation if stage >= 2 else 1  # times a step
    gathered = 2 * accumulation if stage == 3 else 1  # ZeRO 0's second half of an all-reduce counts as a gather
    sent = (reduced + gathered) * width * trained * (ranks - 1) / ranks
    rate, where = (network_gb_s, "network") if ranks > GPUS_PER_MACHINE else (gpu.link_gb_s, "links")
    return Phase("communication", sent / (rate * 1e9), where, f"{sent / 1e9:.3g} GB at {rate:.0f} GB/s, not overlapped")

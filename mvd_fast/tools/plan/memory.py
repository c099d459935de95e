"""Bytes of weights, gradients and optimiser state on one rank, by ZeRO stage, as DeepSpeed 0.19 and `engine` hold them.

DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs` and its like) assume fp16 with fp32 copies of the
gradients and know neither this engine's optimiser nor its frozen tables; they are not used. These rules agree with what
two CPU ranks hold (tests/test_planning.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mvd_fast.config.run import RunConfig
from mvd_fast.tasks import Task
from mvd_fast.training.adamw import BUCKET

MOMENTS = 8  # bytes a parameter: exp_avg and exp_avg_sq, float32
FP32 = 4

# DeepSpeed's defaults (`zero_optimization`).
DEFAULTS = {"reduce_bucket_size": 500_000_000, "stage3_max_live_parameters": 1_000_000_000}


@dataclass(frozen=True)
class StateBytes:
    """Of one rank. All parts are there at once in a backward pass, but for `step`, which the step takes on top."""

    weights: float  # in the precision of the run, frozen tables included
    masters: float  # float32 copies of the weights, where the weights are not float32
    moments: float
    gradients: float
    buckets: float  # what DeepSpeed reserves to sum gradients in
    gathered: float  # other ranks' weights that a layer needs (ZeRO 3), at most
    step: float

    @property
    def resident(self) -> float:
        """What is held over steps, and the gradients."""
        return self.weights + self.masters + self.moments + self.gradients

    @property
    def during_backward(self) -> float:
        return self.resident + self.buckets + self.gathered

    @property
    def during_step(self) -> float:
        return self.resident + self.step


def teacher_bytes(task: Task) -> int:
    """Of the weights and tables of frozen networks."""
    networks = task.frozen().values()
    found = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def input_bytes(config: RunConfig, micro: int) -> float:
    """Of micro batches of clips, float32 and in the run's precision, for each batch prepared ahead."""
    asked = config.request
    rows = micro // asked.samples * asked.rows
    return 4.0 * rows * 3 * asked.num_frames * asked.image_size**2 * (1 + config.data.prefetch)


def peak_bytes(state: StateBytes, activations: float, beside: float) -> float:
    """The most that one rank holds; activations: of forward and backward; beside: teachers and inputs."""
    return beside + max(state.during_backward + activations, state.during_step)


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """(trained, frozen) parameters."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in network.parameters()) - trained


def state_bytes(config: RunConfig, trained: int, frozen: int, stage: int, ranks: int, accumulation: int) -> StateBytes:
    """Of a network with so many trained and frozen parameters, on each of `ranks` ranks under ZeRO `stage`."""
    half, accumulates = config.precision == "bf16", accumulation > 1
    width = 2 if half else FP32
    zero = {**DEFAULTS, **config.deepspeed.get("zero_optimization", {})}
    part = trained / ranks  # of what a stage partitions
    if stage == 0:
        # Many micro batches are summed in float32 where weights are bf16 (adamw.GradientSums).
        sums = FP32 * trained if half and accumulates else 0
        gradients = max(width * trained, sums) if half else FP32 * trained
        masters = FP32 * trained if half else 0
        step = FP32 * min(BUCKET, trained) if half else 0
        return StateBytes(width * (trained + frozen), masters, MOMENTS * trained, gradients, 0, 0, step)
    # An fp32 run has masters, too: DeepSpeed's optimiser works on a flat float32 copy of its partition.
    masters, moments = FP32 * part, MOMENTS * part
    summed = FP32 if accumulates else width  # bytes of a summed gradient
    # Stage 1 sums whole gradients until the step's last micro batch, and keeps what backward makes beside the sums.
    whole = FP32 + (width if half else 0)
    gradients = whole * trained if stage == 1 and accumulates else summed * part
    bucket = zero["reduce_bucket_size"] * (FP32 if stage == 1 and accumulates else width)
    doubled = zero.get("overlap_comm", False) and stage < 3
    step = FP32 * part if summed != FP32 else 0
    if stage < 3:
        weights, gathered = width * (trained + frozen), 0
    else:
        weights = width * (trained + frozen) / ranks
        gathered = width * min(trained + frozen, zero["stage3_max_live_parameters"]) * (1 - 1 / ranks)
    return StateBytes(weights, masters, moments, gradients, bucket * (2 if doubled else 1), gathered, step)

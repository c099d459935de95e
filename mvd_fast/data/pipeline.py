"""The DALI pipeline: inputs from the source -> decoded, cropped, normalised pixels and tube masks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode, Pipeline

from mvd_fast.config.run import Masks
from mvd_fast.data import dali_plugin
from mvd_fast.data.datasets import Dataset
from mvd_fast.data.inputs import Inputs
from mvd_fast.data.source import Sample, to_columns

Reader = Callable[[int], list[Sample]]  # iteration of the pipeline, from 0 -> its samples

MASK_STRIDE = 2**30  # more than any list is long
PIPELINE_DEPTH = 2  # batches inside the pipeline: one is read while the one before is decoded

# Types and dimensions of what `to_columns` gives, in its order.
DTYPES = (types.UINT8, types.INT32, types.UINT8, types.BOOL, types.INT32, types.INT32, types.INT32, types.INT64)
NDIMS = (1, 1, 4, 0, 1, 0, 2, 1)
LAYOUTS = ("", "", "FHWC", "", "", "", "", "")


@dataclass(frozen=True)
class PipelineSpec:
    """What a pipeline is built from, apart from its source."""

    dataset: Dataset
    batch: int  # clips
    threads: int
    device: torch.device
    masks: Masks | None = None

    @property
    def dali_device(self) -> str:
        return "gpu" if self.device.type == "cuda" else "cpu"


def build_pipeline(spec: PipelineSpec, reader: Reader) -> Pipeline:
    """A built pipeline whose `run()` gives (pixels, numbers, ...); see `outputs_to_torch`."""
    dali_plugin.load_plugin()

    def source(iteration: int) -> tuple[list, ...]:  # out here: DALI rewrites what is defined inside a pipeline
        return to_columns(reader(iteration))

    pipeline = _define(
        spec,
        source,
        batch_size=spec.batch,
        num_threads=spec.threads,
        device_id=(spec.device.index or 0) if spec.dali_device == "gpu" else None,
        prefetch_queue_depth=PIPELINE_DEPTH,
        enable_conditionals=True,
        set_affinity=False,
        exec_dynamic=True,
    )
    pipeline.build()
    return pipeline


@pipeline_def
def _define(spec: PipelineSpec, source: Callable[[int], tuple[list, ...]]):
    *fields, numbers = fn.external_source(
        source=source,
        num_outputs=len(DTYPES),
        batch=True,
        dtype=list(DTYPES),
        ndim=list(NDIMS),
        layout=list(LAYOUTS),
    )
    inputs = Inputs(*fields)
    pixels = spec.dataset.graph(inputs, spec.dali_device)
    outputs = [pixels, numbers]
    if spec.masks is not None:
        mask = _masks(numbers, spec.masks)
        outputs.append(mask.gpu() if spec.dali_device == "gpu" else mask)
    # Outputs only because DALI warns of inputs that a graph does not use: images have no frames to choose, and most
    # datasets no operations.
    return (*outputs, inputs.frames, inputs.operations)


def _masks(numbers: DataNode, asked: Masks) -> DataNode:
    """bool [N], or [masks, N]: mask m is that of sample number index + m * MASK_STRIDE, the first the only one's."""
    masks = [dali_plugin.tube_mask(_shifted(numbers, m), asked.grid, asked.ratio) for m in range(asked.per_clip)]
    return fn.stack(*masks) if asked.per_clip > 1 else masks[0]


def _shifted(numbers: DataNode, mask: int) -> DataNode:
    if mask == 0:
        return numbers
    step = fn.cast(types.Constant([0, 0, mask]), dtype=types.INT64)  # constants have 32 bits
    return numbers + step * MASK_STRIDE


def outputs_to_torch(outputs: tuple, spec: PipelineSpec) -> dict[str, torch.Tensor]:
    """One `run()`'s outputs as tensors on the device: pixels and, where it is asked for, `mask` bool [B, N], or
    [B, masks, N] of several; on the CPU `numbers` int64 [B, 3].

    On the CPU nothing is copied: the dynamic executor hands each run's buffers over for good. On a GPU DALI reuses a
    buffer as soon as Python lets go of it, which may be before torch's stream has read it: there they are copies.
    """
    names = [spec.dataset.output, "numbers", *(["mask"] if spec.masks else [])]
    found = {name: torch.from_dlpack(output.as_tensor()) for name, output in zip(names, outputs, strict=False)}
    if spec.dali_device == "gpu":
        found = {name: tensor if name == "numbers" else tensor.clone() for name, tensor in found.items()}
        torch.cuda.current_stream(spec.device).synchronize()
    return found


def failing_samples(spec: PipelineSpec, samples: list[Sample]) -> dict[int, str]:
    """Which samples the pipeline fails on: dataset position -> reason. Found by halving, a fresh pipeline each time."""
    reason = _failure(replace(spec, batch=len(samples)), samples)
    if reason is None:
        return {}
    if len(samples) == 1:
        return {samples[0].choice.key.index: reason}
    middle = len(samples) // 2
    return failing_samples(spec, samples[:middle]) | failing_samples(spec, samples[middle:])


def _failure(spec: PipelineSpec, samples: list[Sample]) -> str | None:
    try:
        build_pipeline(spec, lambda iteration: samples).run()
    except RuntimeError as error:
        return _short_reason(str(error))
    return None


def _short_reason(message: str) -> str:
    """The sentence inside DALI's report, which names source lines and stack frames around it."""
    patterns = (r'Assert on ".*?" failed: *(.*)', r"encountered:\s+(?:\[[^]]*\] )?(.*)", r"\] (.*)")
    found = next(filter(None, (re.search(pattern, message) for pattern in patterns)), None)
    return (found.group(1) if found else message.splitlines()[0]).strip().rstrip(".")

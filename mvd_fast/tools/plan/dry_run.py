"""A training step of the real task on tensors without memory: what it would allocate, in bytes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mvd_fast.config.run import RunConfig
from mvd_fast.models.frozen import DTYPES
from mvd_fast.tasks import Task, build_task


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a forward and backward pass of some samples takes beyond weights and inputs."""

    kept: int  # after the forward pass: what backward needs
    peak: int  # the most at any moment of forward and backward, gradients left out


def task_without_memory(config: RunConfig) -> Task:
    """The run's task on the meta device: all shapes, no weights; in the run's precision."""
    with torch.device("meta"):
        task = build_task(config.as_written())
    task.network.to(DTYPES[config.precision])
    return task.train()


def step_bytes(config: RunConfig, samples: int, like: Mapping[str, torch.Tensor] | None = None) -> StepBytes:
    """What one micro batch of `samples` samples allocates; like: one as the loader gives it.

    Operators run as torch's fake tensors on a CPU: shapes and dtypes are the real ones, values are never computed. The
    CPU's operators keep for backward what the CUDA ones keep; a kernel's own scratch memory is not seen.
    """
    task = task_without_memory(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        task.to_empty(device="cpu")
        parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
        batch = _batch(config, samples) if like is None else _copied(like, DTYPES[config.precision])
        held, beside = LiveBytes([*task.parameters(), *task.buffers(), *batch.values()]), 0
        with held:
            batch = next(task.batches(iter([batch]), torch.device("cpu")))
            beside = held.peak  # of what is prepared beside the step: as much again, at the worst moment
            loss = task.loss(task.network, batch)["loss"]
            kept = held.live
            for parameter in parameters:  # gradients go as they come: they are counted with the state
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
            loss.backward()
    return StepBytes(kept, held.peak + beside)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _copied(batch: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Without memory; pixels in the run's precision."""
    return {
        name: torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }


def _batch(config: RunConfig, samples: int) -> dict[str, torch.Tensor]:
    """A micro batch as the loader gives it."""
    asked, dtype = config.request, DTYPES[config.precision]
    clips = samples // asked.samples
    rows, side = clips * asked.rows, asked.image_size
    batch: dict[str, torch.Tensor] = {}
    if "image" in asked.gives:
        batch["image"] = torch.empty(rows, 3, side, side, dtype=dtype)
    if "video" in asked.gives:
        batch["video"] = torch.empty(rows, 3, asked.num_frames, side, side, dtype=dtype)
    if asked.masks:
        tokens, several = math.prod(asked.masks.grid), (asked.samples,) if asked.samples > 1 else ()
        batch["mask"] = torch.ones((clips, *several, tokens), dtype=torch.bool)
    if "labels" in asked.gives:
        batch["target"] = torch.empty(rows, asked.num_classes or 1)
    if "boxes" in asked.gives:  # one of each clip
        batch |= {"boxes": torch.empty(rows, 4), "box_clip": torch.arange(rows)}
        batch["labels"] = torch.empty(rows, asked.num_classes or 1)
    for name, width in config.stored_widths().items():
        batch[f"target_{name}"] = torch.empty(clips, config.model.num_tokens, width, dtype=dtype)
    return batch


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still there (`live`), and the most of them (`peak`).

    `known`: tensors that were there before and are not counted. torch's own MemTracker counts the same, by module, but
    refuses modules whose outputs need no gradient, such as frozen teachers.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        weakref.finalize(storage, self._forget, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, size: int) -> None:
        self.live -= size

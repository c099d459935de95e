"""A training step of the real objective on tensors without memory: what it would allocate, in bytes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mvd_fast.config import RunConfig
from mvd_fast.objectives import build_objective
from mvd_fast.teachers import DTYPES


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a forward and backward pass of some samples takes beyond weights and inputs."""

    kept: int  # after the forward pass: what backward needs
    peak: int  # the most at any moment of forward and backward, gradients left out


def objective_without_memory(config: RunConfig) -> nn.Module:
    """The run's objective on the meta device: all shapes, no weights; in the run's precision."""
    as_written = config.teachers.model_copy(update={"compile": False})
    fresh = config.model.model_copy(update={"init": ""})
    with torch.device("meta"):
        objective = build_objective(config.model_copy(update={"teachers": as_written, "model": fresh}))
    objective.model.to(DTYPES[config.precision])
    return objective.train()


def step_bytes(config: RunConfig, samples: int, like: Mapping[str, torch.Tensor] | None = None) -> StepBytes:
    """What one micro batch of `samples` samples allocates; like: one as the loader gives it, for any objective.

    Operators run as torch's fake tensors on a CPU: shapes and dtypes are the real ones, values are never computed. The
    CPU's operators keep for backward what the CUDA ones keep; a kernel's own scratch memory is not seen.
    """
    objective = objective_without_memory(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        objective.to_empty(device="cpu")
        parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        batch = _batch(config, samples) if like is None else _copied(like, DTYPES[config.precision])
        held, beside = LiveBytes([*objective.parameters(), *objective.buffers(), *batch.values()]), 0
        with held:
            if config.teachers.ahead:
                batch = objective.taught(batch)
                beside = held.peak  # as much again for the next batch's teachers, at the worst moment
            loss = objective(batch)["loss"]
            kept = held.live
            for parameter in parameters:  # gradients go as they come: they are counted with the state
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
            loss.backward()
    return StepBytes(kept, held.peak + beside)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _copied(batch: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Without memory; pixels in the run's precision."""
    return {
        name: torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }


def _batch(config: RunConfig, samples: int) -> dict[str, torch.Tensor]:
    """A micro batch as the loader gives it."""
    model, masks, dtype = config.model, config.data.masks_per_clip, DTYPES[config.precision]
    clips = samples // masks
    frames, height, width = model.grid
    tokens = frames * height * width
    mask = torch.ones((clips, tokens) if masks == 1 else (clips, masks, tokens), dtype=torch.bool)
    side = model.image_size
    if model.num_frames == 1:
        return {"image": torch.empty(clips, 3, side, side, dtype=dtype), "mask": mask}
    batch = {"video": torch.empty(clips, 3, model.num_frames, side, side, dtype=dtype), "mask": mask}
    if config.teachers.cache.path:
        for role in ("image", "video"):
            width = getattr(config.teachers, role).embed_dim
            batch[f"target_{role}"] = torch.empty(clips, tokens, width, dtype=dtype)
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

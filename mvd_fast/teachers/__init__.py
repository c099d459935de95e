"""Frozen teachers. One file per kind; `teachers.*.kind` in a config names the file whose `build` makes it.

`build(config, model)` returns a module in eval mode with `image_size`, `embed_dim`, `flops()` and a forward that gives
one feature per token of the student: images [B, 3, H, W] -> [B, H' W', C] in the image role, clips
[B, 3, T, H, W] -> [B, N, C] in the video role. `network(config, model)` returns it before its weights are loaded.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch
from torch import nn

from mvd_fast.config import ModelConfig, Precision, TeacherConfig, TeacherPrecision
from mvd_fast.models.frozen import FrozenLinear
from mvd_kernels import Linear8bit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_teacher(config: TeacherConfig, model: ModelConfig, precision: Precision = "fp32") -> nn.Module:
    """The teacher with its weights loaded, in its own precision or else in `precision`, eval mode, no gradients.

    Under `torch.device("meta")`, where there is no memory to load weights into, no checkpoint is read.
    """
    kind = import_module(f"mvd_fast.teachers.{config.kind}")
    make = kind.network if torch.get_default_device().type == "meta" else kind.build
    teacher = make(config, model).eval().requires_grad_(False)
    return to_precision(teacher, config.precision or precision)


def compile_teacher(teacher: nn.Module) -> None:
    """From its first call on the forward pass is compiled as one graph; on a GPU it is replayed as a CUDA graph, whose
    results are copied before the next call overwrites them. Another batch size is compiled anew."""
    compiled = torch.compile(teacher.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    teacher.forward = lambda pixels: compiled(pixels).clone()


def to_precision(teacher: nn.Module, precision: TeacherPrecision) -> nn.Module:
    """The frozen teacher in `precision`; 8 bits are for its blocks' linear layers, the rest is bf16 then."""
    plain = precision in DTYPES
    make = FrozenLinear.from_linear if plain else partial(Linear8bit.from_linear, format=precision)
    for module in list(teacher.modules()):
        if hasattr(module, "freeze"):
            module.freeze(make)
    return teacher.to(DTYPES[precision] if plain else torch.bfloat16)

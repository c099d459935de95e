"""Frozen networks: their precision, and on a CPU oneDNN's own order of the weights, with GELU in the product."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd_fast.config.base import TeacherPrecision
from mvd_kernels import Linear8bit

from .layers import frozen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def to_precision(network: nn.Module, precision: TeacherPrecision) -> nn.Module:
    """The frozen network in `precision`; 8 bits are for its blocks' linear layers, the rest is bf16 then."""
    plain = precision in DTYPES
    make = FrozenLinear.from_linear if plain else partial(Linear8bit.from_linear, format=precision)
    for module in list(network.modules()):
        if hasattr(module, "freeze"):
            module.freeze(make)
    return network.to(DTYPES[precision] if plain else torch.bfloat16)


def compile_frozen(network: nn.Module) -> None:
    """From its first call on the forward pass is compiled as one graph; on a GPU it is replayed as a CUDA graph, whose
    results are copied before the next call overwrites them. Another batch size is compiled anew."""
    compiled = torch.compile(network.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    network.forward = lambda pixels: compiled(pixels).clone()


class FrozenLinear(nn.Module):
    """A linear layer without gradients, and the exact GELU of it if `gelu`; made from a layer by `from_linear`.

    For bf16 on a CPU that multiplies it, the weight is kept in the order in which oneDNN reads it (else it is brought
    into that order at every call), and GELU is taken of the fp32 sums before they are rounded. Anywhere else, and where
    x requires a gradient, it is `F.linear` and `F.gelu`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> None:
        super().__init__()
        self.weight = frozen(weight.detach())  # [D, C]; None while `_packed` stands for it
        self.register_parameter("bias", None if bias is None else frozen(bias.detach()))
        self.gelu = gelu
        self._packed: Tensor | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str | None = None) -> FrozenLinear:
        """The layer on the same memory. `activation`: None or "gelu"."""
        return cls(linear.weight, linear.bias, activation == "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., D] in the dtype of x."""
        if self._packs(x):
            activation = ("gelu", [], "none") if self.gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self._pack(x), self.bias, *activation)
        self._unpack()
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if self.gelu else y

    def _packs(self, x: Tensor) -> bool:
        return (
            type(x) is Tensor  # what stands for one, as in a dry run, knows no such product
            and not torch.compiler.is_compiling()
            and x.device.type == "cpu"
            and x.dtype == torch.bfloat16
            and (self._packed is not None or self.weight.dtype == torch.bfloat16)
            and x.numel() > 0
            and not (x.requires_grad and torch.is_grad_enabled())
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def _pack(self, x: Tensor) -> Tensor:
        """The weight in the order that suits as many rows as x has; any number is computed with it."""
        if self._packed is None:
            rows = x.numel() // x.shape[-1]
            self._packed, self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows), None
        return self._packed

    def _unpack(self) -> None:
        if self._packed is not None:
            self.weight, self._packed = frozen(self._packed.to_dense()), None

    # Whoever moves, copies or saves the layer finds a plain weight.

    def _apply(self, *arguments: Any, **options: Any) -> FrozenLinear:
        self._unpack()
        return super()._apply(*arguments, **options)

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._unpack()
        super()._save_to_state_dict(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        self._unpack()
        return self.__dict__.copy()

"""add_layer_norm against the addition and layer_norm of eager PyTorch and of torch.compile: memory is what it costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_kernels import add_layer_norm

EPS = 1e-6
# Rows (two clips, all tokens; eight clips, the visible ones) and width of ViT-B, S, L and H.
SHAPES = [(2, 1568, 768), (8, 160, 384), (8, 160, 1024), (8, 160, 1280)]
# Shape, dtype, whether there is a drop-path scale.
CASES = [(SHAPES[0], dtype, drop) for dtype in ("bf16", "fp32") for drop in (False, True)]
CASES += [(shape, "bf16", False) for shape in SHAPES[1:]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Eager PyTorch sums the gradients of bf16 weights in bf16 on the CPU, so that they are off by some percent; the tests
# hold ours against float64.
TOLERANCE = {"bf16": 0.2, "fp32": 1e-4}


def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    total = x + (branch if scale is None else branch * scale.to(x.dtype)[:, None, None])
    return total, F.layer_norm(total, weight.shape, weight, bias, EPS)


def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x, branch, weight, bias, EPS, scale)


@pytest.mark.parametrize(("shape", "dtype", "drop_path"), CASES)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
def test_add_layer_norm(compare, shape, dtype, drop_path, backward):
    torch.manual_seed(0)
    x, branch, grad_sum, grad_normed = (torch.randn(shape, device=compare.device).to(DTYPES[dtype]) for _ in range(4))
    weight, bias = (torch.randn(shape[-1], device=compare.device).to(DTYPES[dtype]) for _ in range(2))
    leaves = [leaf.requires_grad_(backward) for leaf in (x, branch, weight, bias)]
    scale = (torch.arange(shape[0], device=compare.device) % 2 * 1.25) if drop_path else None
    compiled = torch.compile(eager, fullgraph=True)

    def side(function):
        def call() -> list[Tensor]:
            results = function(*leaves, scale)
            if not backward:
                return list(results)
            return [*results, *torch.autograd.grad(results, leaves, (grad_sum, grad_normed))]

        return call

    # Forward: x, branch -> sum, normed. Backward: both gradients, sum -> gradient of the sum, times scale for branch.
    passes = 4 + (4 + drop_path if backward else 0)
    name = f"{x.numel() // shape[-1]}x{shape[-1]} {dtype}"
    compare(
        f"add_layer_norm {'fwd+bwd' if backward else 'fwd'} {name}{' drop path' if drop_path else ''}",
        {"ours": side(ours), "eager": side(eager), "torch.compile": side(compiled)},
        bytes=passes * x.numel() * x.element_size(),
        tolerance=TOLERANCE[dtype],
        goal=2.0 if backward and shape == SHAPES[0] and dtype == "bf16" else None,
    )

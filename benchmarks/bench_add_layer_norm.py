"""add_layer_norm against the addition and layer_norm of eager PyTorch and of torch.compile: memory is what it costs."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, Case
from torch import Tensor

from mvd_kernels import add_layer_norm
from mvd_kernels.shapes import RECIPES, TOKENS, VISIBLE

EPS = 1e-6
# ViT-B's decoders on two clips, and the encoders of the others on eight.
SHAPES = [(2, TOKENS, RECIPES["ViT-B"].decoder_width)]
SHAPES += [(8, VISIBLE, RECIPES[name].width) for name in ("ViT-S", "ViT-L", "ViT-H")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Shape, dtype, whether there is a drop-path scale.
INPUTS = [(SHAPES[0], dtype, drop) for dtype in ("bf16", "fp32") for drop in (False, True)]
INPUTS += [(shape, "bf16", False) for shape in SHAPES[1:]]
CASES = {
    f"{way} {shape[0] * shape[1]}x{shape[2]} {dtype}{' drop path' if drop else ''}": (way, shape, dtype, drop)
    for way, (shape, dtype, drop) in product(("fwd", "fwd+bwd"), INPUTS)
}
# Eager PyTorch sums the gradients of bf16 weights in bf16 on the CPU, so that they are off by some percent; the tests
# hold ours against float64.
TOLERANCE = {"bf16": 0.2, "fp32": 1e-4}


def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    total = x + (branch if scale is None else branch * scale.to(x.dtype)[:, None, None])
    return total, F.layer_norm(total, weight.shape, weight, bias, EPS)


def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x, branch, weight, bias, EPS, scale)


SIDES = {"ours": ours, "eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    way, shape, dtype, drop_path = CASES[request.param]
    backward = way == "fwd+bwd"
    torch.manual_seed(0)
    x, branch, grad_sum, grad_normed = (torch.randn(shape, device=DEVICE).to(DTYPES[dtype]) for _ in range(4))
    weight, bias = (torch.randn(shape[-1], device=DEVICE).to(DTYPES[dtype]) for _ in range(2))
    leaves = [leaf.requires_grad_(backward) for leaf in (x, branch, weight, bias)]
    scale = (torch.arange(shape[0], device=DEVICE) % 2 * 1.25) if drop_path else None

    def call(function) -> list[Tensor]:
        results = function(*leaves, scale)
        return [*results, *(torch.autograd.grad(results, leaves, (grad_sum, grad_normed)) if backward else ())]

    # Forward: x, branch -> sum, normed. Backward: both gradients, sum -> gradient of the sum, times scale for branch.
    passes = 4 + (4 + drop_path if backward else 0)
    return Case(
        f"add_layer_norm {request.param}",
        {name: lambda function=function: call(function) for name, function in SIDES.items()},
        bytes=passes * x.numel() * x.element_size(),
        tolerance=TOLERANCE[dtype],
        goal=2.0 if backward and shape == SHAPES[0] and dtype == "bf16" else None,
    )


@pytest.mark.parametrize("side", SIDES)
def test_add_layer_norm(compare, case, side):
    compare(case, side)

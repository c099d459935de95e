"""linear_smooth_l1 as MVD's step uses it: two heads on the masked tokens, targets gathered out of all tokens.

Eager is nn.Linear, the gather of the teacher's features and smooth_l1_loss in float32.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, Case, flops_of
from torch import Tensor

from mvd_kernels import linear_smooth_l1, tube_mask
from mvd_kernels.shapes import GRID, MASK_RATIO, RECIPES, TOKENS

CLIPS = {"cpu": 2, "cuda": 32}[DEVICE]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {f"{recipe} {dtype}": (recipe, dtype) for dtype, recipe in product(DTYPES, ("ViT-B", "ViT-L"))}
# bf16: eager rounds every prediction, so that differences from the target near 0 and near beta, and with them their
# gradients, are off by 2^-9 of the prediction, and sums the gradient of the bias in bf16.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def eager(xs, weights, biases, targets, index: Tensor) -> list[Tensor]:
    losses = []
    for x, weight, bias, target in zip(xs, weights, biases, targets, strict=True):
        wanted = target.gather(1, index[:, :, None].expand(-1, -1, target.shape[2]))
        losses.append(F.smooth_l1_loss(F.linear(x, weight, bias).float(), wanted.float()))
    return losses


def make(recipe: str, dtype: torch.dtype, device: str) -> tuple:
    torch.manual_seed(0)
    depth, width = RECIPES[recipe].decoder_width, RECIPES[recipe].target_width
    index = tube_mask(0, 0, torch.arange(CLIPS), GRID, MASK_RATIO).masked.to(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    xs = [normal(*index.shape, depth).requires_grad_() for _ in range(2)]
    weights = [normal(width, depth).mul(depth**-0.5).requires_grad_() for _ in range(2)]
    biases = [normal(width).mul(0.1).requires_grad_() for _ in range(2)]
    return xs, weights, biases, [normal(len(index), TOKENS, width) for _ in range(2)], index


def call(function, arguments: tuple) -> tuple[Tensor, ...]:
    xs, weights, biases, *_ = arguments
    losses = function(*arguments)
    return (*losses, *torch.autograd.grad(sum(losses), (*xs, *weights, *biases)))


SIDES = {"ours": linear_smooth_l1, "eager": eager, "torch.compile": torch.compile(eager)}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    recipe, dtype = CASES[request.param]
    arguments = make(recipe, DTYPES[dtype], DEVICE)
    width, depth = arguments[1][0].shape
    return Case(
        f"linear_smooth_l1 fwd+bwd 2 heads {depth}->{width} {CLIPS} clips {dtype}",
        {name: lambda function=function: call(function, arguments) for name, function in SIDES.items()},
        flops=flops_of(lambda: call(eager, make(recipe, DTYPES[dtype], "meta"))),
        dtype=DTYPES[dtype],
        tolerance=TOLERANCE[dtype],
        goal=1.3,
        memory_goal=0.25,
    )


@pytest.mark.parametrize("side", SIDES)
def test_linear_smooth_l1(compare, case, side):
    compare(case, side)

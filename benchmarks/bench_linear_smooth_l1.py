"""linear_smooth_l1 as MVD's step uses it: two heads on the masked tokens, targets gathered out of all 1568.

Eager is nn.Linear, the gather of the teacher's features and smooth_l1_loss in float32; ViT-B's two decoders have heads
768 -> 768 (the image teacher's width), ViT-L's 512 -> 1024.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_kernels import linear_smooth_l1, tube_mask

CLIPS = {"cpu": 2, "cuda": 32}
HEADS = {"B": (768, 768), "L": (512, 1024)}  # widths of input and target
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# bf16: eager rounds every prediction, so that differences from the target near 0 and near beta, and with them their
# gradients, are off by 2^-9 of the prediction, and sums the gradient of the bias in bf16.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def eager(xs, weights, biases, targets, index: Tensor) -> list[Tensor]:
    losses = []
    for x, weight, bias, target in zip(xs, weights, biases, targets, strict=True):
        wanted = target.gather(1, index[:, :, None].expand(-1, -1, target.shape[2]))
        losses.append(F.smooth_l1_loss(F.linear(x, weight, bias).float(), wanted.float()))
    return losses


def make(name: str, dtype: torch.dtype, device: str) -> tuple:
    torch.manual_seed(0)
    depth, width = HEADS[name]
    index = tube_mask(0, 0, torch.arange(CLIPS[device]), (8, 14, 14), 0.9).masked.to(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    xs = [normal(*index.shape, depth).requires_grad_() for _ in range(2)]
    weights = [normal(width, depth).mul(depth**-0.5).requires_grad_() for _ in range(2)]
    biases = [normal(width).mul(0.1).requires_grad_() for _ in range(2)]
    return xs, weights, biases, [normal(len(index), 1568, width) for _ in range(2)], index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_linear_smooth_l1(compare, name, dtype):
    arguments = make(name, DTYPES[dtype], compare.device)
    xs, weights, biases, _, index = arguments
    leaves = (*xs, *weights, *biases)

    def call(function) -> tuple[Tensor, ...]:
        losses = function(*arguments)
        return (*losses, *torch.autograd.grad(sum(losses), leaves))

    functions = {"ours": linear_smooth_l1, "eager": eager, "torch.compile": torch.compile(eager)}
    compare(
        f"linear_smooth_l1 fwd+bwd 2 heads {HEADS[name][0]}->{HEADS[name][1]} {len(index)} clips {dtype}",
        {name: lambda function=function: call(function) for name, function in functions.items()},
        flops=3 * 2 * index.numel() * sum(weight.numel() for weight in weights),
        dtype=DTYPES[dtype],
        tolerance=TOLERANCE[dtype],
        goal=1.3,
        memory_goal=0.25,
    )

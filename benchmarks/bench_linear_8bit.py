"""linear_8bit against bf16: the first layer of a teacher's MLP with its GELU, two clips on a CPU, 16 on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, Case, flops_of
from torch import Tensor

from mvd_kernels import linear_8bit, quantize_weight
from mvd_kernels.shapes import TEACHERS, TOKENS, linear_layers

CLIPS = {"cpu": 2, "cuda": 16}[DEVICE]
# An entry of weight or token is off by up to half a step of 1/127 of the largest beside it (FP8: by up to 1/16 of
# itself). Errors of an output add up like a random walk, as the output does: by one or two percent, FP8 by four.
TOLERANCE = {"cpu": 2e-2, "cuda": 5e-2}


def make(size: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    depth, width = linear_layers(TEACHERS[size])["fc1"]
    x, weight, bias = (
        torch.randn(shape, device=device).bfloat16() for shape in ((CLIPS * TOKENS, depth), (width, depth), (width,))
    )
    return x, weight * depth**-0.5, bias


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


compiled = torch.compile(eager, fullgraph=True)


@pytest.fixture(scope="module", params=TEACHERS)
def case(request) -> Case:
    x, weight, bias = make(request.param, DEVICE)
    quantized = quantize_weight(weight)
    return Case(
        f"linear_8bit {request.param} fc1 + GELU {len(x)}x{x.shape[1]}x{len(weight)} bf16",
        {
            "ours": lambda: linear_8bit(x, quantized, bias, "gelu"),
            "eager": lambda: eager(x, weight, bias),
            "torch.compile": lambda: compiled(x, weight, bias),
        },
        flops=flops_of(lambda: eager(*make(request.param, "meta"))),
        tolerance=TOLERANCE[DEVICE],
        goal=1.7 if request.param == "ViT-B" else None,
    )


@pytest.mark.parametrize("side", ["ours", "eager", "torch.compile"])
def test_linear_8bit(compare, case, side):
    with torch.inference_mode():
        compare(case, side)

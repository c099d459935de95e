"""linear_8bit against bf16: the first layer of a teacher's MLP with its GELU, two clips on a CPU, 16 on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_kernels import linear_8bit, quantize_weight

CLIPS = {"cpu": 2, "cuda": 16}
WIDTHS = {"B": 768, "L": 1024, "H": 1280}
# An entry of weight or token is off by up to half a step of 1/127 of the largest beside it (FP8: by up to 1/16 of
# itself). Errors of an output add up like a random walk, as the output does: by one or two percent, FP8 by four.
TOLERANCE = {"cpu": 2e-2, "cuda": 5e-2}


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


@pytest.mark.parametrize("size", WIDTHS)
def test_linear_8bit(compare, size):
    torch.manual_seed(0)
    width = WIDTHS[size]
    x, weight, bias = (
        torch.randn(shape, device=compare.device).bfloat16()
        for shape in ((CLIPS[compare.device] * 1568, width), (4 * width, width), (4 * width,))
    )
    weight *= width**-0.5
    quantized, compiled = quantize_weight(weight), torch.compile(eager, fullgraph=True)
    sides = {
        "ours": lambda: linear_8bit(x, quantized, bias, "gelu"),
        "eager": lambda: eager(x, weight, bias),
        "torch.compile": lambda: compiled(x, weight, bias),
    }
    with torch.inference_mode():
        compare(
            f"linear_8bit ViT-{size} fc1 + GELU {len(x)}x{width}x{4 * width} bf16",
            sides,
            flops=2 * len(x) * weight.numel(),
            tolerance=TOLERANCE[compare.device],
            goal=1.7 if size == "B" else None,
        )

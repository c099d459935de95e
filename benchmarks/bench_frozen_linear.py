"""A frozen layer's weight in oneDNN's order against one that is ordered at every call: two clips, CPU, bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mvd_fast.models.frozen import FrozenLinear

ROWS = 2 * 1568
WIDTHS = {"B": 768, "L": 1024}


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("layer", ["qkv", "proj", "fc1 + GELU", "fc2"])
def test_frozen_linear(compare, size, layer):
    if compare.device != "cpu":
        pytest.skip("elsewhere a frozen layer is F.linear")
    torch.manual_seed(0)
    width = WIDTHS[size]
    depth, out = {"qkv": (1, 3), "proj": (1, 1), "fc1 + GELU": (1, 4), "fc2": (4, 1)}[layer]
    linear = torch.nn.Linear(depth * width, out * width).bfloat16()
    x = torch.randn(ROWS, depth * width).bfloat16()
    frozen = FrozenLinear.from_linear(linear, "gelu" if "GELU" in layer else None)
    sides = {
        "ours": lambda: frozen(x),
        "eager": (lambda: F.gelu(linear(x))) if "GELU" in layer else lambda: linear(x),
    }
    with torch.inference_mode():
        flops = 2 * ROWS * depth * out * width**2
        compare(f"frozen ViT-{size} {layer} bf16", sides, flops=flops, tolerance=1e-2)

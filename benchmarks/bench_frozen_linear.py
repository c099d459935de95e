"""A frozen layer's weight in oneDNN's order against one that is ordered at every call: two clips, CPU, bf16."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, Case, flops_of

pytest.importorskip("pydantic")

from mvd_fast.models.frozen import FrozenLinear
from mvd_kernels.shapes import TEACHERS, TOKENS, linear_layers

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere a frozen layer is F.linear")
CASES = {f"{size} {layer}": (size, layer) for size, layer in product(("ViT-B", "ViT-L"), linear_layers(1))}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    size, layer = CASES[request.param]
    torch.manual_seed(0)
    depth, width = linear_layers(TEACHERS[size])[layer]
    linear = torch.nn.Linear(depth, width).bfloat16().requires_grad_(False)
    x = torch.randn(2 * TOKENS, depth).bfloat16()
    frozen = FrozenLinear.from_linear(linear, "gelu" if layer == "fc1" else None)
    return Case(
        f"frozen {request.param} bf16",
        {"ours": lambda: frozen(x), "eager": (lambda: F.gelu(linear(x))) if layer == "fc1" else lambda: linear(x)},
        flops=flops_of(lambda: F.linear(x.to("meta"), linear.weight.to("meta"))),
        tolerance=1e-2,
    )


@pytest.mark.parametrize("side", ["ours", "eager"])
def test_frozen_linear(compare, case, side):
    with torch.inference_mode():
        compare(case, side)

"""attention at the recipes' shapes, on the views of a packed qkv projection, against torch's SDPA.

"eager" is the attention of a stock VideoMAE: the matrix of scores in memory, softmax in the inputs' dtype.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_kernels import attention

# Clips or images, tokens, heads, width of a head.
SHAPES = {
    "decoder B": (2, 1568, 12, 64),
    "decoder S": (2, 1568, 6, 64),
    "decoder L": (2, 1568, 8, 64),
    "decoder H": (2, 1568, 16, 80),
    "image teacher B": (16, 197, 12, 64),
    "student B": (2, 160, 12, 64),
}
MORE_CLIPS = {"cpu": 1, "cuda": 16}
CASES = [("decoder B", "fp32"), *((name, "bf16") for name in SHAPES)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# bf16: weights, outputs and SDPA's gradients of scores are rounded to 8 bits on the way, each at its own place.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_attention(compare, name, dtype, backward):
    torch.manual_seed(0)
    batch, tokens, heads, width = SHAPES[name]
    batch *= MORE_CLIPS[compare.device]
    qkv = torch.randn(batch, tokens, 3, heads, width, device=compare.device).to(DTYPES[dtype])
    leaves = [x.detach().requires_grad_(backward) for x in qkv.unbind(2)]
    grad = torch.randn_like(leaves[0])

    def call(function) -> tuple[Tensor, ...]:
        out = function(*leaves)
        return (out, *torch.autograd.grad(out, leaves, grad)) if backward else (out,)

    functions = {"ours": attention, "SDPA": sdpa, "eager": eager}
    if compare.device == "cuda":
        functions["torch.compile"] = torch.compile(eager)
    compare(
        f"attention {'fwd+bwd' if backward else 'fwd'} {name} {batch}x{tokens}x{heads}x{width} {dtype}",
        {name: lambda function=function: call(function) for name, function in functions.items()},
        # Two products forward, five backward: the scores once more, and those that give dv, dp, dq and dk.
        flops=2 * (7 if backward else 2) * batch * heads * tokens**2 * width,
        tolerance=TOLERANCE[dtype],
        goal=(1.8 if backward else 2.0) if name == "decoder B" and dtype == "bf16" else None,
    )

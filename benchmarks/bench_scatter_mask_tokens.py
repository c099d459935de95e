"""scatter_mask_tokens at the recipes' shapes: two decoders on one encoder, a tenth of the tokens visible.

Eager is what MVD's student does for each decoder: nn.Linear on the visible tokens, gather and add their positions,
gather the masked tokens' positions and add the mask token, concatenate.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, Case, flops_of
from torch import Tensor

from mvd_kernels import scatter_mask_tokens, tube_mask
from mvd_kernels.shapes import GRID, MASK_RATIO, RECIPES, TOKENS

CLIPS = {"cpu": 2, "cuda": 32}[DEVICE]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = [("ViT-B", "fp32"), *((name, "bf16") for name in ("ViT-B", "ViT-S", "ViT-L"))]
CASES = {
    f"{way} {recipe} {dtype}": (way, recipe, dtype) for way, (recipe, dtype) in product(("fwd+bwd", "fwd"), INPUTS)
}


def take(pos: Tensor, index: Tensor) -> Tensor:
    return pos.expand(len(index), -1, -1).gather(1, index[:, :, None].expand(-1, -1, pos.shape[2]))


def eager(x, weights, biases, mask_tokens, pos, visible, masked) -> list[Tensor]:
    outputs = []
    for weight, bias, mask_token, table in zip(weights, biases, mask_tokens, pos, strict=True):
        seen = F.linear(x, weight, bias) + take(table, visible)
        outputs.append(torch.cat([seen, mask_token + take(table, masked)], dim=1))
    return outputs


def make(recipe: str, dtype: torch.dtype, device: str) -> tuple:
    torch.manual_seed(0)
    width, decoder = RECIPES[recipe].width, RECIPES[recipe].decoder_width
    masks = tube_mask(0, 0, torch.arange(CLIPS), GRID, MASK_RATIO)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x = normal(*masks.visible.shape, width).requires_grad_()
    weights = [normal(decoder, width).mul(0.02).requires_grad_() for _ in range(2)]
    biases = [normal(decoder).requires_grad_() for _ in range(2)]
    mask_tokens = [normal(1, 1, decoder).requires_grad_() for _ in range(2)]
    pos = [normal(1, TOKENS, decoder) for _ in range(2)]
    grads = [normal(CLIPS, TOKENS, decoder) for _ in range(2)]
    return (x, weights, biases, mask_tokens, pos, masks.visible.to(device), masks.masked.to(device)), grads


def call(function, backward: bool, arguments: tuple, grads: list[Tensor]) -> tuple[Tensor, ...]:
    x, weights, biases, mask_tokens, *_ = arguments
    with torch.set_grad_enabled(backward):
        outputs = function(*arguments)
    leaves = (x, *weights, *biases, *mask_tokens)
    return (*outputs, *(torch.autograd.grad(outputs, leaves, grads) if backward else ()))


SIDES = {"ours": scatter_mask_tokens, "eager": eager, "torch.compile": torch.compile(eager)}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    way, recipe, dtype = CASES[request.param]
    backward = way == "fwd+bwd"
    made = make(recipe, DTYPES[dtype], DEVICE)
    return Case(
        f"scatter_mask_tokens {request.param}, {CLIPS} clips",
        {name: lambda function=function: call(function, backward, *made) for name, function in SIDES.items()},
        flops=flops_of(lambda: call(eager, backward, *make(recipe, DTYPES[dtype], "meta"))),
        tolerance=1e-4 if dtype == "fp32" else 3e-2,
        goal=2.0 if recipe == "ViT-B" and backward else None,
    )


@pytest.mark.parametrize("side", SIDES)
def test_scatter_mask_tokens(compare, case, side):
    compare(case, side)

"""embed_visible_tubes at the recipes' shapes: 16 frames of 224 px, tubes of 2 x 16 x 16, 10 % visible.

Eager embeds all tubes and then gathers the visible ones, as a stock VideoMAE does: uint8 -> permute -> float ->
normalise -> Conv3d -> flatten -> + positions -> gather. "gather, then embed" is eager PyTorch that cuts out the visible
tubes first (this project's engine before the operator).
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, Case, flops_of
from torch import Tensor

from mvd_kernels import embed_visible_tubes, tube_mask, use_impl
from mvd_kernels.shapes import FRAMES, GRID, IMAGE_SIZE, MASK_RATIO, PATCH, RECIPES, TOKENS, TUBELET

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIPS = {"cpu": 2, "cuda": 32}[DEVICE]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# On processors that only emulate bf16 a bf16 Conv3d over all tubes takes minutes for the wide recipes.
INPUTS = [("ViT-B", "fp32"), ("ViT-L", "fp32"), ("ViT-B", "bf16"), ("ViT-S", "bf16")]
CASES = {
    f"{way} {recipe} {dtype}": (way, recipe, dtype) for way, (recipe, dtype) in product(("fwd", "fwd+bwd"), INPUTS)
}


def make(recipe: str, dtype: torch.dtype, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    torch.manual_seed(0)
    width = RECIPES[recipe].width
    video = torch.randint(256, (CLIPS, FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, device=device)
    weight = torch.randn(width, 3, TUBELET, PATCH, PATCH, device=device).mul(0.02).to(dtype).requires_grad_()
    bias = torch.randn(width, device=device).to(dtype).requires_grad_()
    pos = torch.randn(1, TOKENS, width, device=device).to(dtype)
    index = tube_mask(0, 0, torch.arange(CLIPS), GRID, MASK_RATIO).visible.to(device)
    grad = torch.randn(*index.shape, width, device=device).to(dtype)
    return (video, weight, bias, pos, index), grad


def embed_all_then_gather(video: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, index: Tensor) -> Tensor:
    mean, std = (torch.tensor(three, device=video.device)[:, None, None, None] for three in (MEAN, STD))
    pixels = ((video.permute(0, 4, 1, 2, 3).float() / 255 - mean) / std).to(weight.dtype)
    tokens = F.conv3d(pixels, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + pos
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def gather_then_embed(*arguments: Tensor) -> Tensor:
    with use_impl("reference"):
        return embed_visible_tubes(*arguments, MEAN, STD)


def ours(*arguments: Tensor) -> Tensor:
    return embed_visible_tubes(*arguments, MEAN, STD)


def call(function, backward: bool, arguments: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    _, weight, bias, *_ = arguments
    with torch.set_grad_enabled(backward):
        out = function(*arguments)
    return (out, *torch.autograd.grad(out, (weight, bias), grad)) if backward else (out,)


SIDES = {"ours": ours, "eager": embed_all_then_gather, "gather, then embed": gather_then_embed}
if DEVICE == "cuda":
    SIDES["torch.compile"] = torch.compile(embed_all_then_gather)


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    way, recipe, dtype = CASES[request.param]
    backward = way == "fwd+bwd"
    made = make(recipe, DTYPES[dtype], DEVICE)
    return Case(
        f"embed_visible_tubes {request.param}, {CLIPS} clips",
        {name: lambda function=function: call(function, backward, *made) for name, function in SIDES.items()},
        flops=flops_of(lambda: call(gather_then_embed, backward, *make(recipe, DTYPES[dtype], "meta"))),
        tolerance=1e-4 if dtype == "fp32" else 3e-2,
        goal=8.0 if recipe == "ViT-B" and not backward else None,
    )


@pytest.mark.parametrize("side", SIDES)
def test_embed_visible_tubes(compare, case, side):
    compare(case, side)

"""embed_visible_tubes at the recipes' shapes: 16 frames of 224 px, tubes of 2 x 16 x 16 (H: 14), 10 % visible.

Eager embeds all tubes and then gathers the visible ones, as a stock VideoMAE does: uint8 -> permute -> float ->
normalise -> Conv3d -> flatten -> + positions -> gather. "gather, then embed" is eager PyTorch that cuts out the visible
tubes first (this project's engine before the operator).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_kernels import embed_visible_tubes, tube_mask, use_impl

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIPS = {"cpu": 2, "cuda": 32}
RECIPES = {"B": (768, 16), "S": (384, 16), "L": (1024, 16), "H": (1280, 14)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(recipe: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    width, patch = RECIPES[recipe]
    side, batch = 224 // patch, CLIPS[device]
    video = torch.randint(256, (batch, 16, 224, 224, 3), dtype=torch.uint8, device=device)
    weight = torch.randn(width, 3, 2, patch, patch, device=device).mul(0.02).to(dtype).requires_grad_()
    bias = torch.randn(width, device=device).to(dtype).requires_grad_()
    pos = torch.randn(1, 8 * side * side, width, device=device).to(dtype)
    index = tube_mask(0, 0, torch.arange(batch), (8, side, side), 0.9).visible.to(device)
    return video, weight, bias, pos, index


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


# On processors that only emulate bf16 a bf16 Conv3d over all tubes takes minutes for the wide recipes.
@pytest.mark.parametrize(("recipe", "dtype"), [("B", "fp32"), ("L", "fp32"), ("B", "bf16"), ("S", "bf16")])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_embed_visible_tubes(compare, recipe, dtype, backward):
    arguments = make(recipe, DTYPES[dtype], compare.device)
    _, weight, bias, _, index = arguments
    grad = torch.randn(*index.shape, len(weight), device=compare.device).to(weight.dtype)

    def call(function):
        if not backward:
            with torch.no_grad():
                return function(*arguments)
        out = function(*arguments)
        return (out, *torch.autograd.grad(out, (weight, bias), grad))

    functions = {"ours": ours, "eager": embed_all_then_gather, "gather, then embed": gather_then_embed}
    if compare.device == "cuda":
        functions["torch.compile"] = torch.compile(embed_all_then_gather)
    compare(
        f"embed_visible_tubes {'fwd+bwd' if backward else 'fwd'} ViT-{recipe} {CLIPS[compare.device]} clips {dtype}",
        {name: lambda function=function: call(function) for name, function in functions.items()},
        flops=(4 if backward else 2) * index.numel() * weight.numel(),
        tolerance=1e-4 if dtype == "fp32" else 3e-2,
        goal=8.0 if recipe == "B" and not backward else None,
    )

"""Training steps of other people's models, before and after `mvd_kernels.patch`: the same model, patched or not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mvd_kernels.patch import patch_hf_videomae, patch_timm_vit

# Random weights: all errors of bf16 add up over 12 blocks; the tests hold small models closer.
TOLERANCE = {"bf16": 0.2, "fp32": 2e-3}


def timm_vit_b(device: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(), (torch.randn(2, 3, 224, 224, device=device),)


def videomae_b(device: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Pre-training with 90 % of the tubes hidden, the decoder included."""
    transformers = pytest.importorskip("transformers")
    hidden = torch.rand(196).argsort() >= 20
    mask = hidden.repeat(1, 8).to(device)
    return transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig()), (
        torch.randn(1, 16, 3, 224, 224, device=device),
        mask,
    )


CASES = {
    "timm ViT-B, 2 images": (timm_vit_b, patch_timm_vit),
    "VideoMAE-B pre-training, 1 clip": (videomae_b, patch_hf_videomae),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_patch(compare, case, dtype):
    torch.manual_seed(0)
    build, patch = CASES[case]
    model, inputs = build(compare.device)
    model = model.to(compare.device, torch.bfloat16 if dtype == "bf16" else torch.float32).train()
    dtype_of_all = next(model.parameters()).dtype
    inputs = tuple(one.to(dtype_of_all) if one.is_floating_point() else one for one in inputs)
    patched = copy.deepcopy(model)
    assert patch(patched).swapped

    def side(network: nn.Module):
        parameters = list(network.parameters())

        def call() -> list[Tensor]:
            output = network(*inputs)
            output = output if isinstance(output, Tensor) else output.logits
            # Of the gradients, those of the first matrix, which all others are behind.
            gradients = torch.autograd.grad(output.float().square().mean(), parameters)
            return [output, gradients[[p.ndim > 3 for p in parameters].index(True)]]

        return call

    compare(f"step of {case}, {dtype}", {"patched": side(patched), "as it is": side(model)}, tolerance=TOLERANCE[dtype])

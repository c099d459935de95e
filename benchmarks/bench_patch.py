"""Training steps of other people's models, before and after `mvd_kernels.patch`: the same model, patched or not."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from harness import DEVICE, Case
from torch import Tensor, nn

from mvd_kernels.patch import patch_hf_videomae, patch_timm_vit

# Random weights: all errors of bf16 add up over 12 blocks; the tests hold small models closer.
TOLERANCE = {"bf16": 0.2, "fp32": 2e-3}


def timm_vit_b() -> tuple[nn.Module, list[Tensor]]:
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(), [torch.randn(2, 3, 224, 224)]


def videomae_b() -> tuple[nn.Module, list[Tensor]]:
    """Pre-training with 90 % of the tubes hidden, the decoder included."""
    transformers = pytest.importorskip("transformers")
    hidden = torch.rand(196).argsort() >= 20
    model = transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig())
    return model, [torch.randn(1, 16, 3, 224, 224), hidden.repeat(1, 8)]


MODELS = {
    "timm ViT-B, 2 images": (timm_vit_b, patch_timm_vit),
    "VideoMAE-B pre-training, 1 clip": (videomae_b, patch_hf_videomae),
}


CASES = {f"{model}, {dtype}": (model, dtype) for model, dtype in product(MODELS, ("fp32", "bf16"))}


def step(network: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    parameters = list(network.parameters())
    output = network(*inputs)
    output = output if isinstance(output, Tensor) else output.logits
    # Of the gradients, those of the first matrix, which all others are behind.
    gradients = torch.autograd.grad(output.float().square().mean(), parameters)
    return [output, gradients[[p.ndim > 3 for p in parameters].index(True)]]


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    torch.manual_seed(0)
    name, dtype = CASES[request.param]
    build, patch = MODELS[name]
    model, inputs = build()
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = model.to(DEVICE, precision).train()
    inputs = [one.to(DEVICE, precision if one.is_floating_point() else None) for one in inputs]
    patched = copy.deepcopy(model)
    assert patch(patched).swapped
    return Case(
        f"step of {request.param}",
        {"patched": lambda: step(patched, inputs), "as it is": lambda: step(model, inputs)},
        tolerance=TOLERANCE[dtype],
        reference="as it is",
    )


@pytest.mark.parametrize("side", ["patched", "as it is"])
def test_patch(compare, case, side):
    compare(case, side)

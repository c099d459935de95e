"""Frozen layers: what they compute, and that a packed weight is never missed by who copies, moves or saves it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd_fast.models import VideoTeacher
from mvd_fast.models.frozen import FrozenLinear, to_precision

PACKS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def layer(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 96).to(dtype)


def wanted(linear: nn.Linear, x: Tensor, gelu: bool) -> Tensor:
    """In float64."""
    y = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    return F.gelu(y) if gelu else y


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("shape", [(2, 5), (1,), (0, 3), ()])
def test_bf16(shape: tuple[int, ...], activation: str | None) -> None:
    """One rounding of the exact result; strided input; twice, as the second call finds the weight packed."""
    linear = layer()
    frozen = FrozenLinear.from_linear(linear, activation)
    x = torch.randn(*shape, 128).bfloat16()[..., ::2]
    with torch.no_grad():
        first, second = frozen(x), frozen(x)
    assert first.dtype == torch.bfloat16 and first.shape == (*shape, 96) and first.equal(second)
    torch.testing.assert_close(first.double(), wanted(linear, x, bool(activation)), rtol=2**-8, atol=2e-2)
    assert (frozen.weight is None) == (PACKS and x.numel() > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_the_plain_layer(dtype: torch.dtype) -> None:
    linear = layer(dtype)
    x = torch.randn(7, 64, dtype=dtype)
    assert FrozenLinear.from_linear(linear, "gelu")(x).equal(F.gelu(linear(x)))


def test_gradient_of_the_input() -> None:
    linear = layer()
    frozen = FrozenLinear.from_linear(linear, "gelu")
    with torch.no_grad():
        frozen(torch.randn(3, 64).bfloat16())  # packs
    found, expected = (torch.randn(3, 64, generator=torch.manual_seed(1)).bfloat16().requires_grad_() for _ in range(2))
    frozen(found).sum().backward()
    F.gelu(linear(expected)).sum().backward()
    assert found.grad.equal(expected.grad)


def test_a_packed_weight_is_whole_for_copies_moves_and_files() -> None:
    linear = layer()
    x = torch.randn(3, 64).bfloat16()

    def packed() -> FrozenLinear:
        frozen = FrozenLinear.from_linear(linear)
        with torch.no_grad():
            frozen(x)
        return frozen

    assert copy.deepcopy(packed()).weight.equal(linear.weight)
    assert packed().float().weight.equal(linear.weight.float())
    assert packed().state_dict().keys() == {"weight", "bias"}
    assert packed().state_dict()["weight"].equal(linear.weight)
    other = packed()
    other.load_state_dict({"weight": torch.zeros(96, 64), "bias": torch.ones(96)})
    with torch.no_grad():
        assert other(x).eq(1).all()


def test_autocast_decides_the_dtype() -> None:
    frozen = FrozenLinear.from_linear(layer())
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert frozen(torch.randn(3, 64).bfloat16()).dtype == torch.float16


def test_teacher() -> None:
    """Every layer of its blocks is frozen; no bias is lost; numbers in bf16 within bf16's of the float32 network."""
    torch.manual_seed(0)
    clip = {"image_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
    teacher = VideoTeacher(embed_dim=64, depth=2, num_heads=2, **clip).eval().requires_grad_(False)
    for name, parameter in teacher.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    video, count = torch.randn(2, 3, 4, 32, 32), sum(p.numel() for p in teacher.parameters())
    expected = teacher(video)
    plain = to_precision(copy.deepcopy(teacher), "fp32")
    assert sum(isinstance(module, FrozenLinear) for module in plain.modules()) == 8
    assert sum(p.numel() for p in plain.parameters()) == count + 2 * 64  # keys have a bias, too: of zeros
    torch.testing.assert_close(plain(video), expected, rtol=0, atol=0)
    close = to_precision(copy.deepcopy(teacher), "bf16")(video.bfloat16()).float()
    assert F.cosine_similarity(close, expected, dim=-1).min() > 0.9995

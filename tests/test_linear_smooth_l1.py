"""The fused head and smooth-L1 loss against the plain formula in float64, in all implementations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from op_checks import CUDA, IMPLEMENTATIONS, LANGUAGES, assert_close, pairwise, running
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mvd_kernels
from mvd_kernels import linear_smooth_l1, use_impl
from mvd_kernels.linear_smooth_l1 import _reference

CASES = [  # B, M, N, C, D
    (2, 1, 1, 7, 13),
    (2, 7, 11, 16, 64),
    (1, 131, 149, 37, 29),  # two blocks of rows, primes
    (3, 64, 64, 32, 130),
]
FLOATS = [torch.float32, torch.bfloat16]


def make(case: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    batch, rows, tokens, depth, width = case
    generator = torch.Generator().manual_seed(sum(case))
    x, weight, bias, target = (
        torch.randn(shape, generator=generator)
        for shape in ((batch, rows, depth), (width, depth), (width,), (batch, tokens, width))
    )
    index = torch.rand(batch, tokens, generator=generator).argsort(1)[:, :rows].contiguous()
    floats = {"x": x, "weight": weight * depth**-0.5, "bias": bias, "target": target * 2}
    return {name: value.to(device, dtype) for name, value in floats.items()} | {"index": index.to(device)}


def trained(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [inputs[name].detach().to(dtype or inputs[name].dtype).requires_grad_() for name in ("x", "weight", "bias")]


def check(
    inputs: dict[str, Tensor],
    beta: float = 1.0,
    normalize: bool = False,
    reduction: str = "mean",
    function: Callable[..., Tensor] = linear_smooth_l1,
) -> None:
    """Loss and gradients, the loss multiplied by something, against float64."""
    target, index = inputs["target"], inputs["index"]
    ours, exact = trained(inputs), trained(inputs, torch.float64)
    loss = function(*ours, target, index, beta, normalize, reduction)
    expected = _reference(*exact, target.double(), index, beta, normalize)
    rows, depth = inputs["x"].shape[0] * inputs["x"].shape[1], inputs["x"].shape[2]
    expected = expected / (rows * target.shape[2]) if reduction == "mean" else expected
    assert loss.dtype == torch.float32 and loss.shape == ()
    # Where bf16 is multiplied as such, predictions are rounded once before they are subtracted. Errors of single
    # predictions average out in the loss; in a gradient one that crosses a kink of the loss counts in full.
    coarse = inputs["x"].dtype == torch.bfloat16
    assert_close(loss, expected, rows * depth + (2**14 if coarse else 0), name="loss")
    grads = torch.autograd.grad(loss * 1.7, ours), torch.autograd.grad(expected * 1.7, exact)
    for name, got, want in zip(("x", "weight", "bias"), *grads, strict=True):
        assert got.dtype == inputs[name].dtype and got.shape == want.shape
        assert_close(got.flatten(), want.flatten(), rows + depth + target.shape[2], 4, f"gradient of {name}")


@pairwise(kernels=IMPLEMENTATIONS, dtype=FLOATS, case=CASES, options=[(1.0, False, "mean"), (0.4, True, "sum")])
def test_against_the_formula(kernels, dtype, case, options):
    check(make(case, dtype, kernels), *options)


def test_l1(kernels):
    check(make(CASES[1], torch.float32, kernels), beta=0.0)


def test_half_on_triton():
    with running("triton") as device:
        check(make(CASES[1], torch.float16, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_target_may_have_another_dtype(language, dtype):
    inputs = make(CASES[1], torch.float32, language)
    check(inputs | {"target": inputs["target"].to(dtype)})


def test_targets_of_inference_mode(language):
    inputs = make(CASES[1], torch.float32, language)
    with torch.inference_mode():
        target = inputs["target"] * 1
    check(inputs | {"target": target})


def test_without_index_and_bias(language):
    inputs = make((2, 7, 7, 16, 24), torch.float32, language)
    x, weight, _ = trained(inputs)
    loss = linear_smooth_l1(x, weight, None, inputs["target"])
    expected = F.smooth_l1_loss(F.linear(x.double(), weight.double()), inputs["target"].double())
    assert_close(loss, expected, 16 * 14)
    grads = torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, (x, weight))
    for got, want in zip(*grads, strict=True):
        assert_close(got, want.double(), 24 + 14, 2)


def test_several_heads(language):
    first, second = make(CASES[1], torch.float32, language), make((2, 7, 11, 24, 40), torch.float32, language)
    names = ("x", "weight", "bias", "target")
    both = linear_smooth_l1(*([first[name], second[name]] for name in names), first["index"], normalize_target=True)
    alone = [
        linear_smooth_l1(*(one[name] for name in names), first["index"], normalize_target=True)
        for one in (first, second)
    ]
    assert all(map(torch.equal, both, alone))


def test_extreme_values(kernels):
    inputs = make(CASES[1], torch.float32, kernels)
    check(inputs | {"target": inputs["target"] * 1e4})
    check(inputs | {"x": inputs["x"] * 1e-40})
    x, weight, bias = trained(inputs)
    x.data[1, 3, 2] = float("nan")
    loss = linear_smooth_l1(x, weight, bias, inputs["target"], inputs["index"])
    grad = torch.autograd.grad(loss, x)[0]
    assert loss.isnan() and grad[1, 3].isnan().all() and grad.isnan().sum() == grad.shape[2]


def test_strides(language):
    case = (2, 7, 11, 16, 64)
    inputs = make(case, torch.float32, language)
    strided = {
        "x": inputs["x"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": inputs["weight"].t().contiguous().t(),
        "target": inputs["target"].repeat_interleave(2, dim=2)[..., ::2],
        "index": inputs["index"].t().contiguous().t(),
    }
    check(inputs | strided)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows(language, shape):
    inputs = make((*shape, 4, 8, 8), torch.float32, language)
    parts = trained(inputs)
    total = linear_smooth_l1(*parts, inputs["target"], inputs["index"], reduction="sum")
    assert total == 0 and not any(grad.any() for grad in torch.autograd.grad(total, parts))
    assert linear_smooth_l1(*parts, inputs["target"], inputs["index"]).isnan()


def test_only_what_is_needed_is_computed(language):
    inputs = make(CASES[1], torch.float32, language)
    x, weight, bias = trained(inputs)
    rest = inputs["target"], inputs["index"]
    full = torch.autograd.grad(linear_smooth_l1(x, weight, bias, *rest), (x, weight, bias))
    alone = torch.autograd.grad(linear_smooth_l1(x.detach(), weight.detach(), bias, *rest), bias)
    assert torch.equal(alone[0], full[2])
    assert torch.equal(torch.autograd.grad(linear_smooth_l1(x, weight.detach(), bias.detach(), *rest), x)[0], full[0])
    with torch.no_grad():
        assert not linear_smooth_l1(x, weight, bias, *rest).requires_grad


def test_backward_twice_and_in_a_checkpoint(language):
    inputs = make(CASES[1], torch.float32, language)
    parts = trained(inputs)
    loss = linear_smooth_l1(*parts, inputs["target"], inputs["index"])
    first = torch.autograd.grad(loss, parts, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, parts)))
    again = checkpoint(linear_smooth_l1, *parts, inputs["target"], inputs["index"], use_reentrant=False)
    assert all(map(torch.equal, first, torch.autograd.grad(again, parts)))


def test_threads_change_nothing():
    inputs = make(CASES[2], torch.float32, "cpu")

    def run() -> tuple[Tensor, ...]:
        parts = trained(inputs)
        loss = linear_smooth_l1(*parts, inputs["target"], inputs["index"])
        return loss, torch.autograd.grad(loss, parts)[2]

    before, first = torch.get_num_threads(), run()
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, first, run()))
    finally:
        torch.set_num_threads(before)


def test_autocast(language):
    inputs = make(CASES[1], torch.float32, language)
    with torch.autocast(language, torch.bfloat16):
        loss = linear_smooth_l1(*trained(inputs), inputs["target"], inputs["index"])
    narrow = {name: value.bfloat16() for name, value in inputs.items() if name in ("x", "weight")}
    x, weight, bias = trained(inputs | narrow)
    assert torch.equal(loss, linear_smooth_l1(x, weight, bias, inputs["target"], inputs["index"]))


# ---- torch ----


@pytest.mark.parametrize("implementation", LANGUAGES)
def test_opcheck(implementation):
    with running(implementation) as device:
        inputs = make(CASES[1], torch.float32, device)
        arguments = (*trained(inputs), inputs["target"], inputs["index"], 1.0, True, True, True, True)
        torch.library.opcheck(torch.ops.mvd_kernels.linear_smooth_l1.default, arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_compiles_into_one_graph(dtype):
    check(make(CASES[1], dtype, "cpu"), function=torch.compile(linear_smooth_l1, fullgraph=True))


def test_gradcheck_of_the_reference():
    inputs = make((1, 3, 4, 5, 3), torch.float64, "cpu")
    rest = inputs["target"], inputs["index"], 0.7, True
    assert torch.autograd.gradcheck(lambda *parts: _reference(*parts, *rest), trained(inputs))


def test_other_dtypes_run_as_plain_pytorch():
    assert mvd_kernels.implementation("linear_smooth_l1", "cpu", torch.float64)[0] == "reference"
    check(make(CASES[1], torch.float64, "cpu") | {}, function=lambda *a: linear_smooth_l1(*a).float())
    with use_impl("reference"):
        check(make(CASES[1], torch.float32, "cpu"))


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(2, 16)}, r"x is torch.float32 \[2, 16\] on cpu; it must be floating point \[B, M, C\]"),
        (
            {"weight": torch.zeros(64, 15)},
            r"weight is torch.float32 \[64, 15\] on cpu; it must be torch.float32 \[D, 16\]",
        ),
        ({"weight": torch.zeros(64, 16).bfloat16()}, r"weight is torch.bfloat16"),
        ({"bias": torch.zeros(63)}, r"bias is torch.float32 \[63\] on cpu; it must be floating point \[64\]"),
        ({"target": torch.zeros(2, 11, 63)}, r"target is .*; it must be floating point \[2, N, 64\]"),
        ({"target": torch.zeros(2, 11, 64, dtype=torch.int64)}, r"target is torch.int64"),
        ({"index": None}, r"target is .* without an index it must have the 7 tokens of x"),
        (
            {"index": torch.zeros(2, 6, dtype=torch.int64)},
            r"index is torch.int64 \[2, 6\] on cpu; it must be torch.int64 \[2, 7\]",
        ),
        ({"index": torch.zeros(2, 7)}, r"index is torch.float32"),
        ({"beta": -1.0}, r"beta is -1.0; it must be at least 0"),
        ({"beta": float("nan")}, r"beta is nan"),
        ({"reduction": "none"}, r"reduction is 'none'; it must be 'mean' or 'sum'"),
        ({"x": [torch.zeros(2, 7, 16)] * 2}, r"there are 2, one, one, one of x, weight, bias, target"),
    ],
)
def test_error_sentences(change, sentence):
    good = make(CASES[1], torch.float32, "cpu")
    with pytest.raises(ValueError, match=sentence):
        linear_smooth_l1(**good | change)


@pytest.mark.cpp
@pytest.mark.parametrize("token", [-1, 11])
def test_indices_out_of_range(token):
    inputs = make(CASES[1], torch.float32, "cpu")
    inputs["index"][1, 2] = token
    with pytest.raises(ValueError, match=f"index holds {token}; target has the tokens 0 to 10"):
        linear_smooth_l1(**inputs)


@pytest.mark.parametrize("token", [-1, 11])
def test_indices_out_of_range_make_the_loss_of_triton_nan(token):
    with running("triton") as device:
        inputs = make(CASES[1], torch.float32, device)
        inputs["index"][1, 2] = token
        assert linear_smooth_l1(**inputs).isnan()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_production_shape_on_cuda():
    check(make((2, 1408, 1568, 512, 1024), torch.bfloat16, "cuda"), normalize=True)

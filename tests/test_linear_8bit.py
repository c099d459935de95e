"""Linear layers in 8 bits: every implementation against the plain formula in float64 (the rounding to 8 bits being a
part of the formula), and the formula against the layer that it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from op_checks import CPP, CUDA, LANGUAGES, assert_close, pairwise, running
from torch import Tensor, nn

import mvd_kernels
from mvd_kernels import Linear8bit, QuantizedWeight, linear_8bit, quantize_weight, use_impl
from mvd_kernels._triton import interpreting
from mvd_kernels.linear_8bit import _reference, quantize_rows

CASES = [  # R, C, D
    (1, 7, 13),
    (7, 64, 64),
    (131, 149, 67),  # one past a tile on a GPU, primes
    (197, 16, 130),  # more than a block of rows on a CPU
    (5, 1, 1),
    (3, 5121, 3),
]
FLOATS = [torch.float32, torch.bfloat16]
FORMATS = ["int8", "fp8"]
# C++ has no FP8: no instruction of a CPU multiplies it.
KERNELS = [*((one, "int8") for one in CPP), ("triton", "int8"), ("triton", "fp8")]


def make(
    case: tuple[int, int, int], dtype: torch.dtype = torch.float32, device: str = "cpu", format: str = "int8"
) -> tuple[Tensor, QuantizedWeight, Tensor]:
    rows, depth, width = case
    generator = torch.Generator().manual_seed(sum(case))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, depth), (width, depth), (width,)))
    quantized = quantize_weight((weight * depth**-0.5).to(device, dtype), format)
    return x.to(device, dtype), quantized, bias.to(device, dtype)


def exact(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str | None = None) -> Tensor:
    return _reference(x.double(), *weight, None if bias is None else bias.double(), activation == "gelu")


def check(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str | None = None, run=linear_8bit):
    y = run(x, weight, bias, activation)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], len(weight.values))
    # Sums of whole numbers are exact; scales, bias and GELU are a few roundings of fp32. FP8 is summed in fp32, except
    # on GPUs: Hopper keeps 14 bits when it adds products, an error of at most 2^-16 sqrt(terms) on an H100.
    length = 16
    if weight.values.dtype == torch.float8_e4m3fn:
        length = (length + x.shape[-1]) * (128**2 if CUDA and in_use() == "triton" else 1)
    # The interpreter, unlike a GPU, cuts bf16 off: as far off as two roundings.
    cut = interpreting() and x.dtype == torch.bfloat16 and in_use() == "triton"
    assert_close(y, exact(x, weight, bias, activation), length, 2 if cut else 1)


def in_use() -> str:
    return mvd_kernels.implementation("linear_8bit", "cuda" if CUDA else "cpu")[0]


# ---- against the formula ----


@pairwise(kernel=KERNELS, dtype=FLOATS, case=CASES)
def test_against_the_formula(kernel, dtype, case):
    with running(kernel[0]) as device:
        x, weight, bias = make(case, dtype, device, kernel[1])
        check(x, weight, bias, "gelu")
        check(x, weight, None)


@pytest.mark.parametrize("format", FORMATS)
def test_half_on_triton(format):
    with running("triton") as device:
        check(*make(CASES[1], torch.float16, device, format), "gelu")


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_rounded_as_in_the_reference(kernels, dtype):
    """With one column of the input for each of the output, the whole numbers can be read; ties are among them."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(-254, 255) / 2
    scales = torch.rand(40, 1, generator=generator) * 100
    x = torch.cat([steps.expand(40, -1) * scales, torch.randn(60, 509, generator=generator)]).to(kernels, dtype)
    y = linear_8bit(x.float(), quantize_weight(torch.eye(509, device=kernels), "int8"))
    values, scale = quantize_rows(x, torch.int8)
    assert torch.equal((y / scale[:, None]).round().to(torch.int8), values)
    assert values.min() == -127 and values.max() == 127


@pytest.mark.parametrize("format", FORMATS)
def test_fp8_and_int8_are_what_they_are_said_to_be(format):
    """The reference itself, against x / scale rounded by torch, and weights that are values times scale."""
    x, weight, bias = make((20, 50, 30), torch.float32, "cpu", format)
    largest = {"int8": 127, "fp8": 448}[format]
    assert weight.values.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[format]
    assert weight.values.float().abs().amax(1).eq(largest).all()
    scale = x.abs().amax(1, keepdim=True) / largest
    rounded = (x / scale).round() if format == "int8" else (x / scale).to(torch.float8_e4m3fn).float()
    expected = F.linear(rounded * scale, weight.values.float() * weight.scale[:, None], bias)
    assert_close(exact(x, weight, bias).float(), expected.double(), 200)
    assert_close(exact(x, weight, bias, "gelu").float(), F.gelu(expected.double()), 200)


@pytest.mark.parametrize("format", FORMATS)
def test_close_to_the_layer_in_float(format):
    """Gaussian activations with a few large channels: every token within 2.6 degrees of what it should be."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 768, generator=generator)
    x[:, [5, 77, 400, 701]] *= 5
    linear = nn.Linear(768, 500)
    with torch.no_grad():
        y, layer = linear(x), Linear8bit.from_linear(linear, format=format)(x)
    cosine = F.cosine_similarity(y, layer, dim=-1)
    assert cosine.min() >= 0.999 and cosine.max() < 0.999999


def test_gelu_everywhere(kernels):
    """Of what reaches it: far out it is 0 or its argument, next to 0 half of it."""
    y = torch.cat([torch.linspace(-7, 7, 4001), torch.logspace(-30, 30, 61), -torch.logspace(-30, 30, 61)])
    bias = y.to(kernels)
    x = torch.zeros(1, 4, device=kernels)
    weight = quantize_weight(torch.ones(len(y), 4, device=kernels))
    actual, expected = linear_8bit(x, weight, bias, "gelu")[0].cpu().double(), F.gelu(y.double())
    error = (actual - expected).abs()
    assert (error <= 6e-7 * expected.abs().clamp(min=1)).all()
    close = y.abs() < 0.5
    assert (error[close] <= 6e-7 * expected[close].abs()).all()


# ---- extreme values ----


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_extreme_values(kernel):
    with running(kernel[0]) as device:
        x, weight, bias = make(CASES[1], torch.float32, device, kernel[1])
        factors = torch.tensor([1e30, 1e4, 1e-25, 1e-29, 1e-35, 1e-40, 0.0], device=device)[:, None]
        check(x * factors, weight, bias, "gelu")
        y = linear_8bit(x * factors, weight, bias)
        assert torch.equal(y[4:], bias.expand(3, -1))
        check((x * factors)[:4], weight, None)
        check((x * factors)[2:], weight._replace(scale=weight.scale * 1e15), None)
        check(x, weight._replace(scale=weight.scale * 1e4), bias, "gelu")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pairwise(kernel=KERNELS, dtype=FLOATS, bad=[float("nan"), float("inf"), -float("inf")], place=[0, 20, 66])
def test_what_is_not_finite_stays_in_its_row(kernel, dtype, bad, place):
    with running(kernel[0]) as device:
        x, weight, bias = make((9, 67, 70), dtype, device, kernel[1])
        clean = linear_8bit(x, weight, bias, "gelu")
        x[4, place] = bad
        y = linear_8bit(x, weight, bias, "gelu")
    assert y[4].isnan().all()
    y[4] = clean[4]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_channel_that_is_not_finite(language, bad):
    x, _, bias = make(CASES[1], torch.float32, language)
    weight = torch.randn(64, 64, device=language)
    clean = linear_8bit(x, quantize_weight(weight), bias)
    weight[3, 5] = bad
    quantized = quantize_weight(weight)
    y = linear_8bit(x, quantized, bias)
    assert quantized.scale[3].isnan() and y[:, 3].isnan().all()
    y[:, 3] = clean[:, 3]
    assert torch.equal(y, clean)


def test_a_channel_of_zeros(language):
    x, _, bias = make(CASES[1], torch.float32, language)
    weight = torch.randn(64, 64, device=language)
    weight[3] = 0
    y = linear_8bit(x, quantize_weight(weight), bias)
    assert torch.equal(y[:, 3], bias[3].expand(7)) and y.isfinite().all()


def test_largest_sums(kernels):
    """Whole numbers beyond 2^24, all of one sign: fp32 would lose their last bits; 16 bits would overflow."""
    x, weight = torch.full((3, 4096), 2.0, device=kernels), torch.full((5, 4096), -0.5, device=kernels)
    x[1] *= -1
    x[2, ::2] *= -1
    check(x, quantize_weight(weight), None)


# ---- shapes and strides ----


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (16,), (2, 3, 5, 16)])
def test_other_dimensions(language, shape):
    _, weight, bias = make((1, 16, 24), torch.float32, language)
    check(torch.randn(shape).to(language), weight, bias, "gelu")


def test_strides(language):
    x, _, bias = make((30, 22, 18), torch.float32, language)
    weight = torch.randn(22, 18).to(language)
    check(x.t().contiguous().t(), quantize_weight(weight.t()), bias.repeat_interleave(2)[::2], "gelu")
    check(x[::3], quantize_weight(weight.t()), bias)
    check(x.view(5, 6, 22).transpose(0, 1), quantize_weight(weight.t()), bias)
    assert torch.equal(quantize_weight(weight.t()).values, quantize_weight(weight.t().contiguous()).values)


def test_a_weight_that_is_not_packed(language):
    x, weight, bias = make(CASES[2], torch.float32, language)
    assert torch.equal(linear_8bit(x, weight._replace(packed=None), bias), linear_8bit(x, weight, bias))


@pytest.mark.parametrize("implementation", CPP)
def test_threads_change_nothing(implementation):
    arguments = make((400, 149, 130), torch.bfloat16)
    before = torch.get_num_threads()
    with running(implementation):
        first = linear_8bit(*arguments, "gelu")
        try:
            torch.set_num_threads(1)
            assert torch.equal(first, linear_8bit(*arguments, "gelu"))
        finally:
            torch.set_num_threads(before)


# ---- torch ----


def test_autocast(language):
    x, weight, bias = make(CASES[1], torch.float32, language)
    with torch.autocast(language, torch.bfloat16):
        y = linear_8bit(x, weight, bias, "gelu")
    assert y.dtype == torch.bfloat16 and torch.equal(y, linear_8bit(x.bfloat16(), weight, bias, "gelu"))


@pytest.mark.parametrize("implementation", LANGUAGES)
def test_opcheck(implementation):
    with running(implementation) as device:
        x, weight, bias = make(CASES[1], torch.float32, device)
        for arguments in ((x, *weight, bias, True), (x[None], *weight._replace(packed=None), None, False)):
            torch.library.opcheck(torch.ops.mvd_kernels.linear_8bit.default, arguments)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", FORMATS)
def test_compiles_into_one_graph(format, dtype):
    x, weight, bias = make(CASES[1], dtype, "cpu", format)
    check(x, weight, bias, "gelu", run=torch.compile(linear_8bit, fullgraph=True))
    layer = Linear8bit.from_linear(nn.Linear(64, 24), "gelu", format)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)(x)
    assert_close(compiled, layer(x).double(), 16 + 64, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_as_plain_pytorch(dtype):
    assert mvd_kernels.implementation("linear_8bit", "cpu", dtype)[0] == "reference"
    check(*make(CASES[1], dtype), "gelu")
    with use_impl("reference"):
        check(*make(CASES[1]), "gelu")


def test_fp8_is_plain_pytorch_on_a_cpu():
    arguments = make(CASES[1], format="fp8")
    check(*arguments, "gelu")
    with use_impl("cpp"), pytest.raises(ValueError, match="its cpp kernels take int8 weights"):
        linear_8bit(*arguments)


def test_it_is_frozen(language):
    x, weight, bias = make(CASES[1], torch.float32, language)
    scale = weight.scale.clone().requires_grad_()
    assert not linear_8bit(x, weight._replace(scale=scale), bias.requires_grad_()).requires_grad
    with pytest.raises(ValueError, match=r"x requires a gradient, .* call it under torch.no_grad"):
        linear_8bit(x.requires_grad_(), weight, bias)
    with torch.no_grad():
        linear_8bit(x, weight, bias)
    with torch.inference_mode():
        check(x * 1, weight, bias)


# ---- the module ----


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip(format, bias):
    first, second = (Linear8bit.from_linear(nn.Linear(33, 70, bias=bias), "gelu", format) for _ in range(2))
    x = torch.randn(5, 33)
    other = Linear8bit(33, 70, bias=bias, activation="gelu", format=format)
    assert set(first.state_dict()) == {"weight", "weight_scale"} | ({"bias"} if bias else set())
    assert not list(first.parameters())
    for layer in (other, second):
        assert not torch.equal(layer(x), first(x))
        layer.load_state_dict(first.state_dict())
        assert torch.equal(layer(x), first(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))


@pytest.mark.parametrize("format", FORMATS)
def test_module_is_the_function(format):
    linear = nn.Linear(33, 70).bfloat16()
    x = torch.randn(2, 5, 33)
    layer = Linear8bit.from_linear(linear, format=format)
    assert torch.equal(layer(x), linear_8bit(x, quantize_weight(linear.weight, format), linear.bias.detach()))
    assert repr(layer) == f"Linear8bit(33, 70, bias=True, activation=None, format='{format}')"


@pytest.mark.parametrize("format", FORMATS)
def test_casting_a_network_leaves_the_weights_alone(format):
    network = nn.Sequential(Linear8bit.from_linear(nn.Linear(33, 70), format=format), nn.LayerNorm(70))
    x, before = torch.randn(5, 33), copy.deepcopy(network[0])
    network.bfloat16()
    assert network[1].weight.dtype == torch.bfloat16
    assert {name: value.dtype for name, value in network[0].state_dict().items()} == {
        name: value.dtype for name, value in before.state_dict().items()
    }
    assert torch.equal(network[0](x), before(x))
    assert network[0].packed is None if before.packed is None else torch.equal(network[0].packed, before.packed)
    assert network[0].to("meta").weight.is_meta


# ---- errors ----

GOOD = make((7, 16, 24))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"x": torch.zeros(2, 15)},
            r"x is torch.float32 \[2, 15\] on cpu; it must be floating point \[..., 16\] on cpu",
        ),
        ({"x": torch.zeros(2, 16, dtype=torch.int64)}, r"x is torch.int64"),
        ({"x": torch.zeros(2, 16, device="meta")}, r"x is torch.float32 \[2, 16\] on meta"),
        ({"x": torch.tensor(1.0)}, r"x is torch.float32 \[\] on cpu"),
        ({"weight": torch.zeros(24, 16)}, r"weight is a Tensor; it must be what quantize_weight\(weight\) gives"),
        (
            {"weight": GOOD[1]._replace(values=torch.zeros(24, 16))},
            r"weight.values is torch.float32 \[24, 16\] on cpu; it must be torch.int8 or torch.float8_e4m3fn \[D, C\]",
        ),
        (
            {"weight": GOOD[1]._replace(scale=torch.zeros(23))},
            r"weight.scale is torch.float32 \[23\] on cpu; it must be torch.float32 \[24\] on cpu",
        ),
        ({"bias": torch.zeros(23)}, r"bias is torch.float32 \[23\] on cpu; it must be floating point \[24\] on cpu"),
        ({"bias": torch.zeros(24, dtype=torch.int32)}, r"bias is torch.int32"),
        ({"activation": "relu"}, r"activation is 'relu'; it must be None or 'gelu'"),
    ],
)
def test_error_sentences(change, sentence):
    good = dict(zip(("x", "weight", "bias"), GOOD, strict=True))
    with pytest.raises(ValueError, match=sentence):
        linear_8bit(**good | change)


@pytest.mark.parametrize(
    ("weight", "format", "sentence"),
    [
        (
            torch.zeros(3),
            None,
            r"weight is torch.float32 \[3\] on cpu; it must be floating point \[D, C\], C from 1 to",
        ),
        (torch.zeros(3, 0), None, r"weight is torch.float32 \[3, 0\]"),
        (torch.zeros(1, 65537), None, r"weight is torch.float32 \[1, 65537\] on cpu; .* to 65536"),
        (torch.zeros(3, 4, dtype=torch.int8), None, r"weight is torch.int8"),
        (torch.zeros(3, 4), "int4", r"format is 'int4'; it must be one of 'int8', 'fp8', or None to choose"),
    ],
)
def test_weights_that_are_refused(weight, format, sentence):
    with pytest.raises(ValueError, match=sentence):
        quantize_weight(weight, format)

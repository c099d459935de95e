"""Decoder inputs: every implementation against the plain one in fp64, its gradients, layouts and errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_checks import IMPLEMENTATIONS, assert_close, pairwise
from torch import Tensor, nn

from mvd_kernels import scatter_mask_tokens, use_impl
from mvd_kernels.scatter_mask_tokens import _reference

DTYPES = [torch.float32, torch.bfloat16]
LISTS = ("weights", "biases", "mask_tokens", "pos")
LEARNED = ("x", "weights", "biases", "mask_tokens", "pos")


def make_arguments(
    device: str,
    dtype: torch.dtype,
    batch: int = 2,
    visible: int = 3,
    masked: int = 9,
    width: int = 11,
    widths: tuple[int, ...] = (13, 8),
) -> dict:
    torch.manual_seed(0)
    tokens = visible + masked

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).to(device)

    order = torch.stack([torch.randperm(tokens) for _ in range(max(1, batch))])[:batch].to(device)
    return {
        "x": normal(batch, visible, width),
        "weights": [normal(one, width) / width**0.5 for one in widths],
        "biases": [normal(one) for one in widths],
        "mask_tokens": [normal(1, 1, one) for one in widths],
        "pos": [normal(1, tokens, one) for one in widths],
        "visible_index": order[:, :visible].sort(1).values,
        "masked_index": order[:, visible:].sort(1).values,
    }


def leaves(arguments: dict, names: tuple[str, ...]) -> tuple[dict, list[Tensor]]:
    """The arguments with those named requiring gradients, and these in order."""
    arguments, found = dict(arguments), []
    for name in names:
        many = arguments[name] if name in LISTS else [arguments[name]]
        fresh = [one.detach().requires_grad_() for one in many]
        arguments[name] = fresh if name in LISTS else fresh[0]
        found += fresh
    return arguments, found


def in_fp64(arguments: dict) -> dict:
    def widen(one: Tensor) -> Tensor:
        return one.detach().double() if one.is_floating_point() else one

    return {
        name: [widen(each) for each in one] if name in LISTS and one else one for name, one in arguments.items()
    } | {"x": widen(arguments["x"])}


def differentiate(
    function: Callable[..., list[Tensor]], arguments: dict, names: tuple[str, ...], grads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    arguments, inputs = leaves(arguments, names)
    outputs = function(**arguments)
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    return outputs, list(torch.autograd.grad(outputs, inputs, grads))


def random_gradients(arguments: dict) -> list[Tensor]:
    x, rows = arguments["x"], arguments["visible_index"].shape[1] + arguments["masked_index"].shape[1]
    return [
        torch.randn(len(x), rows, len(weight), device=x.device).to(arguments["weights"][0].dtype)
        for weight in arguments["weights"]
    ]


def check(arguments: dict, function: Callable[..., list[Tensor]] = scatter_mask_tokens) -> None:
    """Outputs and all gradients against the reference in fp64."""
    names = tuple(name for name in LEARNED if arguments[name] is not None)
    grads = random_gradients(arguments)
    outputs, found = differentiate(function, arguments, names, grads)
    with use_impl("reference"):
        expected, oracles = differentiate(scatter_mask_tokens, in_fp64(arguments), names, grads)
    x, masked = arguments["x"], arguments["masked_index"]
    for i, (out, want) in enumerate(zip(outputs, expected, strict=True)):
        assert out.dtype == x.dtype
        assert_close(out, want, x.shape[2], roundings=3, name=f"output {i}")
    length = max(x.shape[:2].numel(), masked.numel(), sum(len(weight) for weight in arguments["weights"]))
    for i, (got, want, leaf) in enumerate(zip(found, oracles, leaves(arguments, names)[1], strict=True)):
        assert got.dtype == leaf.dtype
        assert_close(got, want, length, roundings=2, name=f"gradient {i}")


# ---- what it means ----


def test_is_what_a_masked_autoencoder_does():
    arguments = make_arguments("cpu", torch.float64)
    x, visible, masked = arguments["x"], arguments["visible_index"], arguments["masked_index"]
    outputs = scatter_mask_tokens(**arguments)
    for i, out in enumerate(outputs):
        pos = arguments["pos"][i].expand(2, -1, -1)

        def at(index: Tensor, pos: Tensor = pos) -> Tensor:
            return pos[torch.arange(2)[:, None], index]

        seen = nn.functional.linear(x, arguments["weights"][i], arguments["biases"][i]) + at(visible)
        unseen = arguments["mask_tokens"][i].expand(2, 9, -1) + at(masked)
        torch.testing.assert_close(out, torch.cat([seen, unseen], 1))


def test_gradcheck_of_the_reference():
    arguments = make_arguments("cpu", torch.float64, visible=2, masked=2, width=3, widths=(2, 3))
    arguments, inputs = leaves(arguments, LEARNED)
    arguments["mask_tokens"] = [one.flatten() for one in arguments["mask_tokens"]]

    def function(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(_reference(**arguments | {"mask_tokens": [one.flatten() for one in arguments["mask_tokens"]]}))

    assert torch.autograd.gradcheck(function, inputs)


# ---- all implementations ----


@pairwise(kernels=IMPLEMENTATIONS, dtype=DTYPES, widths=[(13,), (13, 8), (5, 40, 1)])
def test_forward_and_backward(kernels, dtype, widths):
    check(make_arguments(kernels, dtype, widths=widths))


SIZES = [
    {"batch": 1, "visible": 1, "masked": 1},
    {"batch": 3, "visible": 7, "masked": 0, "width": 17},
    {"batch": 1, "visible": 2, "masked": 130, "widths": (257,)},  # several partial sums, several blocks of columns
    {"batch": 2, "visible": 70, "masked": 5, "width": 5, "widths": (7, 16)},
]


@pairwise(kernels=IMPLEMENTATIONS, dtype=DTYPES, change=SIZES)
def test_sizes(kernels, dtype, change):
    check(make_arguments(kernels, dtype, **change))


def test_half_precision_of_triton():
    with use_impl("triton"):
        check(make_arguments("cuda" if torch.cuda.is_available() else "cpu", torch.float16))


@pytest.mark.parametrize("given", ["none", "some"])
def test_without_biases(language, given):
    arguments = make_arguments(language, torch.float32)
    if given == "none":
        check(arguments | {"biases": None})
        return
    grads = random_gradients(arguments)
    names = ("x", "weights", "mask_tokens")
    whole, gradients = differentiate(scatter_mask_tokens, arguments | {"biases": None}, names, grads)
    bias = arguments["biases"][1].detach().requires_grad_()
    outputs, found = differentiate(scatter_mask_tokens, arguments | {"biases": [None, bias]}, names, grads)
    assert torch.equal(outputs[0], whole[0])
    assert_close(outputs[1][:, :3] - bias, whole[1][:, :3].double(), roundings=4)
    for got, want in zip(found, gradients, strict=True):
        assert torch.equal(got, want)


def test_one_decoder_without_lists(language):
    arguments = make_arguments(language, torch.float32, widths=(13,))
    single = arguments | {name: arguments[name][0] for name in LISTS}
    out = scatter_mask_tokens(**single)
    assert torch.equal(out, scatter_mask_tokens(**arguments)[0])
    flat = single | {"mask_tokens": single["mask_tokens"].flatten(), "pos": single["pos"][0]}
    assert torch.equal(out, scatter_mask_tokens(**flat))
    assert scatter_mask_tokens(**single | {"biases": None}).shape == out.shape


def test_frozen_positions_in_fp32_beside_bf16(language):
    arguments = make_arguments(language, torch.bfloat16)
    check(arguments | {"pos": [one.float() + 1e-4 for one in arguments["pos"]]})
    check(arguments | {"mask_tokens": [one.float() for one in arguments["mask_tokens"]]})


def test_strided_arguments(language):
    arguments = make_arguments(language, torch.float32)
    arguments["x"] = torch.randn(11, 2, 6, device=language).permute(1, 2, 0)[:, ::2]
    arguments["weights"] = [one.t().contiguous().t() for one in arguments["weights"]]
    arguments["biases"] = [torch.stack([one, one], 1)[:, 0] for one in arguments["biases"]]
    arguments["pos"] = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in arguments["pos"]]
    for name in ("visible_index", "masked_index"):
        arguments[name] = arguments[name].t().contiguous().t()
    check(arguments)
    grads = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in random_gradients(arguments)]
    _, found = differentiate(scatter_mask_tokens, arguments, LEARNED, grads)
    _, want = differentiate(scatter_mask_tokens, arguments, LEARNED, [grad.contiguous() for grad in grads])
    for got, one in zip(found, want, strict=True):
        assert torch.equal(got, one)


@pytest.mark.parametrize("change", [{"batch": 0}, {"visible": 0}], ids=str)
def test_nothing_visible(language, change):
    arguments = make_arguments(language, torch.float32, **change)
    outputs, found = differentiate(scatter_mask_tokens, arguments, LEARNED, random_gradients(arguments))
    assert [tuple(out.shape) for out in outputs] == [
        (len(arguments["x"]), len(arguments["pos"][0][0]), c) for c in (13, 8)
    ]
    for gradient, leaf in zip(found, leaves(arguments, LEARNED)[1], strict=True):
        assert gradient.shape == leaf.shape
    assert not any(gradient.any() for gradient in found[1:5])  # weights and biases
    if change == {"visible": 0}:
        check(arguments)


def test_positions_that_are_used_twice(language):
    arguments = make_arguments(language, torch.float32)
    arguments["masked_index"][0, :4] = arguments["visible_index"][0, 0]
    check(arguments)


@pytest.mark.parametrize("value", [1e4, 1e-41, float("nan"), float("inf")])
def test_extreme_values_stay_in_their_rows(kernels, value):
    arguments = make_arguments(kernels, torch.float32)
    arguments["x"][1, 2, 4] = value
    if value in (1e4, 1e-41):
        check(arguments)
        return
    for out in scatter_mask_tokens(**arguments):
        want = torch.zeros_like(out, dtype=torch.bool)
        want[1, 2] = True
        assert torch.equal(~out.isfinite(), want)


def test_nan_of_mask_tokens_and_positions_stays_in_its_place(kernels):
    arguments = make_arguments(kernels, torch.float32)
    arguments["mask_tokens"][0][..., 5] = float("nan")
    arguments["pos"][1][0, 6] = float("nan")
    first, second = scatter_mask_tokens(**arguments)
    want = torch.zeros_like(first, dtype=torch.bool)
    want[:, 3:, 5] = True
    assert torch.equal(first.isnan(), want)
    index = torch.cat([arguments["visible_index"], arguments["masked_index"]], 1)
    assert torch.equal(second.isnan(), (index == 6)[:, :, None].expand_as(second))


@pytest.mark.parametrize(
    "names", [("x",), ("weights",), ("biases",), ("mask_tokens",), ("pos",), ("x", "pos")], ids=str
)
def test_gradients_that_are_not_needed_are_not_computed(language, names):
    arguments = make_arguments(language, torch.float32)
    grads = random_gradients(arguments)
    sizes = {"x": 1} | dict.fromkeys(LISTS, 2)
    _, every = differentiate(scatter_mask_tokens, arguments, LEARNED, grads)
    _, found = differentiate(scatter_mask_tokens, arguments, names, grads)
    owners = [name for name in LEARNED for _ in range(sizes[name])]
    wanted = [one for one, owner in zip(every, owners, strict=True) if owner in names]
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)
    needed = [owner in names for owner in owners]
    indices = arguments["visible_index"], arguments["masked_index"]
    operator = torch.ops.mvd_kernels.scatter_mask_tokens_backward
    assert len(operator(grads, arguments["x"], arguments["weights"], *indices, needed, 12)) == sum(needed)


def test_one_output_alone_gives_gradients(language):
    arguments, (x, first, second, *_) = leaves(make_arguments(language, torch.float32), LEARNED)
    grad = random_gradients(arguments)[1]
    found = torch.autograd.grad(scatter_mask_tokens(**arguments)[1], (x, first, second), grad)
    assert_close(found[0], (grad[:, :3].double() @ second.double()), 8)
    assert not found[1].any()
    assert_close(found[2], torch.einsum("bnc,bne->ce", grad[:, :3].double(), x.double()), 6)


def test_results_are_the_same_bits_every_time(kernels):
    arguments = make_arguments(kernels, torch.bfloat16, masked=100)
    arguments["masked_index"][0, :4] = 3
    grads = random_gradients(arguments)
    first = differentiate(scatter_mask_tokens, arguments, LEARNED, grads)
    second = differentiate(scatter_mask_tokens, arguments, LEARNED, grads)
    for one, other in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(one, other)


@pytest.mark.cpp
def test_sums_do_not_depend_on_the_threads():
    arguments = make_arguments("cpu", torch.float32, visible=150, masked=300, widths=(200,))
    grads = random_gradients(arguments)
    names = ("biases", "mask_tokens", "pos")
    with use_impl("cpp"):
        _, found = differentiate(scatter_mask_tokens, arguments, names, grads)
        torch.set_num_threads(1)
        try:
            _, alone = differentiate(scatter_mask_tokens, arguments, names, grads)
        finally:
            torch.set_num_threads(2)
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one, other)


def test_autocast(language):
    arguments = make_arguments(language, torch.float32)
    names, grads = ("x", "weights", "mask_tokens", "pos"), random_gradients(arguments)
    with torch.autocast(language, torch.bfloat16):
        outputs, found = differentiate(scatter_mask_tokens, arguments, names, grads)
    cast = {"x": arguments["x"].bfloat16(), "weights": [one.bfloat16() for one in arguments["weights"]]}
    expected, gradients = differentiate(scatter_mask_tokens, arguments | cast, names, grads)
    for out, want in zip(outputs, expected, strict=True):
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, want)
    for got, want in zip(found, gradients, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.float())


def test_no_graph_without_gradients(language):
    arguments, _ = leaves(make_arguments(language, torch.float32), LEARNED)
    with torch.no_grad():
        assert all(out.grad_fn is None for out in scatter_mask_tokens(**arguments))


# ---- torch ----


def test_opcheck(language):
    arguments, _ = leaves(make_arguments(language, torch.float32), LEARNED)
    arguments["mask_tokens"] = [one.detach().flatten().requires_grad_() for one in arguments["mask_tokens"]]
    torch.library.opcheck(torch.ops.mvd_kernels.scatter_mask_tokens.default, tuple(arguments.values()))


def test_compiles_into_one_graph():
    compiled = torch.compile(scatter_mask_tokens, fullgraph=True)
    check(make_arguments("cpu", torch.float32), compiled)
    check(make_arguments("cpu", torch.float32, visible=5) | {"biases": None}, compiled)


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(6, 11)}, r"x is torch.float32 \[6, 11\] on cpu; it must be floating point \[B, Nv, E\]"),
        (
            {"x": torch.zeros(2, 4, 11)},
            r"visible_index is torch.int64 \[2, 3\] on cpu; it must be torch.int64 \[2, 4\]",
        ),
        ({"weights": []}, "0 weights, 2 biases, 2 mask_tokens, 2 pos; there must be one of each"),
        ({"mask_tokens": [torch.zeros(13)]}, "2 weights, 2 biases, 1 mask_tokens"),
        ({"mask_tokens": torch.zeros(2, 13)}, "weights is a list, but mask_tokens a tensor"),
        ({"weights": torch.zeros(13, 11)}, "weights is a tensor, but another argument is a list"),
        (
            {"weights": [torch.zeros(13, 10), torch.zeros(8, 11)]},
            r"weights\[0\] is torch.float32 \[13, 10\].*\[C, 11\]",
        ),
        (
            {"weights": [torch.zeros(13, 11), torch.zeros(8, 11).half()]},
            r"weights\[1\] is torch.float16 .*torch.float32",
        ),
        ({"biases": [None, torch.zeros(9)]}, r"biases\[1\] is torch.float32 \[9\].*floating point \[8\]"),
        ({"mask_tokens": [torch.zeros(13), torch.zeros(2, 8)]}, r"mask_tokens\[1\] is torch.float32 \[2, 8\].*\[8\]"),
        ({"pos": [torch.zeros(12, 13), torch.zeros(11, 8)]}, r"pos\[1\] is torch.float32 \[11, 8\].*\[12, 8\]"),
        (
            {"pos": [torch.zeros(2, 12, 13), torch.zeros(12, 8)]},
            r"pos\[0\] is torch.float32 \[2, 12, 13\].*\[1, N, 13\]",
        ),
        ({"masked_index": torch.zeros(2, 9)}, r"masked_index is torch.float32 \[2, 9\].*torch.int64 \[2, tokens\]"),
        pytest.param(
            {"masked_index": torch.full((2, 9), 12)},
            "masked_index holds 12; .*at least 0 and below 12",
            marks=pytest.mark.cpp,
        ),
        pytest.param({"visible_index": torch.full((2, 3), -1)}, "visible_index holds -1", marks=pytest.mark.cpp),
    ],
)
def test_error_sentences(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        scatter_mask_tokens(**make_arguments("cpu", torch.float32) | change)


def test_tokens_that_do_not_exist_are_nan_on_triton():
    arguments = make_arguments("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    with use_impl("triton"):
        right = scatter_mask_tokens(**arguments)
        arguments["visible_index"][0, 2], arguments["masked_index"][1, 0] = 12, -1
        outputs = scatter_mask_tokens(**arguments)
    for out, want in zip(outputs, right, strict=True):
        want[0, 2] = want[1, 3] = float("nan")
        assert torch.equal(out.nan_to_num(1e9), want.nan_to_num(1e9))

"""Residual addition and LayerNorm: every implementation against the reference in float64, forward and backward."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from op_checks import IMPLEMENTATIONS, LANGUAGES, assert_close, pairwise, running
from torch import Tensor, nn

import mvd_kernels
from mvd_kernels import AddLayerNorm, add_layer_norm, use_impl
from mvd_kernels._triton import interpreting

EPS = 1e-6
FLOATS = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 5), (2, 7, 1), (3, 5, 37), (2, 7, 64), (1, 13, 131), (2, 17, 96), (4, 3, 768), (3, 0, 8), (0, 4, 8)]


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normal numbers, the same ones whatever the dtype and device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def inputs(shape, dtype, device="cpu", wide_weight=False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, branch, weight and bias, leaves that want gradients."""
    kind = torch.float32 if wide_weight else dtype
    x, branch = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    weight, bias = (random(shape[-1], dtype=kind, device=device, seed=seed) for seed in (3, 4))
    return tuple(leaf.requires_grad_() for leaf in (x, branch, weight, bias))


def doubled(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().cpu().double().requires_grad_(t.requires_grad)


def interpreted(device: torch.device | str) -> bool:
    """Whether Triton's interpreter runs, which is slow."""
    return interpreting() and mvd_kernels.implementation("add_layer_norm", device)[0] == "triton"


def roundings(dtype: torch.dtype, device: torch.device) -> int:
    """Errors of half a unit in a result: two where the interpreter, unlike a GPU, cuts bf16 off."""
    return 2 if dtype == torch.bfloat16 and interpreted(device) else 1


def check_against_oracle(x, branch, weight, bias, scale, grad_sum, grad_normed, eps=EPS) -> None:
    """Both results and all gradients; what follows the rounded sum is held against the oracle at that very sum."""
    total, normed = add_layer_norm(x, branch, weight, bias, eps, scale)
    leaves = [leaf for leaf in (x, branch, weight, bias) if leaf is not None]
    gradients = torch.autograd.grad((total, normed), leaves, (grad_sum, grad_normed))

    x64, branch64, weight64, bias64, scale64 = map(doubled, (x, branch, weight, bias, scale))
    exact = x64
    if branch is not None:
        exact = x64 + (branch64 if scale is None else scale64.view(-1, *[1] * (x.ndim - 1)) * branch64)
    times = roundings(x.dtype, x.device)
    assert_close(total, exact, 1, times, "sum")
    at_sum = exact + (total.detach().cpu().double() - exact.detach())
    normed64 = F.layer_norm(at_sum, (x.shape[-1],), weight64, bias64, eps)
    width, rows = x.shape[-1], max(x.numel() // x.shape[-1], 1)
    assert_close(normed, normed64, width, times, "normed")
    leaves64 = [leaf for leaf in (x64, branch64, weight64, bias64) if leaf is not None]
    expected = torch.autograd.grad((exact, normed64), leaves64, (doubled(grad_sum), doubled(grad_normed)))
    lengths = [width] * (len(leaves) - 2) + [width * rows] * 2
    names = [
        name
        for name, leaf in zip(("x", "branch", "weight", "bias"), (x, branch, weight, bias), strict=True)
        if leaf is not None
    ]
    for name, actual, want, leaf, length in zip(names, gradients, expected, leaves, lengths, strict=True):
        assert actual.dtype == leaf.dtype
        assert_close(actual, want, length, times, f"gradient of {name}")


# ---- all implementations against the oracle ----


@pairwise(kernels=IMPLEMENTATIONS, dtype=FLOATS, shape=SHAPES, drop=[False, True])
def test_forward_and_backward(kernels, shape, dtype, drop):
    leaves = inputs(shape, dtype, kernels)
    scale = torch.tensor([0.0, 1.25, 1.0, 3.0])[: shape[0]].to(kernels) if drop else None
    gradients = (random(*shape, dtype=dtype, device=kernels, seed=seed) for seed in (5, 6))
    # A row of one entry has no variance: 1 / sqrt(eps) would multiply what rounding leaves of a difference of zero.
    check_against_oracle(*leaves, scale, *gradients, eps=1.0 if shape[-1] == 1 else EPS)


@pairwise(kernels=IMPLEMENTATIONS, dtype=FLOATS, shape=[(3, 37), (2, 5, 40), (64,)])
def test_without_a_branch(kernels, shape, dtype):
    x, _, weight, bias = inputs(shape, dtype, kernels)
    check_against_oracle(
        x, None, weight, bias, None, *(random(*shape, dtype=dtype, device=kernels, seed=s) for s in (5, 6))
    )
    assert add_layer_norm(x, None, weight, bias)[0] is x


def test_half_precision_on_triton():
    with running("triton") as device:
        leaves = inputs((2, 5, 48), torch.float16, device)
        check_against_oracle(
            *leaves, None, *(random(2, 5, 48, dtype=torch.float16, device=device, seed=s) for s in (5, 6))
        )


def test_fp32_weights_for_bf16_rows(kernels):
    leaves = inputs((2, 9, 40), torch.bfloat16, kernels, wide_weight=True)
    check_against_oracle(
        *leaves, None, *(random(2, 9, 40, dtype=torch.bfloat16, device=kernels, seed=s) for s in (5, 6))
    )


def test_gradients_of_many_rows_reach_weight_and_bias(kernels, monkeypatch):
    """More rows than blocks of partial sums, of which the last has fewer rows than the others, or none."""
    monkeypatch.setattr(sys.modules["mvd_kernels.add_layer_norm"], "_MOST_PROGRAMS", 4)
    shape = (1, 43 if interpreted(kernels) else 1100, 20)
    leaves = inputs(shape, torch.float32, kernels)
    check_against_oracle(*leaves, None, *(random(*shape, device=kernels, seed=seed) for seed in (5, 6)))


@pairwise(kernels=IMPLEMENTATIONS, dtype=FLOATS, size=[1e4, 1e-40])
def test_large_and_subnormal_numbers(kernels, dtype, size):
    x, branch, weight, bias = inputs((2, 3, 33), dtype, kernels)
    x, branch = ((leaf.detach() * size).requires_grad_() for leaf in (x, branch))
    gradients = (random(2, 3, 33, dtype=dtype, device=kernels, seed=s) for s in (5, 6))
    check_against_oracle(x, branch, weight, bias, None, *gradients)


def test_equal_entries_give_the_bias(kernels):
    _, _, weight, bias = inputs((1, 40), torch.float32, kernels)
    rows = torch.full((2, 40), 3.0, device=kernels)
    assert torch.equal(add_layer_norm(rows, rows, weight, bias)[1], bias.expand(2, -1))


@pairwise(kernels=IMPLEMENTATIONS, dtype=FLOATS, bits=[0x7FC00000, -1])  # a quiet NaN, and all ones
def test_nan_stays_in_its_row(kernels, dtype, bits):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    x, branch, weight, bias = inputs((1, 5, 37), dtype, kernels)
    poisoned = x.detach().clone()
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    poisoned[0, 2, 36] = torch.tensor(bits >> 16 if dtype == torch.bfloat16 else bits, dtype=kind).view(dtype)
    poisoned.requires_grad_()
    total, normed = add_layer_norm(poisoned, branch, weight, bias)
    assert total.isnan().nonzero().tolist() == [[0, 2, 36]]
    assert normed.isnan().all(-1).tolist() == [[False, False, True, False, False]]
    assert normed.isnan().sum() == 37
    grad_x, grad_weight = torch.autograd.grad((total, normed), (poisoned, weight), (normed.detach() * 0 + 1,) * 2)
    assert grad_x.isnan().all(-1).tolist() == [[False, False, True, False, False]]
    assert grad_x.isnan().sum() == 37
    assert grad_weight.isnan().all()

    spoilt = weight.detach().float()
    spoilt[4] = nan
    assert add_layer_norm(x, branch, spoilt, bias)[1].isnan().nonzero().tolist() == [[0, row, 4] for row in range(5)]
    scaled = add_layer_norm(x.expand(1, 5, 37), branch, weight, bias, EPS, nan[None].to(kernels))
    assert all(part.isnan().all() for part in scaled)


def test_views_with_strides(language):
    wide = random(4, 6, 2, 20, device=language, seed=1)
    x = wide[:, :, 0].detach().requires_grad_()
    branch = random(6, 4, 20, device=language, seed=2).transpose(0, 1).detach().requires_grad_()
    weight, bias = (random(2, 20, device=language, seed=s)[1].detach().requires_grad_() for s in (3, 4))
    scale = torch.rand(8, device=language)[::2]
    gradients = (
        random(20, 4, 6, device=language, seed=5).permute(1, 2, 0),
        random(1, 1, 20, device=language).expand(4, 6, 20),
    )
    assert not any(t.is_contiguous() for t in (x, branch, *gradients))
    check_against_oracle(x, branch, weight, bias, scale, *gradients)


# ---- gradients that are not needed or not there ----


NEEDS = [False, True]


@pairwise(implementation=LANGUAGES, x=NEEDS, branch=NEEDS, weight=NEEDS, bias=NEEDS, drop=NEEDS)
def test_only_the_gradients_that_are_needed(implementation, x, branch, weight, bias, drop):
    needed = (x, branch, weight, bias)
    with running(implementation) as device:
        every = inputs((2, 3, 17), torch.float32, device)
        leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(every, needed, strict=True)]
        scale = torch.tensor([0.0, 1.5], device=device) if drop else None
        grads = random(2, 3, 17, device=device, seed=5), random(2, 3, 17, device=device, seed=6)
        results = add_layer_norm(*leaves, EPS, scale)
        assert any(part.requires_grad for part in results) == any(needed)
        if any(needed):
            torch.autograd.backward(results, grads)
        # Where neither x nor branch wants a gradient, the sum has none to pass on, and that of weight is the same.
        want = torch.autograd.grad(add_layer_norm(*every, EPS, scale), every, grads)
    for leaf, expected, need in zip(leaves, want, needed, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("drop", [False, True])
def test_gradient_from_one_result_alone(language, drop):
    x, branch, weight, bias = inputs((2, 5, 37), torch.float32, language)
    scale = torch.tensor([0.0, 1.5], device=language) if drop else None
    grad = random(2, 5, 37, device=language, seed=5)
    total, normed = add_layer_norm(x, branch, weight, bias, EPS, scale)
    from_sum = torch.autograd.grad(total, (x, branch, weight, bias), grad, retain_graph=True, allow_unused=True)
    assert from_sum[0] is not None
    assert from_sum[2] is None
    assert torch.equal(from_sum[0], grad)
    assert torch.equal(from_sum[1], grad if scale is None else grad * scale.view(2, 1, 1))
    from_normed = torch.autograd.grad(normed, (x, branch, weight, bias), grad)
    zeros = torch.zeros_like(grad)
    want = torch.autograd.grad(
        add_layer_norm(x, branch, weight, bias, EPS, scale), (x, branch, weight, bias), (zeros, grad)
    )
    for ours, theirs in zip(from_normed, want, strict=True):
        assert torch.equal(ours, theirs)


def test_no_grad(language):
    leaves = inputs((2, 3, 17), torch.float32, language)
    with torch.no_grad():
        results = add_layer_norm(*leaves)
    assert not any(part.requires_grad for part in results)
    for ours, theirs in zip(results, add_layer_norm(*leaves), strict=True):
        assert torch.equal(ours, theirs)


# ---- determinism ----


def test_results_do_not_depend_on_run_or_threads(language):
    shape = (3, 7 if interpreted(language) else 150, 33)
    leaves = inputs(shape, torch.bfloat16, language)
    grads = tuple(random(*shape, dtype=torch.bfloat16, device=language, seed=seed) for seed in (5, 6))

    def everything() -> list[Tensor]:
        results = add_layer_norm(*leaves, EPS, torch.ones(3, device=language))
        return [*results, *torch.autograd.grad(results, leaves, grads)]

    first = everything()
    threads = torch.get_num_threads()
    try:
        for number in (threads, 1):
            torch.set_num_threads(number)
            for ours, again in zip(first, everything(), strict=True):
                assert torch.equal(ours, again)
    finally:
        torch.set_num_threads(threads)


# ---- the reference ----


@pytest.mark.parametrize("drop", [False, True])
def test_gradcheck_of_the_reference(drop):
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs((2, 3, 5), torch.float32)]
    scale = torch.tensor([0.5, 2.0]).double() if drop else None
    with use_impl("reference"):
        assert torch.autograd.gradcheck(lambda *args: add_layer_norm(*args, EPS, scale), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_run_the_reference(dtype):
    leaves = inputs((2, 3, 17), dtype)
    with use_impl("reference"):
        want = add_layer_norm(*leaves)
    for ours, theirs in zip(add_layer_norm(*leaves), want, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)


# ---- torch ----


def test_opcheck(language):
    x, branch, weight, bias = inputs((2, 3, 17), torch.float32, language)
    op = torch.ops.mvd_kernels.add_layer_norm.default
    backward = torch.ops.mvd_kernels.add_layer_norm_backward.default
    scale = torch.tensor([0.0, 1.5], device=language)
    torch.library.opcheck(op, (x, branch, weight, bias, EPS, scale))
    torch.library.opcheck(op, (x.detach(), branch, weight, bias.detach(), EPS, None))
    sums, _, mean, rstd = (part.detach() for part in op(x, branch, weight, bias, EPS, None))
    rest = (sums, weight.detach(), bias.detach(), mean, rstd)
    torch.library.opcheck(backward, (sums, sums, *rest, scale, True, True, True))
    torch.library.opcheck(backward, (None, sums, *rest, None, True, False, False))


@pytest.mark.cpp
@pytest.mark.parametrize("with_branch", [True, False])
def test_compiles_into_one_graph(with_branch):
    layer = AddLayerNorm(24)
    compiled = torch.compile(layer, fullgraph=True)
    for batch in (2, 3):
        x, branch, _, _ = inputs((batch, 5, 24), torch.float32)
        arguments = (x, branch, torch.linspace(0, 1, batch)) if with_branch else (x,)
        leaves = [*arguments[:2], *layer.parameters()]
        grads = random(batch, 5, 24, seed=5), random(batch, 5, 24, seed=6)
        results = [torch.autograd.grad(run(*arguments), leaves, grads) for run in (compiled, layer)]
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_autocast_takes_the_wider_dtype():
    x, branch, weight, bias = inputs((2, 3, 16), torch.float32)
    narrow = branch.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, normed = add_layer_norm(x, narrow, weight, bias)
    want = add_layer_norm(x, narrow.float(), weight, bias)
    assert torch.equal(total, want[0])
    assert torch.equal(normed, want[1])
    normed.sum().backward()
    assert narrow.grad.dtype == torch.bfloat16


def test_module_exchanges_checkpoints_with_layer_norm():
    stock, ours = nn.LayerNorm(12, eps=EPS), AddLayerNorm(12)
    assert [(name, p.shape) for name, p in ours.named_parameters()] == [
        (n, p.shape) for n, p in stock.named_parameters()
    ]
    nn.init.normal_(stock.weight)
    nn.init.normal_(stock.bias)
    ours.load_state_dict(stock.state_dict())
    x, branch, _, _ = inputs((2, 3, 12), torch.float32)
    total, normed = ours(x, branch)
    torch.testing.assert_close(total, x + branch)
    torch.testing.assert_close(normed, stock(x + branch))
    torch.testing.assert_close(ours(x)[1], stock(x))
    assert repr(ours) == "AddLayerNorm(12, eps=1e-06)"
    assert AddLayerNorm(4, dtype=torch.float64, device="meta").weight.is_meta


@pytest.mark.cpp
def test_dispatch():
    assert "add_layer_norm" in mvd_kernels.operators()
    assert mvd_kernels.implementation("add_layer_norm", "cpu", torch.bfloat16)[0] == "cpp"
    name, why = mvd_kernels.implementation("add_layer_norm", "cpu", torch.float64)
    assert name == "reference"
    assert "its cpp kernels take float32, bfloat16, not float64" in why


# ---- errors ----

X = torch.zeros(2, 3, 8)
D = torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"x": X.long()}, r"x is torch.int64 \[2, 3, 8\] on cpu; it must be floating point \[..., D\]"),
        (
            {"x": torch.tensor(1.0)},
            r"x is torch.float32 \[\] on cpu; it must be floating point \[..., D\], D at least 1",
        ),
        ({"x": X[..., :0]}, r"x is torch.float32 \[2, 3, 0\] on cpu; .* D at least 1"),
        (
            {"branch": X[:1]},
            r"branch is torch.float32 \[1, 3, 8\] on cpu; it must be torch.float32 \[2, 3, 8\] on cpu",
        ),
        (
            {"branch": X.bfloat16()},
            r"branch is torch.bfloat16 \[2, 3, 8\] on cpu; it must be torch.float32 \[2, 3, 8\]",
        ),
        (
            {"branch": X.to("meta")},
            r"branch is torch.float32 \[2, 3, 8\] on meta; it must be torch.float32 \[2, 3, 8\] on cpu",
        ),
        (
            {"weight": D[:7]},
            r"weight is torch.float32 \[7\] on cpu; it must be torch.float32 \[8\] on cpu",
        ),
        ({"bias": D.bfloat16()}, r"bias is torch.bfloat16 \[8\] on cpu; it must be torch.float32 \[8\] on cpu"),
        ({"bias": D.to("meta")}, r"bias is torch.float32 \[8\] on meta; it must be torch.float32 \[8\] on cpu"),
        ({"eps": -1e-6}, "eps is -1e-06; it must be at least 0"),
        ({"eps": float("nan")}, "eps is nan; it must be at least 0"),
        (
            {"scale": torch.ones(3)},
            r"scale is torch.float32 \[3\] on cpu; it must be floating point \[2\] on cpu",
        ),
        ({"scale": torch.ones(2).long()}, r"scale is torch.int64 \[2\] on cpu"),
        (
            {"scale": torch.ones(2), "branch": None},
            "scale is given without a branch; it must be None where branch is None",
        ),
        ({"scale": torch.ones(2, requires_grad=True)}, r"scale requires a gradient, .* pass scale.detach\(\)"),
        (
            {"x": D, "branch": D, "scale": torch.ones(8)},
            r"scale is given for x \[8\]; it must be None where x has no samples",
        ),
    ],
)
def test_error_sentences(arguments, sentence):
    accepted = {"x": X, "branch": X, "weight": D, "bias": D, "eps": EPS, "scale": None}
    with pytest.raises(ValueError, match=sentence):
        add_layer_norm(**accepted | arguments)

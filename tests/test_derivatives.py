"""Derivatives beyond the first backward, of every operator: right, or refused by name.

Transforms of torch.func and forward-mode AD run the reference; what they give is held against differences of the
function itself, or against the same thing done one at a time. Kernels that are forced refuse, and so does the second
derivative of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from op_checks import LANGUAGES, pairwise, running
from torch import Tensor
from torch.autograd import forward_ad

from mvd_kernels import (
    _dispatch,
    add_layer_norm,
    attention,
    embed_visible_tubes,
    linear_8bit,
    linear_smooth_l1,
    quantize_weight,
    scatter_mask_tokens,
    tube_mask,
    use_impl,
)

pytestmark = pytest.mark.filterwarnings("ignore:mvd_kernels runs plain PyTorch instead of its own kernels")
VISIBLE, MASKED = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1, 3], [0, 2]])


class Case(NamedTuple):
    """An operator as a function of floats to one tensor, and the shapes of these."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in self.shapes)


def _norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat(add_layer_norm(x, branch, weight, bias, scale=torch.tensor([0.5, 2.0], device=x.device)), -1)


def _embed(video: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    return embed_visible_tubes(video, weight, bias, pos, VISIBLE.to(video.device))


def _loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    target = torch.arange(48, device=x.device).view(2, 4, 6) * 0.1
    return linear_smooth_l1(x, weight, bias, target.to(x.dtype), VISIBLE.to(x.device), normalize_target=True)


def _scatter(x: Tensor, first: Tensor, second: Tensor, bias: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    lists = [first, second], [bias, None], [mask_token, mask_token * 2], [pos, pos * pos]
    return torch.cat(scatter_mask_tokens(x, *lists, VISIBLE.to(x.device), MASKED.to(x.device)), -1)


CASES = {
    "add_layer_norm": Case(_norm, ((2, 3, 16), (2, 3, 16), (16,), (16,))),
    "attention": Case(attention, ((2, 3, 2, 16),) * 3),
    "embed_visible_tubes": Case(_embed, ((2, 3, 2, 8, 8), (5, 3, 2, 4, 4), (5,), (1, 4, 5))),
    "linear_smooth_l1": Case(_loss, ((2, 2, 8), (6, 8), (6,))),
    "scatter_mask_tokens": Case(_scatter, ((2, 2, 8), (6, 8), (6, 8), (6,), (6,), (1, 4, 6))),
}
over_cases = pytest.mark.parametrize("name", CASES)


def scalar(name: str) -> Callable[..., Tensor]:
    return lambda *inputs: CASES[name].function(*inputs).square().sum()


def jvp(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    return torch.func.jvp(function, inputs, tangents)[1]


def dual(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad(), forward_ad.dual_level():  # gradients are another matter
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, tangents))).tangent


# Attention's kernels for a GPU are libraries'.
FORCED = [(name, one) for name in CASES for one in LANGUAGES if (name, one) != ("attention", "triton")]
over_forced = pytest.mark.parametrize(("name", "implementation"), FORCED)


# ---- right, where nothing is forced ----


@pairwise(name=list(CASES), forward_mode=[jvp, dual], impl=["chosen", "reference"])
def test_forward_mode_gives_the_slope(name, forward_mode, impl):
    inputs, tangents = CASES[name].inputs(), CASES[name].inputs(seed=1)
    step = 1e-5
    above, below = (
        CASES[name].function(*(x + sign * t for x, t in zip(inputs, tangents, strict=True))) for sign in (step, -step)
    )
    expected = (above - below) / (2 * step)
    narrow = [tuple(x.float() for x in one) for one in (inputs, tangents)]
    if impl == "reference":
        with use_impl("reference"):
            found = forward_mode(CASES[name].function, *narrow)
    else:
        found = forward_mode(CASES[name].function, *narrow)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@over_cases
def test_vmap_is_a_loop(name):
    many = [CASES[name].inputs(torch.float32, seed) for seed in range(3)]
    found = torch.func.vmap(CASES[name].function)(*map(torch.stack, zip(*many, strict=True)))
    expected = torch.stack([CASES[name].function(*one) for one in many])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@over_cases
def test_gradients_per_sample_are_a_loop(name):
    many = [CASES[name].inputs(torch.float32, seed) for seed in range(3)]
    which = tuple(range(len(many[0])))
    found = torch.func.vmap(torch.func.grad(scalar(name), which))(*map(torch.stack, zip(*many, strict=True)))
    leaves = [[x.requires_grad_() for x in one] for one in many]
    expected = [torch.autograd.grad(scalar(name)(*one), one) for one in leaves]
    for got, want in zip(found, map(torch.stack, zip(*expected, strict=True)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@over_cases
def test_the_hessian_is_the_slope_of_the_gradient(name):
    inputs = CASES[name].inputs()
    first, rest = inputs[0], inputs[1:]
    found = torch.func.hessian(lambda x: scalar(name)(x, *rest))(first)
    direction, step = CASES[name].inputs(seed=1)[0], 1e-6

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(scalar(name)(x, *rest), x)[0]

    expected = (gradient(first + step * direction) - gradient(first - step * direction)) / (2 * step)
    product = torch.einsum("ij,j->i", found.reshape(first.numel(), -1), direction.flatten()).view_as(expected)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@over_cases
def test_the_reference_may_be_differentiated_twice(name):
    inputs = [x.requires_grad_() for x in CASES[name].inputs()]
    with use_impl("reference"):
        assert torch.autograd.gradgradcheck(CASES[name].function, inputs, fast_mode=True)


@over_forced
def test_a_batch_of_gradients_is_a_loop(name, implementation):
    """torch.autograd.grad(..., is_grads_batched=True) maps over the kernel's backward alone."""
    with running(implementation) as device:
        inputs = [x.to(device).requires_grad_() for x in CASES[name].inputs(torch.float32)]
        out = CASES[name].function(*inputs)
        grads = torch.randn(3, *out.shape, device=device)
        if name in ("embed_visible_tubes", "scatter_mask_tokens"):  # torch maps over no operator that gives a list
            with pytest.raises(RuntimeError, match=f"Batching rule not implemented for mvd_kernels::{name}_backward"):
                torch.autograd.grad(out, inputs, grads, is_grads_batched=True)
            return
        expected = [torch.autograd.grad(out, inputs, one, retain_graph=True) for one in grads]
        found = torch.autograd.grad(out, inputs, grads, is_grads_batched=True)
        for got, want in zip(found, map(torch.stack, zip(*expected, strict=True)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_masks_of_a_batch_of_batches():
    samples = torch.arange(6).view(3, 2)
    found = torch.func.vmap(lambda one: tube_mask(3, 1, one, (2, 4, 4), 0.75).visible)(samples)
    assert torch.equal(found, torch.stack([tube_mask(3, 1, one, (2, 4, 4), 0.75).visible for one in samples]))


def test_the_reference_takes_over_with_one_warning():
    _dispatch._warn_once.cache_clear()
    inputs = CASES["add_layer_norm"].inputs(torch.float32)
    with pytest.warns(
        RuntimeWarning, match="plain PyTorch instead of its own kernels: torch.func's transforms"
    ) as seen:
        jvp(_norm, inputs, inputs)
        jvp(_norm, inputs, inputs)
    assert len(seen) == 1
    chosen = _dispatch.choose(_dispatch._operators["add_layer_norm"], "cpu", torch.float32, transformed=True)
    assert chosen == ("reference", _dispatch.TRANSFORMED)


# ---- refused, where kernels are forced ----


def mapped(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], _tangents: tuple[Tensor, ...]) -> Tensor:
    return torch.func.vmap(function)(*(x[None] for x in inputs))


def gradient(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], _tangents: tuple[Tensor, ...]) -> Tensor:
    return torch.func.grad(lambda x: function(x, *inputs[1:]).sum())(inputs[0])


@over_forced
def test_forced_kernels_refuse_transforms(name, implementation):
    with running(implementation) as device:
        inputs = tuple(x.to(device) for x in CASES[name].inputs(torch.float32))
        sentence = (
            rf"{name} cannot run as .* see through plain PyTorch only; run this call under .*use_impl\(.reference"
        )
        for transform in (jvp, dual, mapped, gradient):
            with pytest.raises(ValueError, match=sentence):
                transform(CASES[name].function, inputs, inputs)


@over_forced
def test_the_second_derivative_is_refused(name, implementation):
    """Also where the incoming gradient is a constant, and by torch.autograd.grad as well as by backward()."""
    with running(implementation) as device:
        inputs = [x.to(device).requires_grad_() for x in CASES[name].inputs(torch.float32)]
        gradients = torch.autograd.grad(CASES[name].function(*inputs).sum(), inputs, create_graph=True)
        penalty = sum(one.square().sum() for one in gradients)
        sentence = rf"the kernels of {name} have no second derivative; call it under mvd_kernels.use_impl\(.reference"
        with pytest.raises(ValueError, match=sentence):
            torch.autograd.grad(penalty, inputs, allow_unused=True, retain_graph=True)
        with pytest.raises(ValueError, match=sentence):
            penalty.backward()


@over_forced
def test_gradients_with_create_graph_are_the_gradients(name, implementation):
    with running(implementation) as device:
        inputs = [x.to(device).requires_grad_() for x in CASES[name].inputs(torch.float32)]
        out = CASES[name].function(*inputs)
        plain = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
        with_graph = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        assert all(map(torch.equal, plain, with_graph))


@over_forced
def test_a_tangent_in_the_backward_is_refused(name, implementation):
    with running(implementation) as device:
        inputs = [x.to(device).requires_grad_() for x in CASES[name].inputs(torch.float32)]
        out = CASES[name].function(*inputs)
        with forward_ad.dual_level(), pytest.raises(ValueError, match=f"a tangent came to the backward of {name}"):
            grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
            torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("implementation", ["reference", *LANGUAGES])
@pytest.mark.parametrize("forward_mode", [jvp, dual])
def test_frozen_layers_have_no_tangent(implementation, forward_mode):
    """The reference's would be that of rounded numbers, whose slope is zero almost everywhere."""
    weight = quantize_weight(torch.randn(6, 8))
    x = (torch.randn(2, 8),)
    with use_impl(implementation.partition("-")[0]):
        with pytest.raises(ValueError, match="x carries a tangent, and linear_8bit has no derivative"):
            forward_mode(lambda x: linear_8bit(x, weight), x, x)
        with pytest.raises(ValueError, match="x requires a gradient, which a frozen layer"):
            torch.func.grad(lambda x: linear_8bit(x, weight).sum())(*x)


def test_frozen_layers_beside_what_is_differentiated():
    weight, x = quantize_weight(torch.randn(6, 8)), torch.randn(3, 2, 8)
    found = jvp(lambda t: t * linear_8bit(x, weight).sum(), (torch.ones(()),), (torch.ones(()),))
    torch.testing.assert_close(found, linear_8bit(x, weight).sum())
    mapped_over = torch.func.vmap(lambda one: linear_8bit(one, weight))(x)
    torch.testing.assert_close(mapped_over, linear_8bit(x, weight))


# ---- under torch.compile ----


@over_cases
def test_compiled_transforms(name):
    """aot_eager: which implementation runs is decided before code is generated."""
    inputs, tangents = (CASES[name].inputs(torch.float32, seed) for seed in (0, 1))

    def both(inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        many = tuple(torch.stack([x, t]) for x, t in zip(inputs, tangents, strict=True))
        return jvp(CASES[name].function, inputs, tangents), torch.func.vmap(CASES[name].function)(*many)

    torch.compiler.reset()
    # Not dynamic: torch does not map over F.linear's weight where sizes are symbols.
    found = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=False)(inputs, tangents)
    for got, want in zip(found, both(inputs, tangents), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.cpp
@over_cases
def test_compiled_functions_under_transforms(name):
    inputs, tangents = (CASES[name].inputs(torch.float32, seed) for seed in (0, 1))
    compiled = torch.compile(CASES[name].function, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), CASES[name].function(*inputs), rtol=1e-4, atol=1e-4)
    for forward_mode in (dual, jvp):
        found, want = (forward_mode(one, inputs, tangents) for one in (compiled, CASES[name].function))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    with use_impl("cpp"), pytest.raises(ValueError, match=f"{name} cannot run as 'cpp'"):
        dual(torch.compile(CASES[name].function, backend="aot_eager"), inputs, tangents)


@over_cases
def test_compiled_functions_are_differentiated_once(name):
    torch.compiler.reset()
    inputs = [x.requires_grad_() for x in CASES[name].inputs(torch.float32)]
    out = torch.compile(CASES[name].function, backend="aot_eager")(*inputs)
    gradients = torch.autograd.grad(out.sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        sum(one.square().sum() for one in gradients).backward()

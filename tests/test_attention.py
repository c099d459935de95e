"""Attention of all instruction sets against the plain formula in float64; and what it leaves to libraries."""

from __future__ import annotations

import pytest
import torch
from op_checks import CPP, CUDA, assert_close, pairwise, running
from torch import Tensor

import mvd_kernels
from mvd_kernels import attention, use_impl
from mvd_kernels.attention import _reference

CASES = [  # B, Nq, Nk, H, D
    (2, 50, 50, 3, 64),
    (1, 1, 1, 1, 16),
    (1, 7, 7, 2, 48),
    (2, 197, 193, 1, 80),  # one past a block of keys, a cls token
    (1, 97, 385, 1, 128),  # one past two blocks of either
    (1, 13, 211, 2, 96),
    (3, 96, 192, 1, 32),  # whole blocks
    (1, 5, 3, 2, 112),
]
FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture(params=CPP)
def kernels(request: pytest.FixtureRequest):
    with running(request.param):
        yield


def make(case: tuple[int, ...], dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, heads, width = case
    generator = torch.Generator().manual_seed(hash(case) % 2**32)
    q = torch.randn(batch, queries, heads, width, generator=generator) * spread
    kv = torch.randn(batch, keys, 2, heads, width, generator=generator)
    return q.to(dtype), *kv.to(dtype).unbind(2)


def leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def check(inputs: tuple[Tensor, ...], scale: float | None = None, function=attention) -> None:
    """Output and gradients of a random output gradient against float64."""
    ours, exact = leaves(inputs), leaves(inputs, torch.float64)
    actual = function(*ours, scale)
    expected = _reference(*exact, inputs[0].shape[3] ** -0.5 if scale is None else scale)
    gradient = torch.randn_like(actual)
    length = max(inputs[0].shape[1], inputs[1].shape[1]) + inputs[0].shape[3]
    # Roundings in bf16: a weight and the result; backward, the output inside delta as well. A sum of products with
    # rounded weights may cancel, so a row's error is held against the tensor's largest entry.
    assert_close(actual.flatten(), expected.flatten(), 16 * length, 3, "output")
    grads = torch.autograd.grad(actual, ours, gradient), torch.autograd.grad(expected, exact, gradient.double())
    for name, got, want in zip("qkv", *grads, strict=True):
        assert got.dtype == inputs[0].dtype, name
        # A single key has weight 1 whatever its score: what is left of the scores' gradients is their rounding.
        terms = 1.0 if inputs[1].shape[1] == 1 else 0.0
        assert_close(got.flatten(), want.flatten(), 16 * length, 8, f"gradient of {name}", terms)


@pairwise(kernels=CPP, dtype=FLOATS, case=CASES)
def test_against_the_formula(kernels, case, dtype):
    check(make(case, dtype))


@pairwise(kernels=CPP, dtype=FLOATS, scale=[0.0, -0.3, 2.0])
def test_other_scales(kernels, dtype, scale):
    check(make((1, 20, 230, 2, 32), dtype), scale)


def test_sharp_rows(kernels):
    """Scores of +-1e4 leave one key per query; nothing overflows, nor does a gradient."""
    q, k, v = make((2, 9, 400, 2, 64), torch.float32, spread=1e4)
    out = attention(*leaves((q, k, v)))
    best = torch.einsum("bqhd,bkhd->bqhk", q.double(), k.double()).argmax(-1)
    expected = v.gather(1, best[..., None].expand(-1, -1, -1, 64))
    assert_close(out, expected.double(), 64)
    grads = torch.autograd.grad(attention(*(inputs := leaves((q, k, v)))), inputs, torch.randn_like(q))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_inputs_average_the_values(kernels, dtype):
    q, k, v = (x * 1e-38 for x in make((1, 5, 300, 1, 32), dtype))
    v = torch.randn(v.shape).to(dtype)
    assert_close(attention(q, k, v), v.double().mean(1, keepdim=True).expand(-1, 5, -1, -1), 300, 3)


def test_nan_reaches_what_depends_on_it_and_nothing_else(kernels):
    q, k, v = make((2, 60, 200, 2, 64), torch.float32)
    clean = attention(q, k, v)
    q[0, 7, 1, 3] = float("nan")
    out = attention(q, k, v)
    assert out[0, 7, 1].isnan().all()
    out[0, 7, 1] = clean[0, 7, 1]
    assert torch.equal(out, clean)
    q[0, 7, 1, 3], k[1, 199, 0, 5] = 0.0, float("nan")
    out = attention(q, k, v)
    assert out[1, :, 0].isnan().all() and not out[0].isnan().any() and not out[1, :, 1].isnan().any()
    k[1, 199, 0, 5], v[0, 11, 0, 2] = 0.0, float("nan")
    out = attention(q, k, v)
    assert out[0, :, 0, 2].isnan().all() and out.isnan().sum() == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_read_in_place(kernels, dtype):
    """The views of a packed projection, heads before tokens, every other token, a last dimension with a stride."""
    packed = torch.randn(2, 61, 3, 2, 32).to(dtype)
    check(packed.unbind(2))
    check(tuple(x.transpose(1, 2) for x in torch.randn(3, 2, 2, 61, 32).to(dtype)))
    check(tuple(x[:, ::2] for x in packed.unbind(2)))
    check(tuple(x[..., ::2] for x in packed.unbind(2)))
    q, k, v = packed.unbind(2)
    expanded = v[:, :1].expand(-1, 61, -1, -1)
    assert torch.equal(attention(q, k, expanded), attention(q, k, expanded.contiguous()))


def test_the_gradient_may_have_strides(kernels):
    q, k, v = leaves(make((1, 9, 9, 2, 16), torch.float32))
    gradient = torch.randn(1, 2, 9, 16).transpose(1, 2)
    of_view, of_copy = (
        torch.autograd.grad(attention(q, k, v), (q, k, v), g) for g in (gradient, gradient.contiguous())
    )
    assert all(map(torch.equal, of_view, of_copy))
    assert torch.autograd.grad(attention(q, k, v).sum(), q)[0].shape == q.shape  # an expanded gradient


@pytest.mark.parametrize("shape", [(0, 5, 2, 32), (2, 0, 2, 32)])
def test_empty(kernels, shape):
    q = torch.randn(shape, requires_grad=True)
    kv = torch.randn(shape[0], 4, 2, 32, requires_grad=True)
    out = attention(q, kv, kv)
    assert out.shape == shape
    grads = torch.autograd.grad(out, (q, kv), torch.ones_like(out))
    assert not grads[0].numel() and not grads[1].any()


def test_threads_and_repetition_change_nothing(kernels):
    inputs = leaves(make((1, 300, 300, 1, 64), torch.bfloat16))
    gradient = torch.randn(1, 300, 1, 64).bfloat16()

    def run() -> list[Tensor]:
        out = attention(*inputs)
        return [out, *torch.autograd.grad(out, inputs, gradient)]

    before = torch.get_num_threads()
    first = run()
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, first, run()))
    finally:
        torch.set_num_threads(before)


def test_only_what_is_needed_has_a_graph(kernels):
    q, k, v = make((1, 4, 4, 1, 16), torch.float32)
    assert not attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not attention(*leaves((q, k, v))).requires_grad
    k.requires_grad_()
    (grad,) = torch.autograd.grad(attention(q, k, v).sum(), k)
    assert grad.shape == k.shape


def test_autocast(kernels):
    inputs = make((1, 4, 6, 1, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*leaves(inputs))
        assert torch.equal(out, attention(*(x.bfloat16() for x in inputs)))
    assert out.dtype == torch.bfloat16


# ---- torch ----


def test_opcheck(kernels):
    inputs = leaves(make((2, 5, 7, 2, 32), torch.float32))
    torch.library.opcheck(torch.ops.mvd_kernels.attention.default, (*inputs, 0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(dtype):
    check(make((2, 21, 40, 2, 32), dtype), function=torch.compile(attention, fullgraph=True))


def test_gradcheck_of_the_reference():
    inputs = leaves(make((1, 3, 4, 2, 5), torch.float64))
    assert torch.autograd.gradcheck(lambda *x: _reference(*x, 0.7), inputs)


# ---- dispatch ----


@pytest.mark.cpp
def test_who_runs():
    assert mvd_kernels.implementation("attention", "cpu", torch.bfloat16)[0] == "cpp"
    name, why = mvd_kernels.implementation("attention", "cpu", torch.float16)
    assert name == "sdpa" and "its cpp kernels take float32, bfloat16, not float16" in why


@pytest.mark.parametrize(
    ("width", "dtype"), [(40, torch.float32), (160, torch.float32), (64, torch.float16), (8, torch.float64)]
)
def test_what_the_kernels_do_not_take_goes_to_torch(width, dtype):
    check(make((1, 20, 30, 2, width), dtype))


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_forced(name):
    with use_impl(name):
        check(make((1, 20, 30, 2, 32), torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_on_cuda(case, dtype):
    inputs = tuple(x.cuda() for x in make(case, dtype))
    assert mvd_kernels.implementation("attention", "cuda")[0] in ("xformers", "sdpa")
    check(inputs)


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"q": torch.zeros(2, 5, 32)},
            r"q is torch.float32 \[2, 5, 32\] on cpu; it must be floating point \[B, Nq, H, D\]",
        ),
        ({"q": torch.zeros(2, 5, 3, 32, dtype=torch.int64)}, r"q is torch.int64 \[2, 5, 3, 32\]"),
        (
            {"k": torch.zeros(2, 7, 4, 32)},
            r"k is torch.float32 \[2, 7, 4, 32\] on cpu; it must be torch.float32 \[2, Nk, 3, 32\]",
        ),
        (
            {"v": torch.zeros(2, 6, 3, 32)},
            r"v is torch.float32 \[2, 6, 3, 32\] on cpu; it must be torch.float32 \[2, 7, 3, 32\]",
        ),
        ({"v": torch.zeros(2, 7, 3, 32).bfloat16()}, r"v is torch.bfloat16"),
        (
            {"k": torch.zeros(2, 0, 3, 32), "v": torch.zeros(2, 0, 3, 32)},
            r"k is torch.float32 \[2, 0, 3, 32\] .*at least 1",
        ),
        ({"k": torch.zeros(2, 7, 3, 32, device="meta")}, r"k is .* on meta; it must be .* on cpu"),
    ],
)
def test_error_sentences(change, sentence):
    good = {"q": torch.zeros(2, 5, 3, 32), "k": torch.zeros(2, 7, 3, 32), "v": torch.zeros(2, 7, 3, 32)}
    with pytest.raises(ValueError, match=sentence):
        attention(**good | change)

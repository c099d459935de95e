"""Softmax attention without its matrix of scores in memory, forward and backward.

Shapes: B samples, N tokens (Nq queries, Nk keys), H heads, D entries of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_kernels._dispatch import Operator, autocast_dtype, once_differentiable
from mvd_kernels._token_rows import describe

_CPP = (torch.float32, torch.bfloat16)
_CPP_STEP, _CPP_LARGEST = 16, 128  # head widths of the C++ kernels: multiples, up to
_XFORMERS = (torch.float16, torch.bfloat16, torch.float32)


# ---- reference ----


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.to(wide)).to(q.dtype)


# ---- libraries, which bring their own backward ----


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    try:
        return memory_efficient_attention(q, k, v, scale=scale)
    except NotImplementedError:  # none of its kernels takes this shape on this GPU
        return _sdpa(q, k, v, scale)


# ---- C++ ----


def _cpp(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.mvd_kernels.attention_cpp(q, k, v, scale)


def _cpp_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.mvd_kernels.attention_backward_cpp(grad, q, k, v, out, lse, scale)


# ---- registration ----

_operator = Operator(
    "attention",
    reference=_reference,
    cpp=_cpp,
    xformers=_xformers,
    sdpa=_sdpa,
    dtypes={"cpp": _CPP, "xformers": _XFORMERS},
)
_differentiable = {"reference": _reference, "sdpa": _sdpa, "xformers": _xformers}


@torch.library.custom_op("mvd_kernels::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> output [B, Nq, H, D], log-sum-exp of the scores fp32 [B, H, Nq] (base 2)."""
    return _cpp(q, k, v, scale)


@_attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float):
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("mvd_kernels::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _cpp_backward(grad, q, k, v, out, lse, scale)


@_attention_backward.register_fake
def _attention_backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, saved: tuple[Tensor, ...], grad: Tensor, _grad_lse):
    return *_attention_backward(grad, *saved, ctx.scale), None


_attention.register_autograd(once_differentiable("attention", _backward), setup_context=_setup_context)


# ---- public ----


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of every query to all keys of its head: softmax(scale q k^T) v (arXiv 1706.03762).

    Scores are fp32 and exist a block at a time (FlashAttention, arXiv 2205.14135); sums are fp32; in bf16 a softmax
    weight is rounded to bf16 before it is multiplied with the values. There is no mask and no dropout.

    On the CPU the kernels take fp32 and bf16 with D a multiple of 16 up to 128; on CUDA it is xformers'
    `memory_efficient_attention`. What those do not take goes to torch's `scaled_dot_product_attention`.

    Args:
        q: float [B, Nq, H, D].
        k, v: like q, [B, Nk, H, D] with Nk at least 1. Any strides: the views of a packed projection,
            `qkv.view(B, N, 3, H, D).unbind(2)`, are read where they are.
        scale: 1 / sqrt(D) by default.

    Returns:
        [B, Nq, H, D] in the dtype of q (autocast's, where it is on).

    Raises:
        ValueError: if the shapes, dtypes or devices do not fit each other.
    """
    _check(q, k, v)
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    width = q.shape[3]
    scale = width**-0.5 if scale is None else float(scale)
    implementation = _operator.name_for(q)
    if implementation == "cpp":
        if width % _CPP_STEP == 0 and width <= _CPP_LARGEST:
            return _attention(q, k, v, scale)[0]
        implementation = "sdpa"
    return _differentiable[implementation](q, k, v, scale)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or not q.is_floating_point() or q.shape[3] == 0:
        raise ValueError(f"q is {describe(q)}; it must be floating point [B, Nq, H, D]")
    batch, _, heads, width = q.shape
    for name, x in (("k", k), ("v", v)):
        fits = x.ndim == 4 and (x.shape[0], *x.shape[2:]) == (batch, heads, width) and x.shape[1] == k.shape[1] > 0
        if not fits or x.dtype != q.dtype or x.device != q.device:
            wanted = f"[{batch}, Nk, {heads}, {width}]"
            raise ValueError(
                f"{name} is {describe(x)}; it must be {q.dtype} {wanted} on {q.device}, Nk at least 1 and that of k"
            )

"""Softmax attention without its matrix of scores in memory, forward and backward.

Shapes: B samples, N tokens (Nq queries, Nk keys), H heads, D entries of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_kernels._checks import FLOAT, Checks
from mvd_kernels._dispatch import autocast_dtype
from mvd_kernels._operator import Operator

_CHECKS = Checks(q=(FLOAT, "B Nq H D+"), k=("q", "B Nk+ H D"), v=("q", "B Nk H D"))
_CPP = (torch.float32, torch.bfloat16)
_XFORMERS = (torch.float16, torch.bfloat16, torch.float32)


# ---- what it gives ----


def _outputs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> output [B, Nq, H, D], log-sum-exp of the scores fp32 [B, H, Nq] (base 2)."""
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> those of q, k and v."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


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


# ---- declaration ----


def _save(ctx, arguments, outputs) -> tuple[Tensor, ...]:
    *qkv, ctx.scale = arguments
    return *qkv, *outputs


def _differentiate(ctx, saved, needed, grad):
    return _backward.run(ctx.kernels, grad, *saved, ctx.scale)


_backward = Operator("_attention_backward", _gradients, cpp=True)
_operator = Operator(
    "attention",
    _outputs,
    reference=_reference,
    cpp=True,
    xformers=_xformers,
    sdpa=_sdpa,
    dtypes={"cpp": _CPP, "xformers": _XFORMERS},
    limits={"cpp": ("heads of 16, 32, .. 128 entries", lambda q, *_: q.shape[3] % 16 == 0 and q.shape[3] <= 128)},
    results=1,
    save=_save,
    gradients=_differentiate,
)


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
    _CHECKS(q, k, v)
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    return _operator(q, k, v, q.shape[3] ** -0.5 if scale is None else float(scale))

"""Residual addition and LayerNorm in one pass over memory, forward and backward.

Shapes: b sample, d channel (D), r row: every leading index of x but the last, so R = x.numel() / D.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd_kernels import shapes
from mvd_kernels._checks import FLOAT, OPTIONAL, Checks
from mvd_kernels._dispatch import autocast_dtype
from mvd_kernels._operator import Operator
from mvd_kernels._triton import cdiv, launch, power_of_2, tl, triton

_HALVES = (torch.float16, torch.bfloat16)
_CHECKS = Checks(
    x=(FLOAT, "... D+"), branch=("x", "like x", OPTIONAL), weight=("x or float32", "D"), bias=("x or float32", "D")
)
_SCALE = Checks(scale=(FLOAT, "B"))
_DTYPES = {"cpp": (torch.float32, torch.bfloat16), "triton": (torch.float32, *_HALVES)}


# ---- what it gives ----


def _outputs(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> sum (without entries where there is no branch: it would be x), normed, mean [R], 1 / deviation [R]."""
    rows = x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape if branch is not None else 0),
        x.new_empty(x.shape),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


def _gradients(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    need_x: bool,
    need_branch: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, branch, weight, bias, those not needed without entries."""
    width = total.shape[-1] if need_affine else 0
    return (
        total.new_empty(total.shape if need_x else 0),
        total.new_empty(total.shape if need_branch else 0),
        weight.new_empty(width),
        bias.new_empty(width),
    )


# ---- reference ----


def _reference(x, branch, weight, bias, eps, scale) -> tuple[Tensor, Tensor]:
    """-> sum, normed."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x
    if branch is not None:
        total = (x.to(wide) + _scaled(branch.to(wide), scale)).to(x.dtype)
    return total, F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    return branch if scale is None else branch * scale.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


# ---- Triton: a row at a time ----


@triton.jit
def _forward_kernel(
    x_ptr,
    branch_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    width,
    rows_per_sample,
    eps,
    HAS_BRANCH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < width
    start = r.to(tl.int64) * width
    x_d = tl.load(x_ptr + start + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch_d = tl.load(branch_ptr + start + d, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            branch_d *= tl.load(scale_ptr + r // rows_per_sample)
        rounded = (x_d + branch_d).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + start + d, rounded, mask=inside)
        x_d = rounded.to(tl.float32)

    mean = tl.sum(x_d, axis=0) / width
    centred_d = tl.where(inside, x_d - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred_d * centred_d, axis=0) / width + eps)
    tl.store(mean_ptr + r, mean)
    tl.store(rstd_ptr + r, rstd)
    weight_d = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    bias_d = tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
    normed_d = centred_d * rstd * weight_d + bias_d
    tl.store(normed_ptr + start + d, normed_d.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])  # else built anew for some batch sizes
def _backward_kernel(
    grad_sum_ptr,
    grad_normed_ptr,
    sum_ptr,
    scale_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_branch_ptr,
    partial_ptr,  # [2, programs, D]: what the program's rows give to the gradients of weight and bias
    rows,
    width,
    rows_per_sample,
    rows_per_program,
    HAS_GRAD_SUM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_BRANCH: tl.constexpr,
    NEED_AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < width
    weight_d = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    grad_weight_d = tl.zeros([BLOCK], tl.float32)
    grad_bias_d = tl.zeros([BLOCK], tl.float32)
    first = program * rows_per_program
    at = first.to(tl.int64) * width + d
    for r in range(first, tl.minimum(first + rows_per_program, rows)):
        rstd = tl.load(rstd_ptr + r)
        sum_d = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_d = tl.load(grad_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h_d = tl.where(inside, (sum_d - tl.load(mean_ptr + r)) * rstd, 0.0)
        if NEED_AFFINE:
            grad_weight_d += grad_d * h_d
            grad_bias_d += grad_d
        if NEED_X or NEED_BRANCH:
            grad_d *= weight_d
            along_h = tl.sum(grad_d * h_d, axis=0) / width
            grad_d = (grad_d - tl.sum(grad_d, axis=0) / width - h_d * along_h) * rstd
            if HAS_GRAD_SUM:
                grad_d += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if NEED_X:
            tl.store(grad_x_ptr + at, grad_d.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if NEED_BRANCH:
            if HAS_SCALE:
                grad_d *= tl.load(scale_ptr + r // rows_per_sample)
            tl.store(grad_branch_ptr + at, grad_d.to(grad_branch_ptr.dtype.element_ty), mask=inside)
        at += width
    if NEED_AFFINE:
        tl.store(partial_ptr + program.to(tl.int64) * width + d, grad_weight_d, mask=inside)
        tl.store(partial_ptr + (tl.num_programs(0) + program).to(tl.int64) * width + d, grad_bias_d, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _sum_columns_kernel(
    partial_ptr,  # [2, programs, D]
    grad_weight_ptr,
    grad_bias_ptr,
    programs,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (d < width)[None, :]
    weight_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        there = inside & (row < programs)
        weight_sum += tl.load(partial_ptr + row.to(tl.int64) * width + d[None, :], mask=there, other=0.0)
        bias_sum += tl.load(partial_ptr + (programs + row).to(tl.int64) * width + d[None, :], mask=there, other=0.0)
    grad_weight_d = tl.sum(weight_sum, axis=0).to(grad_weight_ptr.dtype.element_ty)
    grad_bias_d = tl.sum(bias_sum, axis=0).to(grad_bias_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + d, grad_weight_d, mask=d < width)
    tl.store(grad_bias_ptr + d, grad_bias_d, mask=d < width)


_MOST_PROGRAMS = 1024  # of the backward kernel: eight on each of 128 multiprocessors
_LEAST_ROWS = 8  # per program, else the partial sums weigh as much as the rows
_SUM_TILE = {"ROWS": 64, "COLUMNS": 16}


def _row_options(width: int, entries: int) -> dict[str, int]:
    """A block holds a row, a thread so few of its entries that all arrays of the kernel stay in registers."""
    block = power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // (32 * entries), 1), 16)}


def _rows_per_sample(x: Tensor, scale: Tensor | None) -> int:
    return max(x.numel() // x.shape[-1] // max(scale.shape[0], 1), 1) if scale is not None else 1


def _launch(x, branch, weight, bias, eps, scale):
    x = x.contiguous()
    branch = branch if branch is None else branch.contiguous()
    outputs = total, normed, mean, rstd = _outputs(x, branch, weight, bias, eps, scale)
    width = x.shape[-1]
    if x.numel():
        absent = normed  # any pointer: the kernel does not use it
        launch(
            _forward_kernel,
            (mean.numel(),),
            x,
            absent if branch is None else branch,
            mean if scale is None else scale,
            weight.contiguous(),
            bias.contiguous(),
            absent if branch is None else total,
            normed,
            mean,
            rstd,
            width,
            _rows_per_sample(x, scale),
            eps,
            flops=8 * x.numel(),
            moves=(x, branch, scale, weight, bias, *outputs),
            HAS_BRANCH=branch is not None,
            HAS_SCALE=scale is not None,
            **_row_options(width, 16),
        )
    return outputs


def _launch_backward(grad_sum, grad_normed, total, weight, bias, mean, rstd, scale, need_x, need_branch, need_affine):
    total, grad_normed = total.contiguous(), grad_normed.contiguous()
    grad_sum = grad_sum if grad_sum is None else grad_sum.contiguous()
    outputs = grad_x, grad_branch, grad_weight, grad_bias = _gradients(
        grad_sum, grad_normed, total, weight, bias, mean, rstd, scale, need_x, need_branch, need_affine
    )
    rows, width = mean.numel(), total.shape[-1]
    if not rows:
        return grad_x, grad_branch, grad_weight.zero_(), grad_bias.zero_()
    rows_per_program = max(cdiv(rows, _MOST_PROGRAMS), _LEAST_ROWS)
    programs = cdiv(rows, rows_per_program)
    partial = mean.new_empty(2, programs, width) if need_affine else mean
    launch(
        _backward_kernel,
        (programs,),
        total if grad_sum is None else grad_sum,
        grad_normed,
        total,
        mean if scale is None else scale,
        weight.contiguous(),
        mean,
        rstd,
        grad_x if need_x else total,
        grad_branch if need_branch else total,
        partial,
        rows,
        width,
        _rows_per_sample(total, scale),
        rows_per_program,
        flops=14 * total.numel(),
        moves=(grad_sum, grad_normed, total, scale, weight, mean, rstd, grad_x, grad_branch, partial),
        HAS_GRAD_SUM=grad_sum is not None,
        HAS_SCALE=scale is not None,
        NEED_X=need_x,
        NEED_BRANCH=need_branch,
        NEED_AFFINE=need_affine,
        **_row_options(width, 8),
    )
    if need_affine:
        work = {"flops": partial.numel(), "moves": (partial, grad_weight, grad_bias)}
        grid = (cdiv(width, _SUM_TILE["COLUMNS"]),)
        launch(_sum_columns_kernel, grid, partial, grad_weight, grad_bias, programs, width, **work, **_SUM_TILE)
    return outputs


def offline_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Two clips in the encoders, of the visible tokens, and in the decoders, of all."""
    encoders = {name: (shapes.VISIBLE, recipe.width) for name, recipe in shapes.RECIPES.items()}
    widths = [recipe.decoder_width for recipe in shapes.RECIPES.values()]
    decoders = {f"decoder {width}": (shapes.TOKENS, width) for width in widths}
    layers, dtypes = encoders | decoders, (torch.bfloat16, torch.float32)
    for (name, (tokens, width)), dtype in itertools.product(layers.items(), dtypes):
        x = torch.empty(2, tokens, width, dtype=dtype, device="meta")
        weight, per_row = x[0, 0], torch.empty(2 * tokens, device="meta")
        case = f"{name} {str(dtype)[6:]}"
        # The first norm has no branch; drop path scales it, and then its gradient is not that of x.
        for kind, branch, scale in (("alone", None, None), ("add", x, None), ("drop path", x, per_row[:2])):
            needs = (True, scale is not None, True)
            yield f"{case} {kind}", partial(_launch, x, branch, weight, weight, 1e-6, scale)
            norm = (weight, weight, per_row, per_row)
            yield f"{case} {kind}", partial(_launch_backward, branch, x, x, *norm, scale, *needs)


# ---- declaration ----


def _save(ctx, arguments, outputs) -> tuple[Tensor | None, ...]:
    (x, branch, weight, bias, _, scale), (total, _, mean, rstd) = arguments, outputs
    ctx.set_materialize_grads(False)
    ctx.has_branch = branch is not None
    return total if branch is not None else x, weight, bias, mean, rstd, scale


def _differentiate(ctx, saved, needed, grad_sum, grad_normed):
    (*norm, scale), (need_x, need_branch, need_weight, need_bias, *_) = saved, needed
    if not ctx.has_branch:
        grad_sum = None
    if grad_normed is None:
        return (grad_sum, _scaled(grad_sum, scale) if need_branch else None) if grad_sum is not None else ()
    # Without a scale both have the same gradient.
    one_for_both = scale is None
    needs = need_x or (need_branch and one_for_both), need_branch and not one_for_both, need_weight or need_bias
    grad_x, grad_branch, grad_weight, grad_bias = _backward.run(
        ctx.kernels, grad_sum, grad_normed, *norm, scale, *needs
    )
    return (
        grad_x if need_x else None,
        (grad_x if one_for_both else grad_branch) if need_branch else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
    )


_backward = Operator(
    "_add_layer_norm_backward", _gradients, cpp=True, triton=_launch_backward, dtypes=_DTYPES, like="total"
)
_operator = Operator(
    "add_layer_norm",
    _outputs,
    reference=_reference,
    cpp=True,
    triton=_launch,
    dtypes=_DTYPES,
    results=2,
    save=_save,
    gradients=_differentiate,
)


# ---- public ----


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and LayerNorm (arXiv 1607.06450): the sum for the next addition, and its normalised rows.

        sum    = x + scale[b] * branch
        normed = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias      over the last dimension

    The sum is computed in fp32 and rounded once, to x's dtype; mean and variance (the biased one) are those of the
    rounded sum, in fp32. Gradients reach x, branch, weight and bias from both results, in one pass over the rows;
    those of weight and bias are summed in fp32, in an order that does not depend on the number of threads.

    Under autocast x and branch are brought to the wider of their dtypes, as `x + branch` would be, and so is normed
    (torch's own layer_norm gives fp32 on CUDA, which the next matrix product casts back).

    Args:
        x: float [..., D].
        branch: like x, or None for LayerNorm alone.
        weight: [D], in x's dtype or float32.
        bias: [D], in x's dtype or float32.
        eps: added to the variance, at least 0.
        scale: float [B] where x is [B, ..., D], or None for 1: what drop path (arXiv 1603.09382) multiplies a sample's
            branch by, 0 or 1 / (1 - rate). It has no gradient.

    Returns:
        sum: like x; x itself where branch is None. normed: like x.

    Raises:
        ValueError: if an argument is not what is said above.
    """
    if branch is not None and branch.dtype != x.dtype and autocast_dtype(x.device) is not None:
        wider = torch.promote_types(x.dtype, branch.dtype)
        x, branch = x.to(wider), branch.to(wider)
    _CHECKS(x, branch, weight, bias)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must be at least 0")
    if scale is not None:
        _check_scale(x, branch, scale)
        scale = scale.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    total, normed = _operator(x, branch, weight, bias, eps, scale)
    return x if branch is None else total, normed


class AddLayerNorm(nn.Module):
    """`add_layer_norm` with a weight and a bias of its own, named as `torch.nn.LayerNorm` names them.

    A checkpoint of LayerNorm(dim) loads into AddLayerNorm(dim) and back. `forward(x)` is LayerNorm alone.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, branch: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> x + scale * branch and its LayerNorm, both like x."""
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps, scale)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


def _check_scale(x: Tensor, branch: Tensor | None, scale: Tensor) -> None:
    if branch is None:
        raise ValueError("scale is given without a branch; it must be None where branch is None")
    if x.ndim < 2:
        raise ValueError(f"scale is given for x {list(x.shape)}; it must be None where x has no samples [B, ..., D]")
    _SCALE(scale, like=x, B=x.shape[0])
    if scale.requires_grad:
        raise ValueError("scale requires a gradient, which it does not have; pass scale.detach()")

"""A linear head and the smooth-L1 loss of its predictions, neither predictions nor gathered targets held in memory.

Shapes: B clips, M predicted tokens of N, C columns of the input, D of prediction and target; R = B * M rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_kernels import shapes
from mvd_kernels._checks import FLOAT, INDEX, OPTIONAL, Checks, describe
from mvd_kernels._dispatch import autocast_dtype
from mvd_kernels._operator import Operator
from mvd_kernels._triton import autotune, cdiv, interpreting, launch, power_of_2, tl, triton

TARGET_EPS = 1e-6
_CHECKS = Checks(
    x=(FLOAT, "B M C"),
    weight=("x", "D C"),
    bias=(FLOAT, "D", OPTIONAL),
    target=(FLOAT, "B N D"),
    index=(INDEX, "B M", OPTIONAL),
)


# ---- what it gives ----


def _outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    index: Tensor | None,
    beta: float,
    normalize: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> sum of the losses fp32 [], and its gradients by x, weight, bias (fp32); without entries where not needed."""
    return (
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        x.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32),
    )


# ---- reference ----


def _reference(x, weight, bias, target, index, beta, normalize, *_needs) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    prediction = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    if index is not None:
        target = target.gather(1, index[:, :, None].expand(-1, -1, target.shape[2]))
    target = target.to(wide)
    if normalize:
        target = F.layer_norm(target, target.shape[-1:], eps=TARGET_EPS)
    return F.smooth_l1_loss(prediction, target, reduction="sum", beta=beta)


# ---- Triton ----


@triton.jit
def _token_of(row, index_ptr, per_clip, tokens, inside, HAS_INDEX: tl.constexpr):
    """Rows of target [B * N, D]; -1 where the index names no token."""
    clip, place = row // per_clip, row % per_clip
    token = tl.load(index_ptr + row, mask=inside, other=0) if HAS_INDEX else place.to(tl.int64)
    return tl.where((token >= 0) & (token < tokens), clip.to(tl.int64) * tokens + token, -1)


@triton.jit
def _statistics_kernel(
    target_ptr,
    index_ptr,
    mean_ptr,
    rstd_ptr,
    per_clip,
    tokens,
    width,
    eps,
    HAS_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and 1 / standard deviation of each row's target."""
    row = tl.program_id(0)
    place = _token_of(row, index_ptr, per_clip, tokens, True, HAS_INDEX)
    column = tl.arange(0, BLOCK)
    inside = (column < width) & (place >= 0)
    target = tl.load(target_ptr + place * width + column, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(target, axis=0) / width
    centred = tl.where(inside, target - mean, 0.0)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps))


@autotune(
    [{"BLOCK_K": 32, "num_warps": 4, "num_stages": 4}, {"BLOCK_K": 64, "num_warps": 8, "num_stages": 3}],
    key=["depth", "width"],
)
@triton.jit(do_not_specialize=["rows"])  # else built anew for some batch sizes
def _loss_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    index_ptr,
    mean_ptr,
    rstd_ptr,
    gradient_ptr,  # [R, D], of the predictions
    loss_ptr,  # [row blocks, column blocks]
    bias_gradient_ptr,  # [row blocks, D]
    rows,
    width,
    depth,
    per_clip,
    tokens,
    beta,
    HAS_BIAS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # fp32 is split into three tf32 for each product, so half as many of them fit the registers.
    STEP: tl.constexpr = BLOCK_K // 2 if x_ptr.dtype.element_ty == tl.float32 else BLOCK_K
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = row < rows, column < width
    x_row = x_ptr + row.to(tl.int64)[:, None] * depth
    weight_row = weight_ptr + column.to(tl.int64)[None, :] * depth
    prediction = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, STEP):
        k = start + tl.arange(0, STEP)
        a = tl.load(x_row + k[None, :], mask=row_inside[:, None] & (k < depth)[None, :], other=0)
        b = tl.load(weight_row + k[:, None], mask=(k < depth)[:, None] & column_inside[None, :], other=0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        prediction = tl.dot(a, b, prediction, input_precision=PRECISION)
    if HAS_BIAS:
        prediction += tl.load(bias_ptr + column, mask=column_inside, other=0).to(tl.float32)[None, :]

    place = _token_of(row, index_ptr, per_clip, tokens, row_inside, HAS_INDEX)
    inside = row_inside[:, None] & column_inside[None, :]
    there = inside & (place >= 0)[:, None]
    target = tl.load(target_ptr + place[:, None] * width + column[None, :], mask=there, other=0).to(tl.float32)
    if NORMALIZE:
        mean = tl.load(mean_ptr + row, mask=row_inside, other=0)
        target = (target - mean[:, None]) * tl.load(rstd_ptr + row, mask=row_inside, other=0)[:, None]
    # The host does not wait to look at the indices: a token that does not exist makes the loss NaN.
    difference = tl.where(there, prediction - target, float("nan"))
    size = tl.abs(difference)
    small = size < beta
    divisor = tl.where(beta > 0, beta, 1.0)
    loss = tl.where(small, 0.5 * difference * difference / divisor, size - 0.5 * beta)
    loss = tl.where(inside, loss, 0.0)
    place_of_loss = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(loss_ptr + place_of_loss, tl.sum(loss))  # axis after axis does not compile for sm_100 in Triton 3.6
    if GRADIENT or BIAS_GRADIENT:
        sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
        gradient = tl.where(inside, tl.where(small, difference / divisor, sign), 0.0)
        if GRADIENT:
            at = gradient_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
        if BIAS_GRADIENT:
            sums = tl.sum(gradient, axis=0)
            tl.store(bias_gradient_ptr + tl.program_id(0) * width + column, sums, mask=column_inside)


_TILE = {"BLOCK_M": 64, "BLOCK_N": 128}


def _launch(x, weight, bias, target, index, beta, normalize, need_x, need_weight, need_bias):
    inputs, weight, target = x.flatten(0, 1).contiguous(), weight.contiguous(), target.contiguous()
    (rows, depth), width, (_, per_clip, _) = inputs.shape, weight.shape[0], x.shape
    grid = (cdiv(rows, _TILE["BLOCK_M"]), cdiv(width, _TILE["BLOCK_N"]))
    make = x.new_empty if rows and width else x.new_zeros  # else nothing writes them
    losses = make(grid, dtype=torch.float32)
    sums = make(grid[0] if need_bias else 0, width, dtype=torch.float32)
    need_gradient = need_x or need_weight
    gradient = x.new_empty((rows, width) if need_gradient else (0, width))
    if rows and width:
        absent, index = losses, index if index is None else index.contiguous()
        mean = rstd = absent
        place = (per_clip, target.shape[1])
        of_target = rows * width * target.element_size()
        if normalize:
            mean, rstd = x.new_empty(2, rows, dtype=torch.float32)
            launch(
                _statistics_kernel,
                (rows,),
                *(target, absent if index is None else index, mean, rstd, *place, width, TARGET_EPS),
                flops=6 * rows * width,
                moves=(of_target,),
                HAS_INDEX=index is not None,
                BLOCK=power_of_2(width),
            )
        launch(
            _loss_kernel,
            grid,
            *(inputs, weight, absent if bias is None else bias.contiguous(), target),
            *(absent if index is None else index, mean, rstd, gradient if need_gradient else absent, losses),
            *(sums if need_bias else absent, rows, width, depth, *place, float(beta)),
            flops=2 * rows * width * depth,
            moves=(inputs, weight, gradient, of_target),
            HAS_BIAS=bias is not None,
            HAS_INDEX=index is not None,
            NORMALIZE=normalize,
            GRADIENT=need_gradient,
            BIAS_GRADIENT=need_bias,
            # Three products of 19-bit floats stand for one of fp32, with its accuracy.
            PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
            WIDEN=interpreting() and x.dtype == torch.bfloat16,  # the interpreter's product takes no bf16
            **_TILE,
        )
    # These products are cuBLAS's: there is nothing around them to fuse, and one over all rows rounds once.
    grad_x = torch.mm(gradient, weight).view(x.shape) if need_x else x.new_empty(0)
    grad_weight = torch.mm(gradient.t(), inputs) if need_weight else weight.new_empty(0)
    return losses.sum(), grad_x, grad_weight, sums.sum(0) if need_bias else losses.new_empty(0)


def offline_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    on_meta = partial(torch.empty, device="meta")
    for name, recipe in shapes.RECIPES.items():
        depth, width = recipe.decoder_width, recipe.target_width
        for dtype in (torch.bfloat16, torch.float32):
            x = on_meta(2, shapes.MASKED, depth, dtype=dtype)
            target = on_meta(2, shapes.TOKENS, width, dtype=dtype)
            weight, bias = on_meta(width, depth, dtype=dtype), on_meta(width, dtype=dtype)
            index = on_meta(2, shapes.MASKED, dtype=torch.int64)
            for normalize in (False, True):
                case = f"{name} {str(dtype)[6:]}{' normalised' if normalize else ''}"
                yield case, partial(_launch, x, weight, bias, target, index, 1.0, normalize, True, True, True)


# ---- declaration ----


def _save(ctx, arguments, outputs) -> tuple[Tensor, ...]:
    bias = arguments[2]
    ctx.bias_dtype = None if bias is None else bias.dtype
    return outputs


def _differentiate(ctx, saved, needed, grad):
    found = [part * grad if wanted else None for part, wanted in zip(saved[1:], needed, strict=False)]
    return found if found[2] is None else (*found[:2], found[2].to(ctx.bias_dtype))


_operator = Operator(
    "linear_smooth_l1",
    _outputs,
    reference=_reference,
    cpp=True,
    triton=_launch,
    dtypes={
        "cpp": (torch.float32, torch.bfloat16),
        "triton": (torch.float32, torch.bfloat16, torch.float16),
    },
    results=1,
    save=_save,
    gradients=_differentiate,
)


# ---- public ----


def linear_smooth_l1(
    x: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    target: Tensor | Sequence[Tensor],
    index: Tensor | Sequence[Tensor | None] | None = None,
    beta: float = 1.0,
    normalize_target: bool = False,
    reduction: str = "mean",
) -> Tensor | list[Tensor]:
    """Smooth-L1 loss (arXiv 1504.08083) of a linear head's predictions against targets gathered at `index`:

        d = (x W^T + bias)[b, m] - target[b, index[b, m]]
        loss = mean or sum over all rows and columns of  d^2 / (2 beta) where |d| < beta, |d| - beta / 2 elsewhere

    The gradients of x, weight and bias are computed in the same pass, where they are needed, and kept instead of the
    predictions; backward only multiplies them. The difference and the loss are fp32. The target gets no gradient.

    Args:
        x: float [B, M, C].
        weight: [D, C] in the dtype of x.
        bias: float [D] or None.
        target: float [B, N, D], of any dtype, e.g. a teacher's; it may be an inference tensor.
        index: int64 [B, M], the target's tokens; None: all in order (M = N).
        beta: at least 0; 0 is the L1 loss.
        normalize_target: LayerNorm of every target row first, without affine, eps 1e-6.
        reduction: "mean" or "sum".
        Lists of x, weight, bias, target (and of index, or one for all) are several heads at once.

    Returns:
        float32 scalar, or a list with one for each head.

    Raises:
        ValueError: if an argument is not as said above. An index out of range raises on the CPU; on CUDA, where the
            host would have to wait to see it, the loss is NaN.
    """
    if not isinstance(x, Tensor):
        return [
            linear_smooth_l1(*head, beta, normalize_target, reduction)
            for head in _heads(x, weight, bias, target, index)
        ]
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum' (single losses are never in memory)")
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; it must be at least 0")
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.is_floating_point() and x.dtype != torch.float64:
        x, weight = x.to(dtype), weight.to(dtype)
    sizes = _CHECKS(x, weight, bias, target, index)
    if index is None and sizes["N"] != sizes["M"]:
        raise ValueError(f"target is {describe(target)}; without an index it must have the {sizes['M']} tokens of x")
    grad = torch.is_grad_enabled()
    needs = (grad and part is not None and part.requires_grad for part in (x, weight, bias))
    total = _operator(x, weight, bias, target.detach(), index, beta, normalize_target, *needs)
    return total if reduction == "sum" else total / (sizes["B"] * sizes["M"] * sizes["D"])


def _heads(*arguments: Tensor | Sequence[Tensor | None] | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Lists, and single values that hold for all, head by head."""
    counts = {len(one) for one in arguments if isinstance(one, (list, tuple))}
    if len(counts) != 1 or any(isinstance(one, Tensor) for one in arguments[:4]):
        given = ", ".join(str(len(one)) if isinstance(one, (list, tuple)) else "one" for one in arguments[:4])
        raise ValueError(f"there are {given} of x, weight, bias, target; with lists there must be one for every head")
    (count,) = counts
    yield from zip(*(one if isinstance(one, (list, tuple)) else [one] * count for one in arguments), strict=True)

"""Decoder inputs from encoder outputs: projected visible tokens, mask tokens, and the position of each.

Shapes: B clips; N tokens, Nv visible, Nm masked; E columns of the encoder, C of a decoder (each its own).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_kernels import shapes
from mvd_kernels._checks import FLOAT, INDEX, OPTIONAL, Checks
from mvd_kernels._dispatch import autocast_dtype
from mvd_kernels._operator import Operator
from mvd_kernels._token_rows import sum_rows, sum_rows_by_token
from mvd_kernels._triton import autotune, cdiv, launch, tl, triton

_ROWS = {
    "x": (FLOAT, "B Nv E"),
    "visible_index": (INDEX, "B Nv"),
    "masked_index": (INDEX, "B tokens"),
    "weights[]": ("x", "C. E"),
    "biases[]": (FLOAT, "C.", OPTIONAL),
    "mask_tokens[]": (FLOAT, "C. | 1 1 C."),
    "pos[]": (FLOAT, "N C. | 1 N C."),
}
_CHECKS = Checks(**_ROWS)


# ---- what it gives ----


def _outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    mask_tokens: Sequence[Tensor],
    pos: Sequence[Tensor],
    visible_index: Tensor,
    masked_index: Tensor,
) -> list[Tensor]:
    """Of each decoder; biases: one per decoder, or none at all; mask tokens [C]; pos [1, N, C]."""
    tokens = visible_index.shape[1] + masked_index.shape[1]
    return [x.new_empty(x.shape[0], tokens, weight.shape[0]) for weight in weights]


def _gradients(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    visible_index: Tensor,
    masked_index: Tensor,
    needed: Sequence[bool],
    tokens: int,
) -> list[Tensor]:
    """-> those of x, weights, and (fp32) biases, mask tokens and positions that are needed."""
    for_weights, for_biases, for_masks, for_pos = _by_decoder(needed, len(weights))
    vectors = [x.new_empty(len(one), dtype=torch.float32) for one in _chosen(weights, for_biases)]
    vectors += [x.new_empty(len(one), dtype=torch.float32) for one in _chosen(weights, for_masks)]
    tables = [x.new_empty(1, tokens, len(one), dtype=torch.float32) for one in _chosen(weights, for_pos)]
    of_weights = [one.new_empty(one.shape) for one in _chosen(weights, for_weights)]
    return [*([x.new_empty(x.shape)] if needed[0] else ()), *of_weights, *vectors, *tables]


def _by_decoder(needed: Sequence[bool], decoders: int) -> list[Sequence[bool]]:
    """Which weights, biases, mask tokens and positions need their gradients; needed[0] is that of x."""
    return [needed[1 + kind * decoders :][:decoders] for kind in range(4)]


def _chosen(tensors: Sequence[Tensor], flags: Sequence[bool]) -> list[Tensor]:
    return [one for one, flag in zip(tensors, flags, strict=True) if flag]


# ---- reference ----


def _take(pos: Tensor, index: Tensor) -> Tensor:
    """Rows of pos [1, N, C] at index [B, M] -> [B, M, C]."""
    return pos[0].index_select(0, index.flatten()).unflatten(0, index.shape)


def _reference(x, weights, biases, mask_tokens, pos, visible_index, masked_index) -> list[Tensor]:
    outputs = []
    for i, weight in enumerate(weights):
        bias = biases[i].to(weight.dtype) if biases else None
        seen = F.linear(x, weight, bias) + _take(pos[i], visible_index).to(weight.dtype)
        unseen = mask_tokens[i].to(weight.dtype) + _take(pos[i], masked_index).to(weight.dtype)
        outputs.append(torch.cat([seen, unseen], dim=1))
    return outputs


# ---- Triton ----
# The product is torch.mm's and one kernel writes all rows: nine tenths of them are mask tokens, which a product with a
# fused epilogue would leave to a second kernel, and what is saved is reading and writing the other tenth once.


@autotune(
    [
        {"BLOCK_R": 8, "BLOCK_C": 256, "num_warps": 4},
        {"BLOCK_R": 16, "BLOCK_C": 128, "num_warps": 4},
        {"BLOCK_R": 4, "BLOCK_C": 1024, "num_warps": 8},
    ],
    key=["width"],
)
@triton.jit(do_not_specialize=["count"])  # else built anew for some batch sizes
def _write_rows_kernel(
    product_ptr,
    bias_ptr,
    mask_token_ptr,
    pos_ptr,
    visible_ptr,
    masked_ptr,
    out_ptr,
    count,
    seen,
    unseen,
    width,
    tokens,
    BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [B, Nv + Nm, C] from product [B Nv, C]."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    clip, place = row // (seen + unseen), row % (seen + unseen)
    inside = row < count
    is_seen = place < seen
    token = tl.load(visible_ptr + clip.to(tl.int64) * seen + place, mask=inside & is_seen, other=0)
    token += tl.load(masked_ptr + clip.to(tl.int64) * unseen + place - seen, mask=inside & (place >= seen), other=0)
    valid = (token >= 0) & (token < tokens)

    columns = (column < width)[None, :]
    number = (clip.to(tl.int64) * seen + place)[:, None]
    at_seen = (inside & is_seen)[:, None] & columns
    projected = tl.load(product_ptr + number * width + column[None, :], mask=at_seen, other=0).to(tl.float32)
    if BIAS:
        projected += tl.load(bias_ptr + column, mask=column < width, other=0).to(tl.float32)[None, :]
    mask_token = tl.load(mask_token_ptr + column, mask=column < width, other=0).to(tl.float32)[None, :]
    position = tl.load(
        pos_ptr + token[:, None] * width + column[None, :], mask=(inside & valid)[:, None] & columns, other=0
    )
    value = tl.where(is_seen[:, None], projected, mask_token) + position.to(tl.float32)
    # The host does not wait to look at the indices: rows of tokens that do not exist are NaN.
    value = tl.where(valid[:, None], value, float("nan"))
    tl.store(out_ptr + row.to(tl.int64)[:, None] * width + column[None, :], value, mask=inside[:, None] & columns)


def _launch(x, weights, biases, mask_tokens, pos, visible_index, masked_index):
    visible, masked = visible_index.contiguous(), masked_index.contiguous()
    seen, unseen, outputs = visible.shape[1], masked.shape[1], []
    for i, weight in enumerate(weights):
        width, table = weight.shape[0], pos[i].contiguous()
        product = torch.mm(x.flatten(0, 1), weight.t())
        out = x.new_empty(len(x), seen + unseen, width)
        outputs.append(out)
        if not out.numel():
            continue
        rows = len(x) * (seen + unseen)
        launch(
            _write_rows_kernel,
            lambda meta, rows=rows, width=width: (
                cdiv(rows, meta["BLOCK_R"]),
                cdiv(width, meta["BLOCK_C"]),
            ),
            *(product, biases[i].contiguous() if biases else out, mask_tokens[i].contiguous(), table),
            *(visible, masked, out, rows, seen, unseen, width, table.shape[1]),
            flops=2 * out.numel(),
            moves=(product, out, table, visible, masked),
            BIAS=bool(biases),
        )
    return outputs


def _launch_backward(grads, x, weights, visible_index, masked_index, needed, tokens):
    grads, seen = [grad.contiguous() for grad in grads], visible_index.shape[1]
    for_weights, for_biases, for_masks, for_pos = _by_decoder(needed, len(weights))
    gradients, widths = [], [len(weight) for weight in weights]
    if needed[0] or any(for_weights) or any(for_biases):
        # The only copy: the visible rows of all decoders side by side, [B Nv, sum of C].
        rows = torch.cat([grad[:, :seen] for grad in grads], dim=2).flatten(0, 1)
    if needed[0]:
        # One product over the columns of all decoders sums their shares in fp32.
        gradients.append(torch.mm(rows, torch.cat(list(weights))).view(x.shape))
    if any(for_weights):
        parts = rows.split(widths, dim=1)
        gradients += [torch.mm(part.t(), x.flatten(0, 1)) for part in _chosen(parts, for_weights)]
    if any(for_biases):
        gradients += _chosen(torch.split_with_sizes_copy(sum_rows(rows[None]), widths), for_biases)
    gradients += [sum_rows(grad[:, seen:]) for grad in _chosen(grads, for_masks)]
    if any(for_pos):
        index = torch.cat([visible_index, masked_index], dim=1)
        gradients += [sum_rows_by_token(grad, index, 1, tokens) for grad in _chosen(grads, for_pos)]
    return gradients


def offline_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Two clips, and both decoders of MVD."""
    on_meta, tokens = partial(torch.empty, device="meta"), shapes.TOKENS
    for (name, recipe), dtype in itertools.product(shapes.RECIPES.items(), (torch.bfloat16, torch.float32)):
        width, decoder = recipe.width, recipe.decoder_width
        x, case = on_meta(2, shapes.VISIBLE, width, dtype=dtype), f"{name} {str(dtype)[6:]}"
        visible, masked = (on_meta(2, count, dtype=torch.int64) for count in (shapes.VISIBLE, shapes.MASKED))
        weights, vectors = [on_meta(decoder, width, dtype=dtype)] * 2, [on_meta(decoder, dtype=dtype)] * 2
        pos, grads = ([on_meta(count, tokens, decoder, dtype=dtype)] * 2 for count in (1, 2))
        yield case, partial(_launch, x, weights, vectors, vectors, pos, visible, masked)
        yield case, partial(_launch_backward, grads, x, weights, visible, masked, [True] * 9, tokens)


# ---- declaration ----

_DTYPES = {"cpp": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}


def _save(ctx, arguments, outputs) -> tuple[Tensor, ...]:
    x, weights, biases, mask_tokens, pos, visible_index, masked_index = arguments
    ctx.dtypes = [[one.dtype for one in kind] for kind in (weights, biases, mask_tokens, pos)]
    ctx.tokens = pos[0].shape[1]
    return x, visible_index, masked_index, *weights


def _differentiate(ctx, saved, needed, *grads):
    x, visible_index, masked_index, *weights = saved
    # Without biases their list is empty; the kernels want a flag for each decoder.
    flags = [list(kind) or [False] * len(weights) for kind in needed[1:5]]
    wanted = [needed[0], *(flag for kind in flags for flag in kind)]
    found = iter(_backward.run(ctx.kernels, list(grads), x, weights, visible_index, masked_index, wanted, ctx.tokens))
    of_x = next(found) if needed[0] else None
    gradients = [
        [next(found).to(dtype) if flag else None for flag, dtype in zip(kind, dtypes, strict=False)]
        for kind, dtypes in zip(flags, ctx.dtypes, strict=True)
    ]
    return of_x, *gradients


_backward = Operator(
    "_scatter_mask_tokens_backward", _gradients, cpp=True, triton=_launch_backward, dtypes=_DTYPES, like="x"
)
_operator = Operator(
    "scatter_mask_tokens",
    _outputs,
    reference=_reference,
    cpp=True,
    triton=_launch,
    dtypes=_DTYPES,
    save=_save,
    gradients=_differentiate,
)


# ---- public ----


def scatter_mask_tokens(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    biases: Tensor | Sequence[Tensor | None] | None,
    mask_tokens: Tensor | Sequence[Tensor],
    pos: Tensor | Sequence[Tensor],
    visible_index: Tensor,
    masked_index: Tensor,
) -> Tensor | list[Tensor]:
    """Inputs of masked autoencoders' decoders: out = [x W^T + bias + pos[visible] ; mask token + pos[masked]].

    The tokens of a clip are ordered visible first, then masked (VideoMAE, arXiv 2203.12602; MVD, arXiv 2212.04500,
    with two decoders on one encoder). Each output is written once; gradients go to x (summed over the decoders in
    fp32), every weight, bias and mask token, and to each table of positions that requires one.

    Args:
        x: [B, Nv, E], the encoder's output.
        weights: of each decoder [C, E], in the dtype of x: fp32, bf16 (fp16 on CUDA). Others run as plain PyTorch.
        biases: of each decoder [C] or None; or None for all.
        mask_tokens: of each decoder [C] or [1, 1, C].
        pos: of each decoder [N, C] or [1, N, C], fixed or learned.
        visible_index, masked_index: int64 [B, Nv] and [B, Nm], indices of tokens.
        With one decoder, tensors may stand for the lists; the result is then a tensor too.

    Returns:
        For each decoder [B, Nv + Nm, C] in the dtype of x (autocast's, where it is on). Sums are fp32.

    Raises:
        ValueError: if an argument is not as said above. An index out of range raises on the CPU; on CUDA, where the
            host would have to wait to see it, its row is NaN.
    """
    if isinstance(weights, Tensor):
        if lists := [type(one).__name__ for one in (biases, mask_tokens, pos) if isinstance(one, (list, tuple))]:
            raise ValueError(
                f"weights is a tensor, but another argument is a {lists[0]}; give only lists or only tensors"
            )
        one = scatter_mask_tokens(x, [weights], [biases], [mask_tokens], [pos], visible_index, masked_index)
        return one[0]
    biases = [None] * len(weights) if biases is None else biases
    _check_counts(weights, biases, mask_tokens, pos)
    dtype = autocast_dtype(x.device)
    if dtype and x.is_floating_point() and x.dtype != torch.float64:
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    _CHECKS(x, visible_index, masked_index, weights, biases, mask_tokens, pos)
    mask_tokens = [token if token.ndim == 1 else token.flatten() for token in mask_tokens]
    tables = [table if table.ndim == 3 else table[None] for table in pos]
    tables = [table if table.dtype in (x.dtype, torch.float32) else table.to(x.dtype) for table in tables]
    if any(bias is not None for bias in biases):
        biases = [x.new_zeros(len(w)) if bias is None else bias for bias, w in zip(biases, weights, strict=True)]
    else:
        biases = []
    return _operator(x, list(weights), biases, mask_tokens, tables, visible_index, masked_index)


def _check_counts(weights: Sequence, biases: Sequence, mask_tokens: Sequence, pos: Sequence) -> None:
    lists = {"weights": weights, "biases": biases, "mask_tokens": mask_tokens, "pos": pos}
    if mixed := [name for name, one in lists.items() if isinstance(one, Tensor)]:
        raise ValueError(f"weights is a list, but {mixed[0]} a tensor; give only lists or only tensors")
    if len({len(one) for one in lists.values()}) != 1 or not weights:
        counts = ", ".join(f"{len(one)} {name}" for name, one in lists.items())
        raise ValueError(f"there are {counts}; there must be one of each for every decoder, and at least one decoder")

"""What the operators on token matrices share on GPUs: Triton kernels that sum rows.

Shapes: B clips, R rows of a clip, C columns, N tokens. Sums are fp32 and in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvd_kernels._triton import autotune, cdiv, launch, tl, triton

_ROWS_PER_SUM = 128


@autotune([{"BLOCK": 128, "num_warps": 4}, {"BLOCK": 64, "num_warps": 4}], key=["width"])
@triton.jit(do_not_specialize=["rows", "per_part", "parts"])  # else built anew for some batch sizes
def _sum_rows_kernel(
    rows_ptr,
    sums_ptr,
    clip_stride,
    row_stride,
    rows,
    width,
    per_part,
    parts,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of `per_part` rows each: sums [clips, parts, width]."""
    place = tl.program_id(0).to(tl.int64)
    clip, part = place // parts, (place % parts).to(tl.int32)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = part * per_part, tl.minimum((part + 1) * per_part, rows)
    total = tl.zeros([STEP, BLOCK], tl.float32)
    for first in range(start, end, STEP):
        row = first + tl.arange(0, STEP)
        inside = (row < end)[:, None] & (column < width)[None, :]
        offset = row.to(tl.int64)[:, None] * row_stride + column[None, :]
        total += tl.load(rows_ptr + clip * clip_stride + offset, mask=inside, other=0).to(tl.float32)
    tl.store(sums_ptr + place * width + column, tl.sum(total, axis=0), mask=column < width)


def sum_rows(rows: Tensor) -> Tensor:
    """Sum of all rows [B, R, C] (C contiguous) -> fp32 [C], in two stages; in one, where there are few rows."""
    batch, count, width = rows.shape
    if not rows.numel():
        return rows.new_zeros(width, dtype=torch.float32)
    parts = cdiv(count, _ROWS_PER_SUM)
    total = rows.new_empty(width, dtype=torch.float32)
    partial = total if batch * parts == 1 else total.new_empty(batch, parts, width)
    stages = [(rows, partial, parts, count, _ROWS_PER_SUM)]
    if partial is not total:
        stages.append((partial.view(1, -1, width), total, 1, batch * parts, batch * parts))
    for source, target, parts, length, per_part in stages:
        programs = len(source) * parts
        launch(
            _sum_rows_kernel,
            lambda meta, programs=programs: (programs, cdiv(width, meta["BLOCK"])),
            *(source, target, source.stride(0), source.stride(1), length, width, per_part, parts),
            flops=source.numel(),
            moves=(source, target),
            STEP=16,
        )
    return total


def rows_of_tokens(index: Tensor, clips: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Which rows belong to each token: (order [B R], bounds [clips N + 1]).

    The rows order[bounds[i] : bounds[i + 1]] are those of token i % N of clip i // N, or of any clip where clips is 1.
    Indices out of range belong to no token.
    """
    key = index + torch.arange(len(index), device=index.device)[:, None] * (tokens if clips > 1 else 0)
    inside = (index >= 0) & (index < tokens)
    key, order = key.where(inside, clips * tokens).flatten().sort(stable=True)
    return order, torch.searchsorted(key, torch.arange(clips * tokens + 1, device=index.device))


@autotune([{"BLOCK": 128, "num_warps": 1}, {"BLOCK": 256, "num_warps": 2}], key=["width"])
@triton.jit
def _sum_by_token_kernel(
    rows_ptr, order_ptr, bounds_ptr, sums_ptr, clip_stride, row_stride, rows, width, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(tl.load(bounds_ptr + token), tl.load(bounds_ptr + token + 1)):
        number = tl.load(order_ptr + place)
        row_ptr = rows_ptr + number // rows * clip_stride + number % rows * row_stride
        total += tl.load(row_ptr + column, mask=column < width, other=0).to(tl.float32)
    tl.store(sums_ptr + token * width + column, total, mask=column < width)


def sum_rows_by_token(rows: Tensor, index: Tensor, clips: int, tokens: int) -> Tensor:
    """Sums of the rows [B, R, C] (C contiguous) of each token, index [B, R] -> fp32 [clips, N, C].

    `clips` is B, or 1 to sum over all clips."""
    width = rows.shape[2]
    if not rows.numel():
        return rows.new_zeros(clips, tokens, width, dtype=torch.float32)
    sums = rows.new_empty(clips, tokens, width, dtype=torch.float32)
    order, bounds = rows_of_tokens(index, clips, tokens)
    launch(
        _sum_by_token_kernel,
        lambda meta: (clips * tokens, cdiv(width, meta["BLOCK"])),
        *(rows, order, bounds, sums),
        *(rows.stride(0), rows.stride(1), rows.shape[1], width),
        flops=rows.numel(),
        moves=(rows, sums, order, bounds),
    )
    return sums

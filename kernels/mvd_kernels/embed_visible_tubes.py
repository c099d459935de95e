"""Tokens of the visible tubes of a clip, without embedding the others and without a float copy of the clip.

Shapes: B clips, T frames, H x W pixels; a tube is t x p x p pixels of 3 channels, K = 3 t p p values in the order
(channel, frame, row, column); N = (T / t) (H / p) (W / p) tokens in the order time, height, width; Nv of them visible;
D columns of the embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_kernels import shapes
from mvd_kernels._checks import FLOAT, INDEX, OPTIONAL, Checks, describe
from mvd_kernels._dispatch import autocast_dtype
from mvd_kernels._operator import Operator
from mvd_kernels._token_rows import rows_of_tokens, sum_rows, sum_rows_by_token
from mvd_kernels._triton import autotune, cdiv, interpreting, launch, power_of_2, tl, triton

_WEIGHT = Checks(weight=(FLOAT, "D 3 t p p"))
_CHECKS = Checks(
    bias=(FLOAT, "D", OPTIONAL), pos=(FLOAT, "N D | 1 N D | B N D", OPTIONAL), visible_index=(INDEX, "B tokens")
)
_NO_CHANGE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and std of bytes that are only divided by 255


def _channels_first(video: Tensor) -> Tensor:
    """The clip seen as [B, 3, T, H, W]: uint8 clips come as [B, T, H, W, 3]."""
    return video if video.is_floating_point() else video.permute(0, 4, 1, 2, 3)


def _grid(video: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Tokens along time, height and width."""
    sizes = zip(_channels_first(video).shape[2:], weight.shape[2:], strict=True)
    frames, height, width = (size // tube for size, tube in sizes)
    return frames, height, width


# ---- what it gives ----


def _outputs(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    visible_index: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    return weight.new_empty(*visible_index.shape, weight.shape[0])


def _gradients(
    grad: Tensor,
    video: Tensor,
    weight: Tensor,
    visible_index: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    needed: Sequence[bool],
    pos_clips: int,
) -> list[Tensor]:
    """-> those of video, weight, bias and pos (the last two fp32) that are needed."""
    frames, height, width = _grid(video, weight)
    columns = weight.shape[0]
    shapes = (
        (video.shape, video.dtype),
        (weight.shape, weight.dtype),
        ((columns,), torch.float32),
        ((pos_clips, frames * height * width, columns), torch.float32),
    )
    return [grad.new_empty(shape, dtype=dtype) for (shape, dtype), one in zip(shapes, needed, strict=True) if one]


# ---- reference ----


def _reference(video, weight, bias, pos, visible_index, mean, std) -> Tensor:
    (frames, height, width), (t, p, _) = _grid(video, weight), weight.shape[2:]
    clip = _channels_first(video).unflatten(4, (width, p)).unflatten(3, (height, p)).unflatten(2, (frames, t))
    space = height * width
    place = visible_index // space, visible_index % space // width, visible_index % width
    clips = torch.arange(len(visible_index), device=video.device)[:, None]
    pixels = clip.permute(0, 2, 4, 6, 1, 3, 5, 7)[(clips, *place)]  # [B, Nv, 3, t, p, p]
    if not video.is_floating_point():
        pixels = pixels.to(torch.promote_types(weight.dtype, torch.float32)) / 255
        by_channel = pixels.new_tensor([list(mean), list(std)])[:, :, None, None, None]
        pixels = (pixels - by_channel[0]) / by_channel[1]
    tokens = F.linear(pixels.flatten(2).to(weight.dtype), weight.flatten(1), _as(bias, weight.dtype))
    if pos is None:
        return tokens
    table = pos.expand(len(visible_index), -1, -1)
    at_visible = table.gather(1, visible_index[:, :, None].expand(-1, -1, pos.shape[2]))
    return tokens + at_visible.to(weight.dtype)


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


# ---- Triton ----


@triton.jit
def _corner(
    token,
    clip,
    clip_stride,
    frame_stride,
    row_stride,
    column_stride,
    height,
    width,
    SLICES: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Offset of the first pixel of a token's tube."""
    t, y, x = token // (height * width), token // width % height, token % width
    return clip * clip_stride + t * SLICES * frame_stride + (y * row_stride + x * column_stride) * SIDE


@triton.jit
def _within(k, channel_stride, frame_stride, row_stride, column_stride, SLICES: tl.constexpr, SIDE: tl.constexpr):
    """Offset of value k of a tube from its first pixel."""
    c, t = k // (SIDE * SIDE * SLICES), k // (SIDE * SIDE) % SLICES
    y, x = k // SIDE % SIDE, k % SIDE
    # In a clip whose channels lie apart, twice the stride of a channel need not fit 32 bits.
    c, t, y, x = c.to(tl.int64), t.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    return c * channel_stride + t * frame_stride + y * row_stride + x * column_stride


@triton.jit
def _by_channel(k, first, second, third, PLANE: tl.constexpr):
    """The entry of three that belongs to the channel of value k; PLANE values to a channel."""
    return tl.where(k < PLANE, first, tl.where(k < 2 * PLANE, second, third))


# 64 x 64 suits the few rows of small batches; the wider ones re-gather the tubes less often.
@autotune(
    [
        {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_R": 64, "BLOCK_C": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
        {"BLOCK_R": 128, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    ],
    key=["count", "width"],
)
@triton.jit(do_not_specialize=["count", "rows"])  # else built anew for some batch sizes
def _embed_kernel(
    video_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    index_ptr,
    out_ptr,
    count,
    rows,
    width,
    tokens,
    grid_height,
    grid_width,
    clip_stride,
    channel_stride,
    frame_stride,
    row_stride,
    column_stride,
    pos_stride,
    scale0,
    scale1,
    scale2,
    shift0,
    shift1,
    shift2,
    SLICES: tl.constexpr,
    SIDE: tl.constexpr,
    BYTES: tl.constexpr,
    BIAS: tl.constexpr,
    POS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Matrix product whose left side is gathered from the clip as it goes."""
    PLANE: tl.constexpr = SLICES * SIDE * SIDE
    VALUES: tl.constexpr = 3 * PLANE
    # fp32 is split into three tf32 for each product, so half as many of them fit the registers.
    STEP: tl.constexpr = BLOCK_K // 2 if weight_ptr.dtype.element_ty == tl.float32 else BLOCK_K
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    clip = (row // rows).to(tl.int64)
    token = tl.load(index_ptr + row, mask=row < count, other=0)
    valid = (row < count) & (token >= 0) & (token < tokens)
    corner = _corner(
        token, clip, clip_stride, frame_stride, row_stride, column_stride, grid_height, grid_width, SLICES, SIDE
    )
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, VALUES, STEP):
        k = start + tl.arange(0, STEP)
        offset = (
            corner[:, None] + _within(k, channel_stride, frame_stride, row_stride, column_stride, SLICES, SIDE)[None, :]
        )
        pixels = tl.load(video_ptr + offset, mask=valid[:, None] & (k < VALUES)[None, :], other=0).to(tl.float32)
        if BYTES:
            scale, shift = _by_channel(k, scale0, scale1, scale2, PLANE), _by_channel(k, shift0, shift1, shift2, PLANE)
            pixels = pixels * scale[None, :] + shift[None, :]
        inside = (k < VALUES)[:, None] & (column < width)[None, :]
        weights = tl.load(weight_ptr + column.to(tl.int64)[None, :] * VALUES + k[:, None], mask=inside, other=0)
        pixels = pixels.to(weights.dtype)
        if WIDEN:
            pixels, weights = pixels.to(tl.float32), weights.to(tl.float32)
        # tf32x3: nearly fp32's precision on tensor cores; other types ignore it.
        total = tl.dot(pixels, weights, total, input_precision="tf32x3")
    inside = (column < width)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + column, mask=column < width, other=0).to(tl.float32)[None, :]
    if POS:
        offset = (clip * pos_stride + token * width)[:, None] + column[None, :]
        total += tl.load(pos_ptr + offset, mask=valid[:, None] & inside, other=0).to(tl.float32)
    # The host does not wait to look at the indices: tokens that do not exist are NaN.
    total = tl.where(valid[:, None], total, float("nan"))
    offset = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out_ptr + offset, total, mask=(row < count)[:, None] & inside)


@triton.jit(do_not_specialize=["rows"])
def _gather_kernel(
    video_ptr,
    index_ptr,
    out_ptr,
    rows,
    tokens,
    grid_height,
    grid_width,
    clip_stride,
    channel_stride,
    frame_stride,
    row_stride,
    column_stride,
    scale0,
    scale1,
    scale2,
    shift0,
    shift1,
    shift2,
    SLICES: tl.constexpr,
    SIDE: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tube per program and block of values: out [rows, K]."""
    PLANE: tl.constexpr = SLICES * SIDE * SIDE
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(index_ptr + row)
    valid = (token >= 0) & (token < tokens)
    corner = _corner(
        token, row // rows, clip_stride, frame_stride, row_stride, column_stride, grid_height, grid_width, SLICES, SIDE
    )
    offset = corner + _within(k, channel_stride, frame_stride, row_stride, column_stride, SLICES, SIDE)
    pixels = tl.load(video_ptr + offset, mask=(k < 3 * PLANE) & valid, other=0).to(tl.float32)
    if BYTES:
        scale, shift = _by_channel(k, scale0, scale1, scale2, PLANE), _by_channel(k, shift0, shift1, shift2, PLANE)
        pixels = pixels * scale + shift
    tl.store(out_ptr + row * (3 * PLANE) + k, pixels, mask=k < 3 * PLANE)


@triton.jit
def _video_gradient_kernel(
    tubes_ptr,
    order_ptr,
    bounds_ptr,
    video_ptr,
    tokens,
    grid_height,
    grid_width,
    clip_stride,
    channel_stride,
    frame_stride,
    row_stride,
    column_stride,
    SLICES: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token of a clip per program: the sum of its rows, so zeros where it is not visible."""
    VALUES: tl.constexpr = 3 * SLICES * SIDE * SIDE
    token = tl.program_id(0).to(tl.int64)  # of the whole batch
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(tl.load(bounds_ptr + token), tl.load(bounds_ptr + token + 1)):
        row = tl.load(order_ptr + place)
        total += tl.load(tubes_ptr + row * VALUES + k, mask=k < VALUES, other=0).to(tl.float32)
    clip = token // tokens
    token = token % tokens
    corner = _corner(
        token, clip, clip_stride, frame_stride, row_stride, column_stride, grid_height, grid_width, SLICES, SIDE
    )
    offset = corner + _within(k, channel_stride, frame_stride, row_stride, column_stride, SLICES, SIDE)
    tl.store(video_ptr + offset, total, mask=k < VALUES)


def _scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """(x / 255 - mean) / std as x scale + shift: three scales and three shifts; zeros for float clips."""
    if not mean:
        return (0.0,) * 6
    return (*(1 / (255 * one) for one in std), *(-m / s for m, s in zip(mean, std, strict=True)))


def _block(values: int) -> int:
    return min(1024, power_of_2(values))


def _launch(video, weight, bias, pos, visible_index, mean, std):
    clip, index, weight = _channels_first(video), visible_index.contiguous(), weight.contiguous()
    pos = None if pos is None else pos.contiguous()
    bias = None if bias is None else bias.contiguous()
    (frames, height, width), (columns, _, t, p, _) = _grid(video, weight), weight.shape
    out = _outputs(video, weight, bias, pos, index, mean, std)
    if not out.numel():
        return out
    count, values = index.numel(), weight[0].numel()
    launch(
        _embed_kernel,
        lambda meta: (cdiv(count, meta["BLOCK_R"]), cdiv(columns, meta["BLOCK_C"])),
        *(clip, weight, bias if bias is not None else out, pos if pos is not None else out, index, out),
        *(count, index.shape[1], columns, frames * height * width, height, width, *clip.stride()),
        columns * pos.shape[1] if pos is not None and pos.shape[0] > 1 else 0,
        *_scale_and_shift(mean, std),
        flops=2 * count * values * columns,
        moves=(count * values * video.element_size(), weight, out, out if pos is not None else None),
        SLICES=t,
        SIDE=p,
        BYTES=not video.is_floating_point(),
        BIAS=bias is not None,
        POS=pos is not None,
        WIDEN=interpreting() and weight.dtype == torch.bfloat16,  # the interpreter's product takes no bf16
    )
    return out


def _launch_gather(video: Tensor, weight: Tensor, index: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The visible tubes as a matrix [B Nv, K] in the weight's dtype."""
    clip, (frames, height, width), (t, p) = _channels_first(video), _grid(video, weight), weight.shape[2:4]
    tubes = weight.new_empty(index.numel(), weight[0].numel())
    block = _block(tubes.shape[1])
    launch(
        _gather_kernel,
        (tubes.shape[0], cdiv(tubes.shape[1], block)),
        *(clip, index, tubes, index.shape[1], frames * height * width, height, width, *clip.stride()),
        *_scale_and_shift(mean, std),
        flops=2 * tubes.numel(),
        moves=(tubes.numel() * video.element_size(), tubes),
        SLICES=t,
        SIDE=p,
        BYTES=not video.is_floating_point(),
        BLOCK=block,
    )
    return tubes


def _launch_video_gradient(tubes: Tensor, video: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    (frames, height, width), (t, p) = _grid(video, weight), weight.shape[2:4]
    tokens, block = frames * height * width, _block(tubes.shape[1])
    out = torch.empty_like(video, memory_format=torch.contiguous_format)
    launch(
        _video_gradient_kernel,
        (len(video) * tokens, cdiv(tubes.shape[1], block)),
        *(tubes, *rows_of_tokens(index, len(video), tokens), out, tokens, height, width, *out.stride()),
        flops=0,
        moves=(tubes, out),
        SLICES=t,
        SIDE=p,
        BLOCK=block,
    )
    return out


def _launch_backward(grad, video, weight, visible_index, mean, std, needed, pos_clips):
    """Both products go to torch.mm: the gathered tubes are small (10 % of the clip), are read by every block of the
    weight's gradient, and cuBLAS splits its long sum over rows, which one kernel per block cannot."""
    if not grad.numel():
        empty = _gradients(grad, video, weight, visible_index, mean, std, needed, pos_clips)
        return [one.zero_() for one in empty]
    grad, index = grad.contiguous(), visible_index.contiguous()
    rows, gradients = grad.flatten(0, 1), []
    if needed[0]:
        gradients.append(_launch_video_gradient(torch.mm(rows, weight.flatten(1)), video, weight, index))
    if needed[1]:
        tubes = _launch_gather(video, weight, index, mean, std)
        gradients.append(torch.mm(rows.t(), tubes).view(weight.shape))
    if needed[2]:
        gradients.append(sum_rows(grad))
    if needed[3]:
        frames, height, width = _grid(video, weight)
        gradients.append(sum_rows_by_token(grad, index, pos_clips, frames * height * width))
    return gradients


def offline_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """The students' visible tubes of two clips, in bytes and as floats, and the image teachers' whole images."""
    on_meta, side = partial(torch.empty, device="meta"), shapes.IMAGE_SIZE
    tubes = {name: (recipe.width, shapes.TUBELET, shapes.PATCH) for name, recipe in shapes.RECIPES.items()}
    tubes["image ViT-H"] = (shapes.RECIPES["ViT-H"].width, 1, shapes.IMAGE_PATCH_H)
    for (name, (width, t, p)), dtype in itertools.product(tubes.items(), (torch.bfloat16, torch.float32)):
        frames, case = shapes.FRAMES if t > 1 else 1, f"{name} {str(dtype)[6:]}"
        weight, bias = on_meta(width, 3, t, p, p, dtype=dtype), on_meta(width, dtype=dtype)
        tokens = frames // t * (side // p) ** 2
        index = on_meta(2, tokens if t == 1 else shapes.VISIBLE, dtype=torch.int64)
        pos, grad = on_meta(1, tokens, width, dtype=dtype), on_meta(*index.shape, width, dtype=dtype)
        floats = (on_meta(2, 3, frames, side, side), (), ())
        yield f"{case} floats", partial(_launch, floats[0], weight, bias, pos, index, *floats[1:])
        if t > 1:
            pixels = (on_meta(2, frames, side, side, 3, dtype=torch.uint8), *_NO_CHANGE)
            yield f"{case} bytes", partial(_launch, pixels[0], weight, bias, pos, index, *pixels[1:])
            for kind, (video, mean, std) in (("floats", floats), ("bytes", pixels)):
                needed = (video.is_floating_point(), True, True, True)
                yield f"{case} {kind}", partial(_launch_backward, grad, video, weight, index, mean, std, needed, 1)


# ---- declaration ----

_DTYPES = {"cpp": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}


def _save(ctx, arguments, outputs) -> tuple[Tensor, ...]:
    video, weight, bias, pos, visible_index, ctx.mean, ctx.std = arguments
    ctx.dtypes = [None if one is None else one.dtype for one in (video, weight, bias, pos)]
    ctx.pos_clips = 0 if pos is None else pos.shape[0]
    return video, weight, visible_index


def _differentiate(ctx, saved, needed, grad):
    needed = list(needed[:4])
    found = iter(_backward.run(ctx.kernels, grad, *saved, ctx.mean, ctx.std, needed, ctx.pos_clips))
    return [next(found).to(dtype) if one else None for one, dtype in zip(needed, ctx.dtypes, strict=True)]


_backward = Operator("_embed_visible_tubes_backward", _gradients, cpp=True, triton=_launch_backward, dtypes=_DTYPES)
_operator = Operator(
    "embed_visible_tubes",
    _outputs,
    reference=_reference,
    cpp=True,
    triton=_launch,
    dtypes=_DTYPES,
    like="weight",
    save=_save,
    gradients=_differentiate,
)


# ---- public ----


def embed_visible_tubes(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos: Tensor | None = None,
    visible_index: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Tokens of the visible tubes: out[b, i] = W tube(b, visible_index[b, i]) + bias + pos[visible_index[b, i]].

    What a Conv3d with kernel = stride = tube, `+ pos` and a gather give (VideoMAE, arXiv 2203.12602), at the cost of
    the visible tokens alone. Bytes are normalised while their tubes are gathered, (x / 255 - mean) / std by channel:
    there is no float copy of the clip. Images are clips of one frame, with a weight of t = 1. Gradients: weight, bias,
    pos, and a float video, zero outside the visible tubes; backward gathers the tubes again rather than keep them.

    Args:
        video: uint8 [B, T, H, W, 3], or floating-point [B, 3, T, H, W], already normalised. Any strides: crops and
            transposed clips are read in place.
        weight: [D, 3, t, p, p], as of a Conv3d; fp32, bf16 (fp16 on CUDA). Others run as plain PyTorch.
        bias: [D] or None.
        pos: [N, D] or [1, N, D], one table for all clips, or [B, N, D], or None; fixed or learned.
        visible_index: int64 [B, Nv], tokens in the order time, height, width; None for all N.
        mean, std: three numbers each, for pixels in [0, 1]; uint8 only. By default 0 and 1.

    Returns:
        [B, Nv, D] in the weight's dtype (autocast's, where it is on). Sums are fp32.

    Raises:
        ValueError: if an argument is not as said above, or T, H, W are not multiples of the tube. An index out of range
            raises on the CPU; on CUDA, where the host would have to wait to see it, its token is NaN.
    """
    sizes = _WEIGHT(weight)
    _check_video(video, weight)
    if not video.is_floating_point():
        mean, std = _three("mean", mean, _NO_CHANGE[0]), _three("std", std, _NO_CHANGE[1])
    elif mean is not None or std is not None:
        raise ValueError(f"mean and std are for uint8 clips; this one is {video.dtype}: normalise it before the call")
    (frames, height, width), batch = _grid(video, weight), video.shape[0]
    tokens = frames * height * width
    if visible_index is None:
        visible_index = torch.arange(tokens, device=video.device).repeat(batch, 1)
    _CHECKS(bias, pos, visible_index, like=weight, D=sizes["D"], B=batch, N=tokens)
    dtype = autocast_dtype(weight.device)
    if dtype and weight.dtype != torch.float64:
        weight = weight.to(dtype)
    if pos is not None:
        pos = pos if pos.ndim == 3 else pos[None]
        pos = pos if pos.dtype in (weight.dtype, torch.float32) else pos.to(weight.dtype)
    if video.is_floating_point() and video.dtype not in (weight.dtype, torch.float32, torch.bfloat16):
        video = video.to(weight.dtype)
    return _operator(video, weight, bias, pos, visible_index, list(mean or ()), list(std or ()))


def _check_video(video: Tensor, weight: Tensor) -> None:
    layout = "[B, 3, T, H, W]" if video.is_floating_point() else "[B, T, H, W, 3]"
    channel = 1 if video.is_floating_point() else 4
    accepted = video.is_floating_point() or video.dtype == torch.uint8
    if not accepted or video.ndim != 5 or video.shape[channel] != 3 or video.device != weight.device:
        kinds = layout if accepted else "torch.uint8 [B, T, H, W, 3] or floating point [B, 3, T, H, W]"
        raise ValueError(f"video is {describe(video)}; it must be {kinds} on {weight.device}")
    sizes = _channels_first(video).shape[2:]
    for name, size, tube in zip(("frames", "height", "width"), sizes, weight.shape[2:], strict=True):
        if size % tube:
            raise ValueError(f"video has {name} {size}, which is not a multiple of the weight's {tube}")


def _three(name: str, values: Sequence[float] | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if values is None:
        return default
    if isinstance(values, Tensor) or len(values) != 3:
        raise ValueError(f"{name} is {values}; it must be three numbers, one per channel")
    if name == "std" and not all(one > 0 for one in values):
        raise ValueError(f"std is {tuple(values)}; all three must be above 0")
    return tuple(float(one) for one in values)

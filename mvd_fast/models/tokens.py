"""Tokens and masks: cutting clips into tubes, splitting a mask into indices, picking rows.

Shapes: B clips, C channels, T frames, H x W pixels; a tube is t x p x p; N tokens, Nv visible, Nm masked.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def split_mask(mask: Tensor, num_visible: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices of a mask, ascending: (visible int64 [B, Nv], masked int64 [B, Nm]).

    mask: bool [B, N], True = masked, the same count in every row. `num_visible` (Nv), where it is known,
    saves reading the count back from the device; the rows are then taken on trust.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"mask must be bool [B, N], got {mask.dtype} {list(mask.shape)}")
    if num_visible is None:
        counts = (~mask).sum(1)
        num_visible = int(counts[0]) if len(counts) else 0
        if not bool((counts == num_visible).all()):
            raise ValueError(f"every row of the mask must leave the same number visible, got {counts.tolist()}")
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :num_visible], order[:, num_visible:]


def choose_tokens(index: Tensor, count: int) -> Tensor:
    """`count` entries of every row of index int64 [B, M], in their order, at random (torch's generator)."""
    chosen = torch.rand(index.shape, device=index.device).topk(count, dim=1).indices.sort(dim=1).values
    return index.gather(1, chosen)


def per_clip(index: Tensor, clips: int) -> Tensor:
    """Indices of each clip's S masks, [clips S, M], one after the other: [clips, S M]."""
    return index.reshape(clips, index.numel() // max(1, clips))


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B or 1, N, D] at index int64 [B, M] -> [B, M, D]."""
    x = x.expand(index.shape[0], -1, -1)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _tube_view(video: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """video [B, C, T, H, W] seen as [B, gt, gh, gw, C, t, p, p]; nothing is copied."""
    sizes = {"t": tubelet_size, "p": patch_size, "q": patch_size}
    return rearrange(video, "b c (gt t) (gh p) (gw q) -> b gt gh gw c t p q", **sizes)


def _place(index: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token indices int64 [B, M] as positions in a [B, gt, gh, gw, ...] view."""
    space = grid[1] * grid[2]
    rows = torch.arange(len(index), device=index.device)[:, None]
    return rows, index // space, index % space // grid[2], index % grid[2]


def tubes(video: Tensor, tubelet_size: int, patch_size: int, index: Tensor | None = None) -> Tensor:
    """Pixels of the tubes of video [B, C, T, H, W] -> [B, M, C, t, p, p].

    All N tubes in token order (time, height, width), or those at index int64 [B, M]; only these are copied.
    """
    x = _tube_view(video, tubelet_size, patch_size)
    return x.flatten(1, 3) if index is None else x[_place(index, x.shape[1:4])]


def paste_tubes(video: Tensor, pixels: Tensor, index: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """A copy of video [B, C, T, H, W] with the tubes at index int64 [B, M] replaced by pixels [B, M, C, t, p, p]."""
    pasted = video.clone(memory_format=torch.contiguous_format)
    x = _tube_view(pasted, tubelet_size, patch_size)
    x[_place(index, x.shape[1:4])] = pixels
    return pasted

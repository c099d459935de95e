"""Position tables in checkpoints: which one it is, and the same for another size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_fast.models.positions import sincos_2d, sincos_3d, sinusoid_1d

Grid = tuple[int, int, int]  # time slices, rows, columns

# What a network adds to its tokens, in words.
KINDS = {"3d": "3-D sin-cos", "1d": "1-D sinusoid", "2d": "2-D sin-cos", "learned": "learned"}

WIDTHS = {"3d": 16, "1d": 1, "2d": 4}  # the dimension is a multiple of this


def make_table(kind: str, dim: int, grid: Grid, cls_token: bool) -> Tensor:
    """The fixed table "3d" (MVD), "1d" (VideoMAE) or "2d" (MAE), float32 [1, N (+ 1), dim]."""
    if kind == "3d":
        return sincos_3d(dim, *grid)
    if kind == "1d":
        return sinusoid_1d(dim, math.prod(grid))
    return sincos_2d(dim, *grid[1:], cls_token=cls_token)


def identify(table: Tensor, cls_token: bool, slices: int) -> tuple[str, Grid]:
    """Kind and grid of a stored table [1, N (+ 1), dim].

    The number of tokens alone does not give the grid: the values decide where they are one of the fixed tables, else
    the square grid whose number of time slices is nearest to `slices`. Tables on the meta device have no values and
    count as the fixed kind.
    """
    tokens, dim = table.shape[1] - cls_token, table.shape[2]
    grids = _grids(tokens, 1 if cls_token else slices)
    kinds = ("2d",) if cls_token else ("3d", "1d")
    if table.is_meta:
        return kinds[0], grids[0]
    tolerance = 1e-5 if table.dtype == torch.float32 else 1e-2
    for kind in kinds:
        if dim % WIDTHS[kind]:
            continue
        for grid in grids if kind == "3d" else grids[:1]:
            if (make_table(kind, dim, grid, cls_token) - table.float()).abs().max() <= tolerance:
                return kind, grid
    return "learned", grids[0]


def _grids(tokens: int, slices: int) -> list[Grid]:
    """Grids with square slices that have so many tokens, nearest number of slices first."""
    found = []
    for side in range(1, math.isqrt(tokens) + 1):
        if tokens % side**2 == 0:
            found.append((tokens // side**2, side, side))
    return sorted(found, key=lambda grid: abs(grid[0] - slices))


def resize(table: Tensor, old: Grid, new: Grid, cls_token: bool) -> Tensor:
    """A learned table [1, N (+ 1), dim] for another grid: bicubic in space, as timm does, then linear in time.

    The cls row stays.
    """
    first, body = table[:, : int(cls_token)], table[0, int(cls_token) :]
    x = body.float().unflatten(0, old).permute(0, 3, 1, 2)  # [T, dim, H, W]
    x = F.interpolate(x, size=new[1:], mode="bicubic", align_corners=False, antialias=True)
    if new[0] != old[0]:
        lines = x.flatten(1).T[None]  # [1, dim * H * W, T]
        lines = F.interpolate(lines, size=new[0], mode="linear", align_corners=False)
        x = lines[0].T.unflatten(1, x.shape[1:])
    return torch.cat([first, x.permute(0, 2, 3, 1).flatten(0, 2)[None].to(table.dtype)], dim=1)

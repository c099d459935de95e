"""Fixed position tables. All return float32, computed in float64 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from mvd_fast.errors import UserError


def _require_multiple(dim: int, of: int, what: str) -> None:
    if dim % of:
        raise UserError(
            f"{what} sin-cos table needs a width that is a multiple of {of}, got {dim}; change embed_dim or decoder_dim"
        )


def _sincos(positions: Tensor, dim: int) -> Tensor:
    """[sin | cos] of `positions` [N] at `dim // 2` geometric frequencies -> [N, dim] float64."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.to(torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim: int, height: int, width: int, cls_token: bool = False) -> Tensor:
    """MAE's table (He et al. 2022): first half of the channels encodes x, second half y.

    Returns [1, height * width (+ 1), dim]; with `cls_token` row 0 is zero.
    """
    _require_multiple(dim, 4, "a 2-D")
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    table = torch.cat([_sincos(x.flatten(), dim // 2), _sincos(y.flatten(), dim // 2)], dim=1)
    if cls_token:
        table = torch.cat([table.new_zeros(1, dim), table])
    return table[None].float()


def sincos_3d(dim: int, frames: int, height: int, width: int) -> Tensor:
    """MVD's table: the first quarter of the channels encodes time, the last three quarters space.

    Returns [1, frames * height * width, dim], time slowest.
    """
    _require_multiple(dim, 16, "a 3-D")
    space = sincos_2d(dim // 4 * 3, height, width)[0].double()
    time = _sincos(torch.arange(frames), dim // 4)
    table = torch.cat([time.repeat_interleave(height * width, dim=0), space.repeat(frames, 1)], dim=1)
    return table[None].float()


def sinusoid_1d(dim: int, tokens: int) -> Tensor:
    """The Transformer's table (Vaswani et al. 2017), sin on even and cos on odd channels -> [1, tokens, dim]."""
    channel = torch.arange(dim, dtype=torch.float64)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000.0 ** (2 * (channel // 2) / dim)
    table = torch.where(channel % 2 == 0, angles.sin(), angles.cos())
    return table[None].float()

"""From a boolean mask to the index of the visible tokens, and which convolutions `embed_visible_tubes` stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def visible_tokens(mask: Tensor, video: Tensor, tokens: int) -> Tensor | None:
    """mask bool [B, N], True: hidden -> the others' places, int64 [B, Nv] on the device of the clips.

    None if it is no such mask for these clips of N `tokens`, or if the number of visible ones differs by clip.
    """
    if mask.dtype != torch.bool or mask.shape != (len(video), tokens) or not len(video):
        return None
    visible = ~mask.to(video.device)
    counts = visible.sum(1)
    if not bool((counts == counts[:1]).all()):
        return None
    return visible.nonzero()[:, 1].view(mask.shape[0], -1)


def unfit_tubes(proj: nn.Module | None) -> str | None:
    """Why `embed_visible_tubes` cannot stand for this layer."""
    if not isinstance(proj, nn.Conv3d):
        return f"its patches come from {type(proj).__name__}, not Conv3d"
    _, height, width = proj.kernel_size
    plain = proj.stride == proj.kernel_size and set(proj.dilation) == {1} and proj.groups == 1
    if proj.in_channels != 3 or height != width or not plain or proj.padding not in ((0, 0, 0), "valid"):
        return "its convolution is not that of square tubes of 3 channels side by side"
    return None

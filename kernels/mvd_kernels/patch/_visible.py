"""From a boolean mask to the index of the visible tokens, and which convolutions `embed_visible_tubes` stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvd_kernels.patch._core import wave


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
    if not isinstance(proj, nn.Conv3d) or type(proj).forward is not nn.Conv3d.forward:
        return f"its patches come from {type(proj).__name__} of {type(proj).__module__}, not a plain Conv3d"
    _, height, width = proj.kernel_size
    plain = proj.stride == proj.kernel_size and set(proj.dilation) == {1} and proj.groups == 1
    if proj.in_channels != 3 or height != width or not plain or proj.padding not in ((0, 0, 0), "valid"):
        return "its convolution is not that of square tubes of 3 channels side by side"
    return None


def other_size(clips: Tensor, proj: nn.Conv3d, image_size: tuple[int, int], tokens: int) -> bool:
    """Whether clips [B, C, T, H, W] are none of those that an encoder of so many tokens is for; it says so itself."""
    count = torch.Size(size // tube for size, tube in zip(clips.shape[2:], proj.kernel_size, strict=True)).numel()
    return clips.shape[1] != proj.in_channels or tuple(clips.shape[3:]) != tuple(image_size) or count != tokens


def probe_clip(proj: nn.Conv3d, image_size: tuple[int, int], tokens: int) -> tuple[Tensor, Tensor]:
    """A clip [1, 3, T, H, W] for an encoder of so many tokens, and a mask [1, N] of all but two: cheap to run."""
    (height, width), (tube, side, _) = image_size, proj.kernel_size
    clip = wave(1, 3, tokens * side**2 // (height * width) * tube, height, width, like=proj.weight)
    mask = torch.ones(1, tokens, dtype=torch.bool, device=clip.device)
    mask[:, :: max(tokens - 1, 1)] = False
    return clip, mask

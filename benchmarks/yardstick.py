"""The training step as the authors compute it, in plain PyTorch: what the engine's speed is measured against.

Same parameters, same losses (tests/test_golden.py holds it against them), none of the engine's ways
around work: every tube is embedded and nine tenths of them thrown away, the attention matrix is held in memory, masks
are boolean and copied, predictions and targets exist in full, and under autocast every weight is cast at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd_fast.models.layers import LN_EPS, Attention, Block, Decoder
from mvd_fast.models.student import RELEASED
from mvd_fast.targets.mae import FrameFeatures
from mvd_fast.tasks.distill import Distill

Phase = Callable[[str], AbstractContextManager[None]]


@contextmanager
def untimed(name: str) -> Iterator[None]:
    yield


def distillation_losses(task: Distill, batch: dict[str, Tensor], phase: Phase = untimed) -> dict[str, Tensor]:
    """What `task(batch)` returns, with the task's own networks: MVD's student and teachers.

    batch: `video` float [B, 3, T, H, W], `mask` bool [B, N]. `phase(name)` is entered around each part of the work.
    """
    video, mask, student = batch["video"], batch["mask"], task.network
    with torch.no_grad():
        with phase("image teacher"):
            image_target = image_features(task.targets["image"], video)
        with phase("video teacher"):
            encoder = task.targets["video"].encoder
            clip_target = blocks(encoder.blocks, embed(encoder.patch_embed.proj, video) + encoder.positions)
    with phase("student"):
        x = embed(student.patch_embed.proj, video) + student.pos_embed.type_as(video)
        x = layer_norm(student.norm, blocks(student.blocks, visible_rows(x, mask)))
    losses = {}
    for name, target in (("image", image_target), ("video", clip_target)):
        decoder, branch = student.decoder(name), RELEASED[name]
        with phase("decoders"):
            decoded = decode(student, branch, x, mask)
        with phase("heads and loss"):
            prediction = F.linear(decoded, decoder.head.weight, decoder.head.bias)
            if name in task.normalized:
                target = F.layer_norm(target, target.shape[-1:], eps=LN_EPS)
            losses[name] = F.smooth_l1_loss(prediction.float(), visible_rows(target, ~mask).float())
    loss = sum(task.weights[name] * part for name, part in losses.items())
    return {"loss": loss, **{f"loss_{name}": part for name, part in losses.items()}}


def image_features(target: FrameFeatures, video: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> [B, N, C]: the image teacher on the first frame of every tubelet."""
    teacher, size = target.teacher, target.teacher.config.image_size
    frames = video[:, :, :: target.tubelet_size].transpose(1, 2).flatten(0, 1)
    if frames.shape[-1] != size:
        frames = F.interpolate(frames, (size, size), mode="bilinear", antialias=True, align_corners=False)
    x = embed(teacher.patch_embed.proj, frames) + teacher.pos_embed[:, 1:]
    cls = (teacher.cls_token + teacher.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = blocks(teacher.blocks, torch.cat([cls.type_as(x), x], dim=1))[:, 1:]
    return x.unflatten(0, (len(video), -1)).flatten(1, 2)


def embed(projection: nn.Conv2d | nn.Conv3d, pixels: Tensor) -> Tensor:
    """All tokens [B, N, D]."""
    return projection(pixels).flatten(2).transpose(1, 2)


def visible_rows(x: Tensor, mask: Tensor) -> Tensor:
    """The rows of x [B or 1, N, D] where mask [B, N] is False -> [B, M, D]."""
    x = x.expand(len(mask), -1, -1)
    return x[~mask].reshape(len(mask), -1, x.shape[-1])


def decode(student: nn.Module, branch: str, x: Tensor, mask: Tensor) -> Tensor:
    """What one decoder's head sees, [B, Nm, D], from the encoder's output [B, Nv, E]."""
    decoder: Decoder = getattr(student, f"decoder_{branch}")
    pos = getattr(student, f"pos_embed_{branch}").type_as(x)
    down, token = getattr(student, f"down_{branch}"), getattr(student, f"mask_token_{branch}")
    seen = F.linear(x, down.weight, down.bias) + visible_rows(pos, mask)
    unseen = token + visible_rows(pos, ~mask)
    x = blocks(decoder.blocks, torch.cat([seen, unseen], dim=1))
    return layer_norm(decoder.norm, x[:, -unseen.shape[1] :])


def blocks(modules: Iterable[Block], x: Tensor) -> Tensor:
    for block in modules:
        x = x + dropped(block, attend(block.attn, layer_norm(block.norm1, x)))
        x = x + dropped(block, block.mlp(layer_norm(block.norm2, x)))
    return x


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, LN_EPS)


def dropped(block: Block, branch: Tensor) -> Tensor:
    scale = block.drop_path(branch)
    return branch if scale is None else branch * scale.to(branch.dtype)[:, None, None]


def attend(attention: Attention, x: Tensor) -> Tensor:
    """[B, N, D] -> [B, N, D], the [B, heads, N, N] matrix held in memory."""
    bias = attention.qkv.bias
    if attention.split_bias:
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias])
    qkv = F.linear(x, attention.qkv.weight, bias).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2))

"""The networks of the MVD, VideoMAE and MAE repositories, as they are at their authors'.

Blocks have `gamma_1` and `gamma_2` (or None, or neither) and one `drop_path`; the attention of MVD and VideoMAE has
`q_bias` and `v_bias` beside a projection without one (BEiT), that of MAE is timm's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvd_kernels.attention import attention
from mvd_kernels.embed_visible_tubes import embed_visible_tubes
from mvd_kernels.patch._core import (
    PatchError,
    Report,
    add_norm,
    dropout_note,
    has_hooks,
    original,
    swap,
    unexpected,
    unfit_head,
    unfit_norm,
    wave,
)
from mvd_kernels.patch._visible import unfit_tubes, visible_tokens

_BLOCK = {"norm1", "attn", "drop_path", "norm2", "mlp"}
_ATTENTION = {"qkv", "attn_drop", "proj", "proj_drop"}
_ENCODER = ("patch_embed", "pos_embed", "blocks", "norm")


class ReferenceAttention(nn.Module):
    """Self-attention with biases of queries and values only, or one for all three."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]; active dropout goes to the original."""
        if self.training and self.attn_drop.p > 0:
            return original(ReferenceAttention, self)(x)
        bias, q_bias = self.qkv.bias, getattr(self, "q_bias", None)
        if q_bias is not None:
            bias = torch.cat([q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return self.proj_drop(self.proj(attention(q, k, v, self.scale).flatten(2)))


class ReferenceBlock(nn.Module):
    """Pre-norm block whose first addition and second LayerNorm are one operator."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        branch = _scaled(self.attn(self.norm1(x)), getattr(self, "gamma_1", None))
        x, normed = add_norm(x, self.drop_path(branch), self.norm2)
        return x + self.drop_path(_scaled(self.mlp(normed), getattr(self, "gamma_2", None)))


class VisibleEncoder(nn.Module):
    """Encoder of a masked autoencoder that embeds the visible tubes alone."""

    def forward_features(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, 3, T, H, W], mask bool [B, N] (True: hidden) -> [B, Nv, C]."""
        proj, visible = self.patch_embed.proj, visible_tokens(mask, x, self.pos_embed.shape[1])
        if visible is None or has_other_size(self, x) or has_hooks(self.patch_embed) or has_hooks(proj):
            return super().forward_features(x, mask)
        tokens = embed_visible_tubes(x, proj.weight, proj.bias, self.pos_embed.to(x.device).detach(), visible)
        for block in self.blocks:
            if getattr(self, "use_checkpoint", False) and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return self.norm(tokens)


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch


def has_other_size(encoder: nn.Module, x: Tensor) -> bool:
    """Whether a clip is none of those that the encoder is for; it says so itself."""
    tube = encoder.patch_embed.proj.kernel_size
    tokens = torch.Size(size // one for size, one in zip(x.shape[2:], tube, strict=False)).numel()
    return tuple(x.shape[-2:]) != tuple(encoder.patch_embed.img_size) or tokens != encoder.pos_embed.shape[1]


def patch_reference_vit(model: nn.Module) -> Report:
    """Run the blocks and the masked encoder of an MVD, VideoMAE or MAE network of its authors on fused operators.

    Args:
        model: recognised by the names, shapes and types of its parts; changed in place: same parameters, same state
            dict. Call it before wrapping the model (DDP, FSDP, DeepSpeed) or compiling it.

    Returns:
        What was swapped, and what was left and why. `unpatch(model)` undoes it.

    Raises:
        PatchError: if the model has no blocks with norm1, attn, norm2, mlp and drop_path.
    """
    blocks = [(name, one) for name, one in model.named_modules() if {n for n, _ in one.named_children()} >= _BLOCK]
    if not blocks:
        raise PatchError(
            f"{type(model).__name__} has no blocks with norm1, attn, drop_path, norm2 and mlp, as MVD, VideoMAE and "
            f"MAE have; for newer timm networks call patch_timm_vit. Nothing was changed."
        )
    report = Report(type(model).__name__)
    for name, block in blocks:
        _patch_attention(report, f"{name}.attn", block.attn)
        reason = unexpected(block, _BLOCK, {"gamma_1", "gamma_2"}) or unfit_norm(block.norm2)
        if reason is None:
            weight = block.norm2.weight
            reason = swap(block, ReferenceBlock, probe=(wave(1, 3, *weight.shape, like=weight),))
        report.add(name, "add + LayerNorm", reason)
    for name, module in model.named_modules():
        if hasattr(module, "forward_features") and all(hasattr(module, one) for one in _ENCODER):
            report.add(name or "(the model)", "embedding", _patch_encoder(module))
        if name.endswith("decoder") and isinstance(getattr(module, "head", None), nn.Linear):
            reason = "the loss is outside the model; linear_smooth_l1(x, head.weight, head.bias, target) fuses both"
            report.add(f"{name}.head", "head + loss", reason)
    return report


def _patch_attention(report: Report, name: str, attn: nn.Module) -> None:
    reason, note = unexpected(attn, _ATTENTION, {"q_bias", "v_bias"}), ""
    if reason is None and not isinstance(attn.qkv, nn.Linear):
        reason = f"its qkv is {type(attn.qkv).__name__}, not Linear"
    if reason is None:
        note = dropout_note(attn.attn_drop.p)
        probe = wave(1, 3, attn.qkv.in_features, like=attn.qkv.weight)
        width = attn.qkv.out_features // 3 // attn.num_heads
        reason = unfit_head(width) or swap(attn, ReferenceAttention, probe=(probe,))
    report.add(name, "attention", reason, note)


def _patch_encoder(encoder: nn.Module) -> str | None:
    """Swap its forward_features(x, mask); -> why not. The probe hides all tokens but two, so that blocks are cheap."""
    proj, pos = getattr(encoder.patch_embed, "proj", None), encoder.pos_embed
    reason = unfit_tubes(proj)
    if reason is None and (pos.ndim != 3 or getattr(encoder.patch_embed, "img_size", None) is None):
        reason = "its positions or clip size are not those of a masked encoder"
    if reason is None and isinstance(pos, nn.Parameter) and pos.requires_grad:
        reason = "its positions are learned"
    if reason is not None:
        return reason
    height, width = encoder.patch_embed.img_size
    tube, side, _ = proj.kernel_size
    frames = pos.shape[1] * side**2 // (height * width) * tube
    clip = wave(1, 3, frames, height, width, like=proj.weight)
    mask = torch.ones(1, pos.shape[1], dtype=torch.bool, device=clip.device)
    mask[:, :: max(pos.shape[1] - 1, 1)] = False
    return swap(encoder, VisibleEncoder, "forward_features", probe=(clip, mask))

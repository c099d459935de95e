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
    Report,
    add_norm,
    find_blocks,
    swap,
    swap_block,
    swap_packed_attention,
    unexpected,
    unfit_norm,
    unfit_scores,
)
from mvd_kernels.patch._fallback import original, runs_original
from mvd_kernels.patch._visible import other_size, probe_clip, unfit_tubes, visible_tokens

_ATTENTION_CALLS = frozenset({"proj", "proj_drop"})  # of qkv the weights are read, as the authors do
_BLOCK_CALLS = frozenset({"norm1", "attn", "drop_path", "mlp"})
_BLOCK = _BLOCK_CALLS | {"norm2"}
_ENCODER_CALLS = frozenset({"blocks", "norm"})
_ENCODER = ("patch_embed", "pos_embed", "blocks", "norm")


class ReferenceAttention(nn.Module):
    """Self-attention with biases of queries and values only, or one for all three."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]; active dropout goes to the original."""
        if unfit_scores(self) or runs_original(self, _ATTENTION_CALLS, x):
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
        if runs_original(self, _BLOCK_CALLS, x) or unfit_norm(self.norm2):
            return original(ReferenceBlock, self)(x)
        branch = _scaled(self.attn(self.norm1(x)), getattr(self, "gamma_1", None))
        x, normed = add_norm(x, self.drop_path(branch), self.norm2)
        return x + self.drop_path(_scaled(self.mlp(normed), getattr(self, "gamma_2", None)))


class VisibleEncoder(nn.Module):
    """Encoder of a masked autoencoder that embeds the visible tubes alone."""

    def forward_features(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, 3, T, H, W], mask bool [B, N] (True: hidden) -> [B, Nv, C]."""
        if runs_original(self, _ENCODER_CALLS, x):
            return super().forward_features(x, mask)
        proj, tokens = self.patch_embed.proj, self.pos_embed.shape[1]
        visible = visible_tokens(mask, x, tokens)
        if visible is None or other_size(x, proj, self.patch_embed.img_size, tokens):
            return super().forward_features(x, mask)
        x = embed_visible_tubes(x, proj.weight, proj.bias, self.pos_embed.to(x.device).detach(), visible)
        for block in self.blocks:
            if getattr(self, "use_checkpoint", False) and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch


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
    missing = (
        "blocks with norm1, attn, drop_path, norm2 and mlp, as MVD, VideoMAE and MAE have; for newer timm networks "
        "call patch_timm_vit"
    )
    report = Report(type(model).__name__)
    for name, block in find_blocks(model, _BLOCK, missing):
        biases = frozenset({"q_bias", "v_bias"})
        swap_packed_attention(report, f"{name}.attn", block.attn, ReferenceAttention, _ATTENTION_CALLS, biases)
        reason = unexpected(block, _BLOCK, {"gamma_1", "gamma_2"})
        swap_block(report, name, block, "norm2", ReferenceBlock, _BLOCK_CALLS, reason)
    for name, module in model.named_modules():
        if hasattr(module, "forward_features") and all(hasattr(module, one) for one in _ENCODER):
            report.add(name or "(the model)", "embedding", _patch_encoder(module))
        if name.endswith("decoder") and isinstance(getattr(module, "head", None), nn.Linear):
            reason = "the loss is outside the model; linear_smooth_l1(x, head.weight, head.bias, target) fuses both"
            report.add(f"{name}.head", "head + loss", reason)
    return report


def _patch_encoder(encoder: nn.Module) -> str | None:
    """Swap its forward_features(x, mask); -> why not."""
    proj, pos = getattr(encoder.patch_embed, "proj", None), encoder.pos_embed
    reason = unfit_tubes(proj)
    if reason is None and (pos.ndim != 3 or getattr(encoder.patch_embed, "img_size", None) is None):
        reason = "its positions or clip size are not those of a masked encoder"
    if reason is None and isinstance(pos, nn.Parameter) and pos.requires_grad:
        reason = "its positions are learned"
    if reason is not None:
        return reason
    probe = probe_clip(proj, encoder.patch_embed.img_size, pos.shape[1])
    return swap(encoder, VisibleEncoder, _ENCODER_CALLS, probe=probe)

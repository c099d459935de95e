"""timm's VisionTransformer and what is built from its Block (DeiT, CLIP's image tower, ...)."""

from __future__ import annotations

from torch import Tensor, nn

from mvd_kernels.attention import attention
from mvd_kernels.patch._core import (
    PatchError,
    Report,
    add_norm,
    dropout_note,
    original,
    swap,
    unexpected,
    unfit_head,
    unfit_norm,
    wave,
)

_BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION = {"qkv", "attn_drop", "proj", "proj_drop"}


class TimmAttention(nn.Module):
    """Self-attention from one packed projection, without norms of queries and keys."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] -> [B, N, C]; a mask, causality and active dropout go to the original."""
        if attn_mask is not None or is_causal or (self.training and self.attn_drop.p > 0):
            return original(TimmAttention, self)(x, **_given(attn_mask, is_causal))
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return self.proj_drop(self.proj(attention(q, k, v, self.scale).flatten(2)))


class TimmBlock(nn.Module):
    """Pre-norm block whose first addition and second LayerNorm are one operator."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        branch = self.attn(self.norm1(x), **_given(attn_mask, is_causal))
        x, normed = add_norm(x, self.drop_path1(self.ls1(branch)), self.norm2)
        return x + self.drop_path2(self.ls2(self.mlp(normed)))


def _given(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Tensor | bool]:
    """What was passed: the attention of older versions takes neither."""
    mask = {} if attn_mask is None else {"attn_mask": attn_mask}
    return {**mask, "is_causal": True} if is_causal else mask


def patch_timm_vit(model: nn.Module) -> Report:
    """Run the attention and the first addition + LayerNorm of every block of a timm ViT on fused operators.

    Args:
        model: `timm.models.VisionTransformer` or any network with its Block, changed in place: same parameters, same
            state dict; call it before wrapping the model (DDP, FSDP) or compiling it.

    Returns:
        What was swapped, and what was left and why. `unpatch(model)` undoes it.

    Raises:
        PatchError: if the model has no blocks with norm1, attn, norm2 and mlp.
    """
    names = {"norm1", "attn", "norm2", "mlp"}
    blocks = [(name, one) for name, one in model.named_modules() if names <= {n for n, _ in one.named_children()}]
    if not blocks:
        raise PatchError(
            f"{type(model).__name__} has no blocks with norm1, attn, norm2 and mlp, as timm's ViTs have; for other "
            f"networks call the operators of mvd_kernels directly. Nothing was changed."
        )
    report = Report(type(model).__name__)
    for name, block in blocks:
        _patch_attention(report, f"{name}.attn", block.attn)
        reason = unexpected(block, _BLOCK) or unfit_norm(block.norm2)
        if reason is None:
            reason = swap(block, TimmBlock, probe=(wave(1, 3, *block.norm2.weight.shape, like=block.norm2.weight),))
        report.add(name, "add + LayerNorm", reason)
    if hasattr(model, "patch_embed"):
        report.add("patch_embed", "embedding", "the model embeds every patch, so there are no hidden ones to spare")
    return report


def _patch_attention(report: Report, name: str, attn: nn.Module) -> None:
    reason, note = unexpected(attn, _ATTENTION), ""
    if reason is None and not isinstance(attn.qkv, nn.Linear):
        reason = f"its qkv is {type(attn.qkv).__name__}, not Linear"
    if reason is None:
        note = dropout_note(attn.attn_drop.p)
        probe = wave(1, 3, attn.qkv.in_features, like=attn.qkv.weight)
        reason = unfit_head(attn.qkv.out_features // 3 // attn.num_heads) or swap(attn, TimmAttention, probe=(probe,))
    report.add(name, "attention", reason, note)

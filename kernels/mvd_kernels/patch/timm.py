"""timm's VisionTransformer and what is built from its Block (DeiT, CLIP's image tower, ...)."""

from __future__ import annotations

from torch import Tensor, nn

from mvd_kernels.attention import attention
from mvd_kernels.patch._core import (
    Report,
    add_norm,
    find_blocks,
    swap_block,
    swap_packed_attention,
    unexpected,
    unfit_norm,
    unfit_scores,
)
from mvd_kernels.patch._fallback import original, runs_original

_ATTENTION_CALLS = frozenset({"qkv", "proj", "proj_drop"})
_BLOCK_CALLS = frozenset({"norm1", "attn", "ls1", "drop_path1", "mlp", "ls2", "drop_path2"})


class TimmAttention(nn.Module):
    """Self-attention from one packed projection, without norms of queries and keys."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] -> [B, N, C]; a mask, causality and active dropout go to the original."""
        if (
            attn_mask is not None
            or is_causal is not False
            or unfit_scores(self)
            or runs_original(self, _ATTENTION_CALLS, x)
        ):
            return original(TimmAttention, self)(x, **_given(attn_mask, is_causal))
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        scale = None if hasattr(self, "fused_attn") else self.scale  # which timm's fused attention does not read
        return self.proj_drop(self.proj(attention(q, k, v, scale).flatten(2)))


class TimmBlock(nn.Module):
    """Pre-norm block whose first addition and second LayerNorm are one operator."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        if runs_original(self, _BLOCK_CALLS, x) or unfit_norm(self.norm2):
            return original(TimmBlock, self)(x, **_given(attn_mask, is_causal))
        branch = self.attn(self.norm1(x), **_given(attn_mask, is_causal))
        x, normed = add_norm(x, self.drop_path1(self.ls1(branch)), self.norm2)
        return x + self.drop_path2(self.ls2(self.mlp(normed)))


def _given(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Tensor | bool]:
    """What was passed: the attention of older versions takes neither."""
    mask = {} if attn_mask is None else {"attn_mask": attn_mask}
    return mask if is_causal is False else {**mask, "is_causal": is_causal}


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
    missing = (
        "blocks with norm1, attn, norm2 and mlp, as timm's ViTs have; for other networks call the operators of "
        "mvd_kernels directly"
    )
    report = Report(type(model).__name__)
    for name, block in find_blocks(model, {"norm1", "attn", "norm2", "mlp"}, missing):
        swap_packed_attention(report, f"{name}.attn", block.attn, TimmAttention, _ATTENTION_CALLS)
        reason = unexpected(block, _BLOCK_CALLS | {"norm2"})
        swap_block(report, name, block, "norm2", TimmBlock, _BLOCK_CALLS, reason)
    if hasattr(model, "patch_embed"):
        report.add("patch_embed", "embedding", "the model embeds every patch, so there are no hidden ones to spare")
    return report

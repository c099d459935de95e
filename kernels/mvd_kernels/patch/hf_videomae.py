"""transformers' VideoMAE: VideoMAEModel, VideoMAEForVideoClassification and VideoMAEForPreTraining."""

from __future__ import annotations

from torch import Tensor, nn

from mvd_kernels.attention import attention
from mvd_kernels.embed_visible_tubes import embed_visible_tubes
from mvd_kernels.patch._core import (
    Report,
    add_norm,
    dropout_note,
    find_blocks,
    swap,
    swap_block,
    unexpected,
    unfit_head,
    unfit_norm,
    wave,
)
from mvd_kernels.patch._fallback import original, runs_original
from mvd_kernels.patch._visible import other_size, probe_clip, unfit_tubes, visible_tokens

_LAYER_CALLS = frozenset({"attention", "intermediate", "output", "layernorm_before"})
_LAYER = _LAYER_CALLS | {"layernorm_after"}
_ATTENTION = frozenset({"query", "key", "value"})
_STANDS_FOR = ("sdpa", "flash_attention")  # transformers' names of implementations begin so


class VideoMAESelfAttention(nn.Module):
    """Softmax attention of transformers' module of this name."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, N, C] -> [B, N, C], None.

        The original runs where dropout is active, and as any attention implementation that is not torch's SDPA or
        FlashAttention: "eager" gives out the attention weights, others are the user's own.
        """
        dropout = self.training and self.dropout_prob > 0
        if dropout or _unfit_implementation(self) or runs_original(self, _ATTENTION, hidden_states):
            return original(VideoMAESelfAttention, self)(hidden_states)
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (one(hidden_states).unflatten(-1, heads) for one in (self.query, self.key, self.value))
        return attention(q, k, v, self.scaling).flatten(2), None


class VideoMAELayer(nn.Module):
    """Pre-norm block whose first addition and second LayerNorm are one operator."""

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """hidden_states [B, N, C] -> [B, N, C]."""
        if runs_original(self, _LAYER_CALLS, hidden_states) or unfit_norm(self.layernorm_after):
            return original(VideoMAELayer, self)(hidden_states, **kwargs)
        branch = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states, normed = add_norm(hidden_states, branch, self.layernorm_after)
        return self.output(self.intermediate(normed), hidden_states)


class VideoMAEEmbeddings(nn.Module):
    """Embeds the visible tubes of a clip alone."""

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None) -> Tensor:
        """pixel_values [B, T, 3, H, W], mask bool [B, N] (True: hidden) or None: embed all -> [B, Nv, C].

        Clips of other sizes go to the original, which says what it takes.
        """
        if runs_original(self, frozenset(), pixel_values):
            return original(VideoMAEEmbeddings, self)(pixel_values, bool_masked_pos)
        patches, pos = self.patch_embeddings, self.position_embeddings
        proj, clips, tokens = patches.projection, pixel_values.transpose(1, 2), pos.shape[1]
        visible = None if bool_masked_pos is None else visible_tokens(bool_masked_pos, clips, tokens)
        if visible is None or other_size(clips, proj, patches.image_size, tokens):
            return original(VideoMAEEmbeddings, self)(pixel_values, bool_masked_pos)
        return embed_visible_tubes(clips, proj.weight, proj.bias, pos.detach().to(proj.weight.device), visible)


def patch_hf_videomae(model: nn.Module) -> Report:
    """Run attention, the first addition + LayerNorm of every layer and the masked embedding on fused operators.

    Args:
        model: one of transformers' VideoMAE classes, or a network around them, changed in place: same parameters, same
            state dict; call it before wrapping the model (DDP, FSDP) or compiling it.

    Returns:
        What was swapped, and what was left and why. `unpatch(model)` undoes it.

    Raises:
        PatchError: if the model has no layers of VideoMAE's form.
    """
    missing = "layers with attention.attention, layernorm_before and layernorm_after, as transformers' VideoMAE has"
    layers = find_blocks(model, _LAYER, missing)
    report = Report(type(model).__name__)
    for name, module in model.named_modules():
        if hasattr(module, "patch_embeddings") and hasattr(module, "position_embeddings"):
            report.add(name, "embedding", _patch_embeddings(module), "the original runs where no mask is given")
    for name, layer in layers:
        _patch_attention(report, f"{name}.attention.attention", getattr(layer.attention, "attention", None))
        swap_block(report, name, layer, "layernorm_after", VideoMAELayer, _LAYER_CALLS, unexpected(layer, _LAYER))
    if isinstance(getattr(model, "encoder_to_decoder", None), nn.Linear):
        reason = "it is inside the model's forward; scatter_mask_tokens does it in a loop of your own"
        report.add("encoder_to_decoder", "mask tokens", reason)
        report.add("decoder.head", "head + loss", "the loss is of squares, which linear_smooth_l1 is not")
    return report


def _patch_attention(report: Report, name: str, attn: nn.Module | None) -> None:
    reason = "there is none" if attn is None else unexpected(attn, _ATTENTION) or _unfit_implementation(attn)
    note = ""
    if reason is None:
        note = dropout_note(attn.dropout_prob)
        probe = wave(1, 3, attn.query.in_features, like=attn.query.weight)
        reason = unfit_head(attn.attention_head_size) or swap(attn, VideoMAESelfAttention, _ATTENTION, probe=(probe,))
    report.add(name, "attention", reason, note)


def _unfit_implementation(attn: nn.Module) -> str | None:
    name = getattr(attn.config, "_attn_implementation", None) or "sdpa"
    return None if name.startswith(_STANDS_FOR) else f"its attention implementation is {name!r}, not 'sdpa'"


def _patch_embeddings(embeddings: nn.Module) -> str | None:
    patches, pos = embeddings.patch_embeddings, embeddings.position_embeddings
    proj = getattr(patches, "projection", None)
    if reason := unfit_tubes(proj):
        return reason
    clip, mask = probe_clip(proj, patches.image_size, pos.shape[1])
    return swap(embeddings, VideoMAEEmbeddings, frozenset(), probe=(clip.transpose(1, 2), mask))

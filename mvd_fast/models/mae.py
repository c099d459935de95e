"""MAE (He et al. 2022, arXiv 2111.06377): the image teacher, and its pre-training by masked pixel reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mvd_fast.config.network import DecoderConfig, ViTConfig
from mvd_kernels import AddLayerNorm, embed_visible_tubes

from .layers import (
    LN_EPS,
    MaskTokens,
    Pending,
    block_flops,
    check_shape,
    frozen,
    init_linear,
    linear_flops,
    make_blocks,
    run_blocks,
)
from .positions import sincos_2d
from .tokens import split_mask, tubes


class PatchEmbed(nn.Module):
    """Patches of an image to tokens; a Conv2d with kernel = stride = patch, computed as one matrix product."""

    def __init__(self, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.pixels = 3 * patch_size**2  # values of one patch
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, pos: Tensor, index: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W], pos [1, N, D] -> [B, N, D], or [B, M, D] for index int64 [B, M]; positions added."""
        return embed_visible_tubes(images[:, :, None], self.proj.weight[:, :, None], self.proj.bias, pos, index)


class ImageTeacher(nn.Module):
    """MAE's encoder as a teacher: images [B, 3, H, W] -> features [B, N, C].

    The cls token takes part and is dropped at the output; no final norm is applied (`norm` is there to hold the
    checkpoint's). Positions are always the 2-D sin-cos table: a checkpoint's `pos_embed` is ignored.
    """

    def __init__(self, config: ViTConfig | None = None, **fields: Any) -> None:
        """config: or its fields by name."""
        super().__init__()
        self.config = config = ViTConfig.of(config, fields)
        _, *side = config.grid
        self.patch_embed = PatchEmbed(config.embed_dim, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed = frozen(sincos_2d(config.embed_dim, *side, cls_token=True))
        self.blocks = make_blocks(config.embed_dim, config.depth, config.num_heads, config.drop_path, split_bias=False)
        self.norm = AddLayerNorm(config.embed_dim, eps=LN_EPS)
        self.register_load_state_dict_pre_hook(_keep_own_positions)
        self._init()

    def _init(self) -> None:
        init_linear(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)

    def encode(self, images: Tensor, visible: Tensor | None = None) -> Pending:
        """[B, 3, H, W] -> un-normed tokens [B, 1 + N, C], cls first; only visible int64 [B, Nv] where given."""
        check_shape("images", images, (3, self.config.image_size, self.config.image_size))
        x = self.patch_embed(images, self.pos_embed[:, 1:], visible)
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        return run_blocks(self.blocks, x, self.config.activation_checkpointing)

    def forward(self, images: Tensor) -> Tensor:
        """images float [B, 3, H, W] (normalised) -> [B, N, C]."""
        return self.encode(images).sum()[:, 1:]

    def encoder_flops(self, num_tokens: int) -> float:
        """Forward FLOP per image with `num_tokens` patches (the cls token comes on top)."""
        embed = linear_flops(num_tokens, self.patch_embed.pixels, self.config.embed_dim)
        return embed + len(self.blocks) * block_flops(num_tokens + 1, self.config.embed_dim)

    def flops(self) -> float:
        """Forward FLOP per image."""
        return self.encoder_flops(self.config.num_tokens)


class MaskedAutoencoder(ImageTeacher):
    """Stage 1 for images: encodes the visible patches, predicts the pixels of the masked ones."""

    def __init__(self, config: ViTConfig, decoder: DecoderConfig) -> None:
        super().__init__(config)
        _, *side = config.grid
        blocks = decoder.dim, decoder.depth, decoder.num_heads
        self.decoder_embed = MaskTokens(config.embed_dim, decoder.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.dim))
        self.decoder_pos_embed = frozen(sincos_2d(decoder.dim, *side, cls_token=True))
        self.decoder_blocks = make_blocks(*blocks, config.drop_path, split_bias=False)
        self.decoder_norm = AddLayerNorm(decoder.dim, eps=LN_EPS)
        self.decoder_pred = nn.Linear(decoder.dim, self.patch_embed.pixels)
        self._init()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Tensor, num_visible: int | None = None) -> Tensor:
        """images float [B, 3, H, W], mask bool [B, N], True = masked -> pixels of masked patches [B, Nm, p*p*3]."""
        visible, masked = split_mask(mask, num_visible)
        # In the table, row 0 is the cls token's, and the patches follow.
        seen, unseen = F.pad(visible + 1, (1, 0)), masked + 1
        _, x = self.norm(*self.encode(images, visible))
        x = self.decoder_embed(x, self.mask_token, self.decoder_pos_embed, seen, unseen)
        recompute = self.config.activation_checkpointing
        _, x = self.decoder_norm(*run_blocks(self.decoder_blocks, x, recompute, unseen.shape[1]))
        return self.decoder_pred(x)

    def targets(
        self, images: Tensor, masked: Tensor, normalize: bool, mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        """Pixels of the patches at masked int64 [B, Nm] -> [B, Nm, p*p*3], channels fastest.

        `normalize`: zero mean and unit (unbiased) variance over all values of a patch. MAE works on the normalised
        image as it is, so `mean` and `std` are not used.
        """
        pixels = tubes(images[:, :, None], 1, self.config.patch_size, masked)
        pixels = rearrange(pixels.float(), "b m c 1 p q -> b m (p q c)")
        if normalize:
            variance, center = torch.var_mean(pixels, dim=-1, keepdim=True)
            pixels = (pixels - center) / (variance + 1e-6).sqrt()
        return pixels

    def flops(self, num_visible: int | None = None) -> float:
        """Forward FLOP per image when `num_visible` patches are seen; None: of the encoder alone, which sees all."""
        if num_visible is None:
            return super().flops()
        dim, masked = self.decoder_embed.out_features, self.config.num_tokens - num_visible
        tokens, depth = self.config.num_tokens + 1, len(self.decoder_blocks)
        decoder = linear_flops(num_visible + 1, self.config.embed_dim, dim)
        decoder += (depth - 1) * block_flops(tokens, dim) + block_flops(tokens, dim, masked)
        decoder += linear_flops(masked, *self.decoder_pred.weight.shape)
        return self.encoder_flops(num_visible) + decoder


def _keep_own_positions(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: position tables in a checkpoint are replaced by the regenerated ones."""
    for name in ("pos_embed", "decoder_pos_embed"):
        if prefix + name in state and hasattr(module, name):
            state[prefix + name] = getattr(module, name).detach()

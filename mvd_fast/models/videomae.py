"""VideoMAE (Tong et al. 2022, arXiv 2203.12602): the video teacher, and its pre-training by pixel reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mvd_fast.config.network import ClipConfig, DecoderConfig
from mvd_kernels import AddLayerNorm

from .layers import (
    LN_EPS,
    ClipEncoder,
    Decoder,
    MaskTokens,
    init_linear,
    linear_flops,
    mask_token,
)
from .positions import sinusoid_1d
from .tokens import split_mask, tubes


class VideoEncoder(ClipEncoder):
    """VideoMAE's ViT with the 1-D sinusoid table over all tokens (not stored in checkpoints)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        self.norm = AddLayerNorm(config.embed_dim, eps=LN_EPS)
        self.register_buffer("positions", sinusoid_1d(config.embed_dim, config.num_tokens), persistent=False)

    def forward(self, video: Tensor, visible: Tensor | None = None, normed: bool = False) -> Tensor:
        """video [B, 3, T, H, W] -> tokens [B, N, D], or [B, Nv, D] for visible int64 [B, Nv]; un-normed by default."""
        x = self.encode_tubes(video, self.positions, visible)
        return self.norm(*x)[1] if normed else x.sum()


class VideoTeacher(nn.Module):
    """VideoMAE's encoder as a teacher: the whole clip [B, 3, T, H, W] -> features [B, N, C], no final norm applied."""

    def __init__(self, config: ClipConfig | None = None, **fields: Any) -> None:
        """config: or its fields by name."""
        super().__init__()
        self.config = ClipConfig.of(config, fields)
        self.encoder = VideoEncoder(self.config)
        init_linear(self)

    def forward(self, video: Tensor) -> Tensor:
        """video float [B, 3, T, H, W] (normalised) -> [B, N, C]."""
        return self.encoder(video)

    def flops(self) -> float:
        """Forward FLOP per clip."""
        return self.encoder.encoder_flops(self.config.num_tokens)


class VideoMAE(nn.Module):
    """Stage 1 for clips: encodes the visible tubes, predicts the pixels of the masked ones."""

    def __init__(self, config: ClipConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VideoEncoder(config)
        self.encoder_to_decoder = MaskTokens(config.embed_dim, decoder.dim, bias=False)
        self.mask_token = mask_token(decoder.dim)
        self.decoder = Decoder(
            decoder, self.encoder.patch_embed.pixels, config.drop_path, config.activation_checkpointing
        )
        self.register_buffer("positions", sinusoid_1d(decoder.dim, config.num_tokens), persistent=False)
        init_linear(self)

    def forward(self, video: Tensor, mask: Tensor, num_visible: int | None = None) -> Tensor:
        """video float [B, 3, T, H, W], mask bool [B, N], True = masked -> pixels of masked tubes [B, Nm, t*p*p*3]."""
        visible, masked = split_mask(mask, num_visible)
        x = self.encoder(video, visible, normed=True)
        x = self.encoder_to_decoder(x, self.mask_token, self.positions, visible, masked)
        return self.decoder(x, masked.shape[1])

    def targets(
        self, video: Tensor, masked: Tensor, normalize: bool, mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        """Pixels in [0, 1] of the tubes at masked int64 [B, Nm] -> [B, Nm, t*p*p*3], channels fastest.

        `mean`, `std`: the normalisation of `video`, undone here. `normalize`: each channel of a tube to zero mean
        and unit (unbiased) standard deviation.
        """
        pixels = tubes(video, self.config.tubelet_size, self.config.patch_size, masked)
        pixels = rearrange(pixels.float(), "b m c t p q -> b m (t p q) c")
        pixels = pixels * pixels.new_tensor(std) + pixels.new_tensor(mean)
        if normalize:
            variance, center = torch.var_mean(pixels, dim=-2, keepdim=True)
            pixels = (pixels - center) / (variance.sqrt() + 1e-6)
        return pixels.flatten(2)

    def flops(self, num_visible: int) -> float:
        """Forward FLOP per clip when `num_visible` tokens are seen."""
        tokens = self.config.num_tokens
        embed = linear_flops(num_visible, *self.encoder_to_decoder.weight.shape)
        return self.encoder.encoder_flops(num_visible) + embed + self.decoder.flops(tokens, tokens - num_visible)

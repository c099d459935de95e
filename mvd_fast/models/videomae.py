"""VideoMAE (Tong et al. 2022, arXiv 2203.12602): the video teacher, and its pre-training by pixel reconstruction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mvd_fast.config import OF_FINE_TUNING, ModelConfig, TeachersConfig
from mvd_kernels import AddLayerNorm

from .layers import (
    LN_EPS,
    ClipEncoder,
    Decoder,
    MaskTokens,
    decoder_flops,
    init_linear,
    linear_flops,
    mask_token,
)
from .positions import sinusoid_1d
from .tokens import split_mask, tubes


class VideoEncoder(ClipEncoder):
    """VideoMAE's ViT with the 1-D sinusoid table over all tokens (not stored in checkpoints)."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_frames: int,
        tubelet_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(image_size, patch_size, num_frames, tubelet_size, embed_dim, depth, num_heads, drop_path)
        self.norm = AddLayerNorm(embed_dim, eps=LN_EPS)
        self.register_buffer("positions", sinusoid_1d(embed_dim, self.num_tokens), persistent=False)

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def forward(self, video: Tensor, visible: Tensor | None = None, normed: bool = False) -> Tensor:
        """video [B, 3, T, H, W] -> tokens [B, N, D], or [B, Nv, D] for visible int64 [B, Nv]; un-normed by default."""
        x = self.encode_tubes(video, self.positions, visible)
        return self.norm(*x)[1] if normed else x.sum()


class VideoTeacher(nn.Module):
    """VideoMAE's encoder as a teacher: the whole clip [B, 3, T, H, W] -> features [B, N, C], no final norm applied."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_frames: int,
        tubelet_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.embed_dim, self.image_size = embed_dim, image_size
        self.encoder = VideoEncoder(image_size, patch_size, num_frames, tubelet_size, embed_dim, depth, num_heads)
        init_linear(self)

    def forward(self, video: Tensor) -> Tensor:
        """video float [B, 3, T, H, W] (normalised) -> [B, N, C]."""
        return self.encoder(video)

    def flops(self) -> float:
        """Forward FLOP per clip."""
        return self.encoder.encoder_flops(self.encoder.num_tokens)


class VideoMAE(nn.Module):
    """Stage 1 for clips: encodes the visible tubes, predicts the pixels of the masked ones."""

    input_key = "video"

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_frames: int,
        tubelet_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.tube = (tubelet_size, patch_size)
        self.encoder = VideoEncoder(
            image_size, patch_size, num_frames, tubelet_size, embed_dim, depth, num_heads, drop_path
        )
        self.encoder_to_decoder = MaskTokens(embed_dim, decoder_dim, bias=False)
        self.mask_token = mask_token(decoder_dim)
        pixels = 3 * tubelet_size * patch_size**2
        self.decoder = Decoder(decoder_dim, decoder_depth, decoder_heads, pixels, drop_path)
        self.encoder.recompute = self.decoder.recompute = activation_checkpointing
        self.register_buffer("positions", sinusoid_1d(decoder_dim, self.encoder.num_tokens), persistent=False)
        init_linear(self)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.encoder.grid

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
        pixels = tubes(video, *self.tube, masked).float().flatten(3).transpose(2, 3)  # [B, Nm, t*p*p, 3]
        pixels = pixels * pixels.new_tensor(std) + pixels.new_tensor(mean)
        if normalize:
            variance, center = torch.var_mean(pixels, dim=-2, keepdim=True)
            pixels = (pixels - center) / (variance.sqrt() + 1e-6)
        return pixels.flatten(2)

    def training_flops(self, num_visible: int) -> float:
        """Forward FLOP per clip when `num_visible` tokens are seen."""
        tokens, dim = self.encoder.num_tokens, self.encoder_to_decoder.out_features
        decoder = linear_flops(num_visible, self.encoder.embed_dim, dim)
        decoder += decoder_flops(tokens, dim, len(self.decoder.blocks), tokens - num_visible)
        decoder += linear_flops(tokens - num_visible, dim, self.decoder.head.out_features)
        return self.encoder.encoder_flops(num_visible) + decoder


def build(config: ModelConfig, teachers: TeachersConfig) -> VideoMAE:
    """The VideoMAE of a stage-1 run."""
    return VideoMAE(**config.model_dump(exclude={"kind", *OF_FINE_TUNING}))

"""MVD's student (Wang et al. 2023, arXiv 2212.04500): a ViT over the visible tubes, one shallow decoder per teacher."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mvd_fast.config import ModelConfig, TeachersConfig
from mvd_kernels import AddLayerNorm

from .layers import (
    LN_EPS,
    Decoder,
    MaskTokens,
    Target,
    TubeletEmbed,
    block_flops,
    check_video,
    frozen,
    init_linear,
    linear_flops,
    make_blocks,
    mask_token,
    run_blocks,
)
from .positions import sincos_3d
from .tokens import split_mask

BRANCHES = ("img", "vid")


class MaskedVideoStudent(nn.Module):
    """Predicts both teachers' features at the masked tokens from the visible tubes.

    Parameter names are the reference's: `patch_embed.proj`, `pos_embed`, `blocks.*`, `norm` and, for each of
    `img` and `vid`, `down_*`, `mask_token_*`, `pos_embed_*`, `decoder_*`.
    """

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
        image_target_dim: int,
        video_target_dim: int,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        side = image_size // patch_size
        self.grid = (num_frames // tubelet_size, side, side)
        self.image_size, self.num_frames, self.tubelet_size = image_size, num_frames, tubelet_size
        self.embed_dim, self.decoder_dim = embed_dim, decoder_dim
        self.recompute = activation_checkpointing

        self.patch_embed = TubeletEmbed(embed_dim, tubelet_size, patch_size)
        self.pos_embed = frozen(sincos_3d(embed_dim, *self.grid))
        self.blocks = make_blocks(embed_dim, depth, num_heads, drop_path)
        self.norm = AddLayerNorm(embed_dim, eps=LN_EPS)
        for branch, target_dim in zip(BRANCHES, (image_target_dim, video_target_dim), strict=True):
            decoder = Decoder(decoder_dim, decoder_depth, decoder_heads, target_dim, drop_path)
            decoder.recompute = activation_checkpointing
            self.add_module(f"down_{branch}", MaskTokens(embed_dim, decoder_dim))
            self.register_parameter(f"mask_token_{branch}", mask_token(decoder_dim))
            self.register_parameter(f"pos_embed_{branch}", frozen(sincos_3d(decoder_dim, *self.grid)))
            self.add_module(f"decoder_{branch}", decoder)
        init_linear(self)

    def encode(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """video [B, 3, T, H, W] -> normed tokens [B, N, D], or [B, Nv, D] for visible int64 [B, Nv]."""
        check_video(video, self.num_frames, self.image_size)
        x = self.patch_embed(video, self.pos_embed, visible)
        return self.norm(*run_blocks(self.blocks, x, self.recompute))[1]

    def forward(
        self,
        video: Tensor,
        mask: Tensor,
        num_visible: int | None = None,
        targets: tuple[Tensor | None, Tensor | None] | None = None,
        normalize_targets: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """video float [B, 3, T, H, W] (normalised), mask bool [B, N], True = masked, equal counts per row.

        Returns (pred_image [B, Nm, image_target_dim], pred_video [B, Nm, video_target_dim]), masked tokens ascending.
        `num_visible`: tokens visible per row, if known; saves a device synchronisation. With `targets`, both teachers'
        features of all tokens ([B, N, image_target_dim], [B, N, video_target_dim]), returns the two smooth-L1 losses
        instead (float32 scalars): of features normalised per token with `normalize_targets`, None for a target None.
        """
        visible, masked = split_mask(mask, num_visible)
        x = self.encode(video, visible)
        if targets is None:
            return tuple(self._decode(branch, x, visible, masked) for branch in BRANCHES)
        return tuple(
            None
            if features is None
            else self._decode(branch, x, visible, masked, Target(features, masked, normalize_targets))
            for branch, features in zip(BRANCHES, targets, strict=True)
        )

    def _decode(self, branch: str, x: Tensor, visible: Tensor, masked: Tensor, target: Target | None = None) -> Tensor:
        token, pos = getattr(self, f"mask_token_{branch}"), getattr(self, f"pos_embed_{branch}")
        x = getattr(self, f"down_{branch}")(x, token, pos, visible, masked)
        return getattr(self, f"decoder_{branch}")(x, masked.shape[1], target)

    def flops(self, num_visible: int) -> float:
        """Forward FLOP per clip with `num_visible` tokens visible."""
        tokens = math.prod(self.grid)
        total = linear_flops(num_visible, self.patch_embed.pixels, self.embed_dim)
        total += len(self.blocks) * block_flops(num_visible, self.embed_dim)
        for branch in BRANCHES:
            decoder: Decoder = getattr(self, f"decoder_{branch}")
            total += linear_flops(num_visible, self.embed_dim, self.decoder_dim)
            total += len(decoder.blocks) * block_flops(tokens, self.decoder_dim)
            total += linear_flops(tokens - num_visible, self.decoder_dim, decoder.head.out_features)
        return total


def build(config: ModelConfig, teachers: TeachersConfig) -> MaskedVideoStudent:
    """The student of a run; its heads are as wide as the teachers' features."""
    assert teachers.image is not None and teachers.video is not None, "checked when the config is loaded"
    return MaskedVideoStudent(
        **config.model_dump(exclude={"kind"}),
        image_target_dim=teachers.image.embed_dim,
        video_target_dim=teachers.video.embed_dim,
    )

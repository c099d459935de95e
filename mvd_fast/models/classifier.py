"""The classifier body of stage 3: all tokens, joint space-time attention, mean pooling, one linear head."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mvd_fast.config import ModelConfig, TeachersConfig

from .layers import (
    LN_EPS,
    TubeletEmbed,
    block_flops,
    check_video,
    init_linear,
    linear_flops,
    make_blocks,
    run_blocks,
)
from .positions import sincos_3d


class VideoClassifier(nn.Module):
    """video [B, 3, T, H, W] -> logits [B, classes]: blocks, mean over tokens, LayerNorm (`fc_norm`), Linear.

    The pre-trained final norm is not part of it. `head_scale` shrinks the head's initial weights (the recipes: 0.001).
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
        num_classes: int,
        drop_path: float = 0.0,
        head_dropout: float = 0.0,
        head_scale: float = 0.001,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        side = image_size // patch_size
        self.grid = (num_frames // tubelet_size, side, side)
        positions = sincos_3d(embed_dim, *self.grid)
        self.image_size, self.num_frames, self.embed_dim = image_size, num_frames, embed_dim
        self.recompute = activation_checkpointing
        self.patch_embed = TubeletEmbed(embed_dim, tubelet_size, patch_size)
        self.blocks = make_blocks(embed_dim, depth, num_heads, drop_path)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=LN_EPS)
        self.dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(embed_dim, num_classes)
        self.register_buffer("positions", positions, persistent=False)
        init_linear(self)
        self.head.weight.data.mul_(head_scale)

    def features(self, video: Tensor) -> Tensor:
        """video float [B, 3, T, H, W] (normalised) -> pooled, normed features [B, D]."""
        check_video(video, self.num_frames, self.image_size)
        x = run_blocks(self.blocks, self.patch_embed(video, self.positions), self.recompute).sum()
        return self.fc_norm(x.mean(1))

    def forward(self, video: Tensor) -> Tensor:
        """video float [B, 3, T, H, W] (normalised) -> logits [B, classes]."""
        return self.head(self.dropout(self.features(video)))

    def flops(self) -> float:
        """Forward FLOP per clip."""
        tokens = math.prod(self.grid)
        embed = linear_flops(tokens, self.patch_embed.pixels, self.embed_dim)
        return embed + len(self.blocks) * block_flops(tokens, self.embed_dim) + linear_flops(1, *self.head.weight.shape)


def build(config: ModelConfig, teachers: TeachersConfig) -> VideoClassifier:
    """The classifier of a run, fresh."""
    assert config.num_classes is not None, "checked when the config is loaded"
    decoder = {"decoder_dim", "decoder_depth", "decoder_heads"}
    return VideoClassifier(**config.model_dump(exclude={"kind", "init"} | decoder))

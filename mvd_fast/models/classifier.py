"""The classifier body of stage 3: all tokens, joint space-time attention, mean pooling, one linear head."""

from __future__ import annotations

from torch import Tensor, nn

from mvd_fast.config.network import ClipConfig

from .layers import LN_EPS, ClipEncoder, init_linear, linear_flops
from .positions import sincos_3d


class VideoClassifier(ClipEncoder):
    """video [B, 3, T, H, W] -> logits [B, classes]: blocks, mean over tokens, LayerNorm (`fc_norm`), Linear.

    The pre-trained final norm is not part of it. `head_scale` shrinks the head's initial weights (the recipes: 0.001).
    """

    def __init__(
        self, config: ClipConfig, num_classes: int, head_dropout: float = 0.0, head_scale: float = 0.001
    ) -> None:
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.embed_dim, eps=LN_EPS)
        self.dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(config.embed_dim, num_classes)
        self.register_buffer("positions", sincos_3d(config.embed_dim, *self.grid), persistent=False)
        init_linear(self)
        self.head.weight.data.mul_(head_scale)

    def features(self, video: Tensor) -> Tensor:
        """video float [B, 3, T, H, W] (normalised) -> pooled, normed features [B, D]."""
        return self.fc_norm(self.encode_tubes(video, self.positions).sum().mean(1))

    def forward(self, video: Tensor) -> Tensor:
        """video float [B, 3, T, H, W] (normalised) -> logits [B, classes]."""
        return self.head(self.dropout(self.features(video)))

    def flops(self) -> float:
        """Forward FLOP per clip."""
        return self.encoder_flops(self.config.num_tokens) + linear_flops(1, *self.head.weight.shape)

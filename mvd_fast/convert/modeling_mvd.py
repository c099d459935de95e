"""transformers' VideoMAE with the position table that the weights file holds, and one eps for all norms.

mvd-fast copies this file into the folders that it exports; nothing else imports it.
"""

from __future__ import annotations

import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel


def _take_positions_from_file(model: VideoMAEModel) -> None:
    embeddings, config = model.embeddings, model.config
    del embeddings.position_embeddings
    table = torch.zeros(1, embeddings.num_patches, config.hidden_size)
    embeddings.register_buffer("position_embeddings", table)


class MVDModel(VideoMAEModel):
    """pixel_values [B, T, 3, H, W] -> last_hidden_state [B, N, D]."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__(config)
        _take_positions_from_file(self)


class MVDForVideoClassification(VideoMAEForVideoClassification):
    """pixel_values [B, T, 3, H, W] -> logits [B, classes]."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__(config)
        _take_positions_from_file(self.videomae)
        self.fc_norm.eps = config.layer_norm_eps

"""Action detection (AVA): what the people in given boxes do, from one RoI of the token map for each box."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from mvd_fast.config.network import ClipConfig
from mvd_kernels import AddLayerNorm

from .layers import LN_EPS, ClipEncoder, check_shape, frozen, init_linear
from .positions import sincos_3d

ROI_SIDE = 7  # sampling points of a box, each way


class ActionDetector(ClipEncoder):
    """Clips and boxes -> logits of every action for every box.

    As in VideoMAE's detector (Tong et al. 2022), which MVD's AVA results use: all tokens with joint space-time
    attention, the pre-trained final norm, the mean over time, RoIAlign of 7 x 7, the maximum over these, one linear
    layer. `head_scale` shrinks the head's initial weights. The encoder's parameters have the student's names.
    """

    def __init__(self, config: ClipConfig, num_classes: int, head_scale: float = 0.001) -> None:
        super().__init__(config)
        self.pos_embed = frozen(sincos_3d(config.embed_dim, *self.grid))
        self.norm = AddLayerNorm(config.embed_dim, eps=LN_EPS)
        self.head = nn.Linear(config.embed_dim, num_classes)
        init_linear(self)
        self.head.weight.data.mul_(head_scale)

    def token_map(self, video: Tensor) -> Tensor:
        """video float [B, 3, T, H, W] (normalised) -> [B, D, H', W'], normed tokens averaged over time."""
        tokens = self.norm(*self.encode_tubes(video, self.pos_embed))[1].unflatten(1, self.grid)  # [B, T', H', W', D]
        return tokens.mean(1).permute(0, 3, 1, 2)

    def forward(self, video: Tensor, boxes: Tensor, box_clip: Tensor) -> Tensor:
        """video float [B, 3, T, H, W]; boxes float [R, 4], x1, y1, x2, y2 as shares of the input's sides; box_clip
        int64 [R], the clip of each -> logits float [R, num_classes]."""
        check_shape("boxes", boxes, (4,))
        features = self.token_map(video).float()  # coordinates need float32, and so does torchvision on a CPU
        _, height, width = self.grid
        corners = boxes.float() * boxes.new_tensor((width, height, width, height), dtype=torch.float32)
        rois = torch.cat([box_clip[:, None].float(), corners], dim=1)
        pooled = roi_align(features, rois, ROI_SIDE, aligned=True).amax((2, 3))  # [R, D]
        return self.head(pooled.to(self.head.weight.dtype))

    def flops(self) -> float:
        """Forward FLOP per clip, without the few of its boxes."""
        return self.encoder_flops(self.config.num_tokens)

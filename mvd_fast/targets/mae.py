"""The image teacher: an MAE encoder, from the public checkpoints or a stage-1 run of ours, on single frames."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mvd_fast.config.network import ClipConfig, ViTConfig
from mvd_fast.convert.weights import load_into, read_weights
from mvd_fast.models import ImageTeacher

from . import TeacherConfig

# What a pre-training checkpoint holds beyond the encoder.
DECODER_KEYS = ("decoder", "mask_token")


class Config(TeacherConfig):
    """The features of an MAE encoder for the first frame of each tube."""

    kind: Literal["mae"] = "mae"
    name: str = Field("image", pattern="^[a-z0-9_]+$", description="of the target, in logs and weights")

    def published(self) -> tuple[str, str]:
        return "the MAE project's release (facebookresearch/mae on GitHub)", "blh"


class FrameFeatures(nn.Module):
    """An image network on the first frame of each tube, resized where it expects another size."""

    def __init__(self, teacher: ImageTeacher, tubelet_size: int, slices: int) -> None:
        super().__init__()
        self.teacher, self.tubelet_size, self.slices = teacher, tubelet_size, slices

    def forward(self, video: Tensor) -> Tensor:
        """video float [B, 3, T, H, W] (normalised) -> [B, N, C]."""
        frames = video[:, :, :: self.tubelet_size].transpose(1, 2).flatten(0, 1)  # [B * T', 3, H, W]
        size = self.teacher.config.image_size
        if frames.shape[-1] != size:
            frames = F.interpolate(frames, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return self.teacher(frames).unflatten(0, (len(video), -1)).flatten(1, 2)

    def flops(self) -> float:
        """FLOP per clip."""
        return self.slices * self.teacher.flops()


def build(config: Config, clip: ClipConfig) -> FrameFeatures:
    """Encoder weights only; a pre-training checkpoint's decoder is left out."""
    sizes = ViTConfig(**config.model_dump(include=set(ViTConfig.model_fields)))
    teacher = ImageTeacher(sizes)
    if torch.get_default_device().type != "meta":
        state = read_weights(config.checkpoint)
        state = {name: value for name, value in state.items() if not name.startswith(DECODER_KEYS)}
        load_into(teacher, state, config.checkpoint)
    return FrameFeatures(teacher, clip.tubelet_size, clip.grid[0])

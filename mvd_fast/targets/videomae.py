"""The video teacher: a VideoMAE encoder, from the public checkpoints or a stage-1 run of ours, on whole clips."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from mvd_fast.config.network import ClipConfig
from mvd_fast.convert.weights import load_into, read_weights
from mvd_fast.models import VideoTeacher

from . import TeacherConfig


class Config(TeacherConfig):
    """The features of a VideoMAE encoder for the whole clip."""

    kind: Literal["videomae"] = "videomae"
    name: str = Field("video", pattern="^[a-z0-9_]+$", description="of the target, in logs and weights")

    def published(self) -> tuple[str, str]:
        return "VideoMAE's model zoo (MODEL_ZOO.md of MCG-NJU/VideoMAE on GitHub)", "sblh"


def build(config: Config, clip: ClipConfig) -> VideoTeacher:
    """Encoder weights only; the clip's length and tubelets are the student's."""
    own = config.model_dump(include={"image_size", "patch_size", "embed_dim", "depth", "num_heads"})
    teacher = VideoTeacher(**own, num_frames=clip.num_frames, tubelet_size=clip.tubelet_size)
    if torch.get_default_device().type != "meta":
        state = read_weights(config.checkpoint)
        state = {name: value for name, value in state.items() if name.startswith("encoder.")}
        load_into(teacher, state, config.checkpoint)
    return teacher

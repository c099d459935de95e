"""The video teacher: a VideoMAE encoder, from the public checkpoints or a stage-1 run of ours."""

from __future__ import annotations

from mvd_fast.config import ModelConfig, TeacherConfig
from mvd_fast.interop.weights import load_into, read_weights
from mvd_fast.models import VideoTeacher


def network(config: TeacherConfig, model: ModelConfig) -> VideoTeacher:
    """The teacher with random weights; the clip's length and tubelets are the student's."""
    return VideoTeacher(
        config.image_size,
        config.patch_size,
        model.num_frames,
        model.tubelet_size,
        config.embed_dim,
        config.depth,
        config.num_heads,
    )


def build(config: TeacherConfig, model: ModelConfig) -> VideoTeacher:
    """Encoder weights only."""
    teacher = network(config, model)
    state = read_weights(config.checkpoint)
    state = {name: value for name, value in state.items() if name.startswith("encoder.")}
    load_into(teacher, state, config.checkpoint)
    return teacher

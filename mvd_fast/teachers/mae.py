"""The image teacher: an MAE encoder, from the public checkpoints or a stage-1 run of ours."""

from __future__ import annotations

from mvd_fast.config import ModelConfig, TeacherConfig
from mvd_fast.interop.weights import load_into, read_weights
from mvd_fast.models import ImageTeacher

# What a pre-training checkpoint holds beyond the encoder.
DECODER_KEYS = ("decoder", "mask_token")


def network(config: TeacherConfig, model: ModelConfig) -> ImageTeacher:
    """The teacher with random weights."""
    return ImageTeacher(config.image_size, config.patch_size, config.embed_dim, config.depth, config.num_heads)


def build(config: TeacherConfig, model: ModelConfig) -> ImageTeacher:
    """Encoder weights only; a pre-training checkpoint's decoder is left out."""
    teacher = network(config, model)
    state = read_weights(config.checkpoint)
    state = {name: value for name, value in state.items() if not name.startswith(DECODER_KEYS)}
    load_into(teacher, state, config.checkpoint)
    return teacher

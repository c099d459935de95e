"""Networks. One file per family; `model.kind` in a config names the file whose `build` makes the trained network."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from mvd_fast.config import ModelConfig, TeachersConfig

from .classifier import VideoClassifier
from .mae import ImageTeacher, MaskedAutoencoder
from .student import MaskedVideoStudent
from .videomae import VideoMAE, VideoTeacher

__all__ = [
    "ImageTeacher",
    "MaskedAutoencoder",
    "MaskedVideoStudent",
    "VideoClassifier",
    "VideoMAE",
    "VideoTeacher",
    "build_model",
]


def build_model(config: ModelConfig, teachers: TeachersConfig) -> nn.Module:
    """The network that a run trains, freshly initialised from torch's global generator."""
    return import_module(f"mvd_fast.models.{config.kind}").build(config, teachers)

"""Networks: one file per family. Each is made from one object with its sizes (mvd_fast.config.network)."""

from __future__ import annotations

from mvd_fast.config.network import ClipConfig, DecoderConfig, ViTConfig

from .classifier import VideoClassifier
from .mae import ImageTeacher, MaskedAutoencoder
from .student import MaskedVideoStudent, TargetDecoder
from .videomae import VideoMAE, VideoTeacher

__all__ = [
    "ClipConfig",
    "DecoderConfig",
    "ImageTeacher",
    "MaskedAutoencoder",
    "MaskedVideoStudent",
    "TargetDecoder",
    "ViTConfig",
    "VideoClassifier",
    "VideoMAE",
    "VideoTeacher",
]

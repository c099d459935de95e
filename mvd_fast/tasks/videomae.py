"""Stage 1 of the video teacher: VideoMAE on clips (Tong et al. 2022)."""

from __future__ import annotations

from typing import ClassVar, Literal

from mvd_fast.config.network import ClipConfig
from mvd_fast.models import VideoMAE

from ._pixels import PixelConfig, PixelTask, pixel_task


class Config(PixelConfig):
    """A video ViT that learns the pixels of masked tubes."""

    needs: ClassVar[frozenset[str]] = frozenset({"video"})
    teaches: ClassVar[str] = "video"

    task: Literal["videomae"] = "videomae"
    model: ClipConfig


def build(config: Config) -> PixelTask:
    """The VideoMAE of the run, fresh."""
    return pixel_task(config, VideoMAE(config.model, config.decoder), "video")

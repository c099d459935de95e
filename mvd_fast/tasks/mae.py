"""Stage 1 of the image teacher: MAE on single images (He et al. 2022)."""

from __future__ import annotations

from typing import ClassVar, Literal

from mvd_fast.models import MaskedAutoencoder

from ._pixels import PixelConfig, PixelTask, pixel_task


class Config(PixelConfig):
    """An image ViT that learns the pixels of masked patches."""

    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    teaches: ClassVar[str] = "image"

    task: Literal["mae"] = "mae"


def build(config: Config) -> PixelTask:
    """The MAE of the run, fresh."""
    return pixel_task(config, MaskedAutoencoder(config.model, config.decoder), "image")

"""The sizes of a network: one object that is passed whole, and stored beside its weights."""

from __future__ import annotations

import math
from typing import Any, Self

from pydantic import Field, PositiveInt, model_validator

from .base import Strict, require_divisible

SIZES = {384: "s", 768: "b", 1024: "l", 1280: "h"}  # the letters of the standard ViTs, by width


def size_of_width(embed_dim: int) -> str:
    """The letter of the standard ViT of a width; empty for other widths."""
    return SIZES.get(embed_dim, "")


class ViTConfig(Strict):
    """A ViT over the patches of an image."""

    image_size: PositiveInt = Field(224, description="side of the square input, pixels")
    patch_size: PositiveInt = Field(16, description="side of a patch, pixels")
    embed_dim: PositiveInt = Field(description="width of the encoder")
    depth: PositiveInt = Field(description="blocks of the encoder")
    num_heads: PositiveInt = Field(description="attention heads of the encoder")
    drop_path: float = Field(0.0, ge=0.0, lt=1.0, description="stochastic depth rate of the last block")
    activation_checkpointing: bool = Field(False, description="recompute block activations in backward")

    @classmethod
    def of(cls, config: Self | None, fields: dict[str, Any]) -> Self:
        """The config that a network was given, or one made of the fields that it was given by name."""
        if config is not None and fields:
            raise TypeError(f"give a {cls.__name__}, or its fields by name, not both: {', '.join(fields)}")
        return cls(**fields) if config is None else config

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        side = self.image_size // self.patch_size
        return 1, side, side

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        require_divisible(self, "image_size", "patch_size")
        require_divisible(self, "embed_dim", "num_heads")
        return self


class ClipConfig(ViTConfig):
    """A ViT over the tubes of a clip."""

    num_frames: PositiveInt = Field(16, description="frames of a clip")
    tubelet_size: PositiveInt = Field(2, description="frames covered by one token")

    @property
    def grid(self) -> tuple[int, int, int]:
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @model_validator(mode="after")
    def _whole_tubes(self) -> Self:
        require_divisible(self, "num_frames", "tubelet_size")
        return self


class DecoderConfig(Strict):
    """A shallow decoder over all tokens, for pre-training."""

    dim: PositiveInt = Field(description="width")
    depth: PositiveInt = Field(description="blocks")
    num_heads: PositiveInt = Field(description="attention heads")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        require_divisible(self, "dim", "num_heads")
        return self

"""What is cut out of a frame: ways to choose the box, with their settings. It is then resized to the input's size."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, SerializeAsAny

from mvd_fast.config.base import Strict
from mvd_fast.config.kinds import OfKind
from mvd_fast.config.run import DataConfig
from mvd_fast.data import sampling
from mvd_fast.data.sampling import Box, Draws


class CropKind(Strict):
    """One way to choose the box."""

    kind: str
    is_random: ClassVar[bool] = True
    bicubic: ClassVar[bool] = False  # how the box is resized; else bilinear

    def box(self, draws: Draws, width: int, height: int, size: int) -> Box:
        """The part of a width x height frame that becomes the size x size input."""
        raise NotImplementedError


class MultiScale(CropKind):
    """VideoMAE's and MVD's crop: sides are parts of the shorter side, at one of 13 places."""

    kind: Literal["multiscale"] = "multiscale"
    scales: tuple[PositiveFloat, ...] = Field((1.0, 0.875, 0.75, 0.66), description="parts of the shorter side")

    def box(self, draws: Draws, width: int, height: int, size: int) -> Box:
        return sampling.multi_scale_box(draws, width, height, size, self.scales)


class RandomResized(CropKind):
    """MAE's crop: a random share of the frame, anywhere in it."""

    kind: Literal["random_resized"] = "random_resized"
    area: tuple[PositiveFloat, PositiveFloat] = Field((0.2, 1.0), description="range of the share that is kept")
    bicubic: ClassVar[bool] = True

    def box(self, draws: Draws, width: int, height: int, size: int) -> Box:
        return sampling.random_resized_box(draws, width, height, self.area)


class CenterCrop(CropKind):
    """The largest square in the middle."""

    kind: Literal["center"] = "center"
    is_random: ClassVar[bool] = False

    def box(self, draws: Draws, width: int, height: int, size: int) -> Box:
        return sampling.center_box(width, height)


class WholeFrame(CropKind):
    """The whole frame, made square."""

    kind: Literal["whole"] = "whole"
    is_random: ClassVar[bool] = False

    def box(self, draws: Draws, width: int, height: int, size: int) -> Box:
        return Box(0, 0, height, width)


KINDS = (MultiScale, RandomResized, CenterCrop, WholeFrame)
AnyCrop = Annotated[SerializeAsAny[CropKind], OfKind(classes=KINDS, default="multiscale")]


class CroppedConfig(DataConfig):
    """Data whose frames are cut to a square."""

    crop: AnyCrop = Field(MultiScale(), description="what is cut out of a frame and resized to the input")

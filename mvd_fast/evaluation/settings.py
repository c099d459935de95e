"""The settings of validation and testing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from mvd_fast.config.base import Strict


class EvaluationConfig(Strict):
    """Testing on labelled videos: one central view after each epoch, `clips` x `crops` views by `mvd-fast evaluate`."""

    list: str = Field("", description="labelled videos to validate on after each epoch; empty: no validation")
    root: str = Field("", description="folder that relative paths in the list start from; empty: the list's folder")
    sampling: Literal["dense", "uniform"] = Field(
        "dense", description="clips of every n-th frame along the video (K400), or frames from all over it (SSv2)"
    )
    clips: PositiveInt = Field(5, description="views in time")
    crops: PositiveInt = Field(3, description="views along the longer side of the frame")
    batch: PositiveInt = Field(16, description="views at once on each rank")

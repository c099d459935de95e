"""Augmentation of labelled clips: its settings, what is done to a sample as pure functions of its key, and the doing.

RandAugment is done by DALI before the crop (mvd_fast/data/graph.py); random erasing and mixing on finished batches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt

from mvd_fast.config.base import Strict
from mvd_fast.data.sampling import Box, Purpose, SampleKey

if TYPE_CHECKING:
    from torch import Tensor


class RandAugmentConfig(Strict):
    """RandAugment (Cubuk et al. 2020) with timm's increasing severities, the same for all frames of a clip."""

    layers: int = Field(0, ge=0, description="operations drawn per sample, each done with probability 1/2; 0: none")
    magnitude: float = Field(7.0, ge=0.0, le=10.0, description="mean severity, of 10")
    deviation: float = Field(0.5, ge=0.0, description="standard deviation of the severity")


class AugmentConfig(Strict):
    """What fine-tuning does to labelled clips besides crop and flip; all off by default."""

    repeats: PositiveInt = Field(1, description="differently augmented copies of each clip in a batch")
    rand_augment: RandAugmentConfig = RandAugmentConfig()
    random_erasing: float = Field(0.0, ge=0.0, le=1.0, description="probability that a box is filled with noise")
    mixup: float = Field(0.0, ge=0.0, le=2.0, description="alpha of the beta distribution; 0: none")
    cutmix: float = Field(0.0, ge=0.0, le=2.0, description="alpha of the beta distribution; 0: none")
    mix_probability: float = Field(1.0, ge=0.0, le=1.0, description="that a micro batch is mixed")
    cutmix_probability: float = Field(0.5, ge=0.0, le=1.0, description="that it is cutmix where both are on")
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of the target spread over all classes")

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)


# ---- RandAugment ----

LEVELS = np.linspace(0.0, 1.0, 101, dtype=np.float32)  # severities, in steps of 0.1 of timm's 10
OPERATION_PROBABILITY = 0.5

# timm's 15 operations by the names of `nvidia.dali.auto_aug`, and their ranges from severity 0 to 10 ("increasing").
OPERATIONS = {
    "auto_contrast": None,
    "equalize": None,
    "invert": None,
    "rotate": (0, 30),
    "posterize": np.maximum(4 - np.floor(4 * LEVELS), 1),
    "solarize": 256 - np.floor(256 * LEVELS),
    "solarize_add": np.floor(110 * LEVELS),
    "color": (0, 0.9),
    "contrast": (0, 0.9),
    "brightness": (0, 0.9),
    "sharpness": (0, 0.9),
    "shear_x": (0, 0.3),
    "shear_y": (0, 0.3),
    "translate_x": (0, 0.45),
    "translate_y": (0, 0.45),
}


def draw_operations(key: SampleKey, recipe: RandAugmentConfig) -> np.ndarray:
    """int32 [layers, 3]: number of an operation (len(OPERATIONS): none), severity 0 to 100, sign 0 or 1."""
    draws, rows = key.draws(Purpose.AUGMENT), []
    for _ in range(recipe.layers):
        operation = draws.below(len(OPERATIONS))
        done = draws.uniform() < OPERATION_PROBABILITY
        level = round(10 * min(10.0, max(0.0, draws.normal(recipe.magnitude, recipe.deviation))))
        rows.append((operation if done else len(OPERATIONS), level, draws.below(2)))
    return np.array(rows or [(0, 0, 0)], dtype=np.int32)


# ---- random erasing ----

ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


def draw_erasing(key: SampleKey, probability: float, size: int) -> tuple[Box | None, int]:
    """The box of the size x size input that is erased (Zhong et al. 2020), if any, and the seed of its noise."""
    draws = key.draws(Purpose.ERASE)
    seed = int(draws.words(1)[0] >> np.uint64(1))
    if draws.uniform() >= probability:
        return None, seed
    low, high = (math.log(ratio) for ratio in ERASED_RATIO)
    for _ in range(ERASING_ATTEMPTS):
        area = size * size * draws.uniform(*ERASED_AREA)
        ratio = math.exp(draws.uniform(low, high))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < size and 0 < width < size:
            return Box(draws.below(size - height + 1), draws.below(size - width + 1), height, width), seed
    return None, seed


def erase(video: Tensor, box: Box, seed: int) -> None:
    """Fills the box of a normalised clip [3, T, H, W] with normal noise, another in every pixel, in place."""
    import torch

    y, x, height, width = box
    noise = torch.Generator(video.device).manual_seed(seed)
    part = video[:, :, y : y + height, x : x + width]
    part.copy_(torch.randn(part.shape, generator=noise, device=video.device))


# ---- mixing ----


class Mix(NamedTuple):
    """How the clips of a micro batch are mixed: `share` of each stays, the rest comes from the one opposite.

    With a box that part is pasted (CutMix: Yun et al. 2019), without all pixels are blended (mixup: Zhang et al. 2018).
    """

    share: float = 1.0
    box: Box | None = None


def draw_mix(key: SampleKey, recipe: AugmentConfig, size: int) -> Mix:
    """The mixing of the micro batch whose first sample is `key`'s."""
    draws = key.draws(Purpose.MIX)
    if not recipe.mixes or draws.uniform() >= recipe.mix_probability:
        return Mix()
    cuts = recipe.cutmix and (not recipe.mixup or draws.uniform() < recipe.cutmix_probability)
    share = draws.beta(recipe.cutmix if cuts else recipe.mixup)
    if not cuts:
        return Mix(share)
    side, centre_y, centre_x = int(size * math.sqrt(1 - share)), draws.below(size), draws.below(size)
    (top, bottom), (left, right) = (
        (max(0, centre - side // 2), min(size, centre + side // 2)) for centre in (centre_y, centre_x)
    )
    box = Box(top, left, bottom - top, right - left)
    return Mix(1 - box.height * box.width / size**2, box)


def mixed(video: Tensor, target: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """video [B, 3, T, H, W], target [B, classes] -> both mixed with the same in reverse order.

    The box is cut from height and width and goes through all frames.
    """
    if mix.share == 1.0:
        return video, target
    target = mix.share * target + (1 - mix.share) * target.flip(0)
    if mix.box is None:
        return mix.share * video + (1 - mix.share) * video.flip(0), target
    y, x, height, width = mix.box
    video = video.clone()
    rows, columns = slice(y, y + height), slice(x, x + width)
    video[..., rows, columns] = video.flip(0)[..., rows, columns]
    return video, target

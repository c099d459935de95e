"""Augmentation of labelled clips: what is done to a sample, as pure functions of its key, and the doing.

RandAugment happens inside the DALI pipeline, before the crop, with `nvidia.dali.auto_aug`'s operations; random erasing
and mixing on finished batches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from nvidia.dali import fn
from nvidia.dali.auto_aug import augmentations as dali
from nvidia.dali.auto_aug.core import augmentation, signed_bin
from nvidia.dali.pipeline import DataNode

from mvd_fast.config import AugmentConfig, RandAugmentConfig
from mvd_fast.data.sampling import Box, Purpose, SampleKey

if TYPE_CHECKING:
    from torch import Tensor

# ---- RandAugment ----

LEVELS = np.linspace(0.0, 1.0, 101, dtype=np.float32)  # severities, in steps of 0.1 of timm's 10
OPERATION_PROBABILITY = 0.5


# These two as in auto_aug, which calls them by names that DALI has deprecated.
@augmentation
def _equalize(data: DataNode, _: None) -> DataNode:
    return fn.equalize(data)


@augmentation(mag_range=(0, 0.9), randomly_negate=True, mag_to_param=dali.sharpness_kernel, param_device="auto")
def _sharpness(data: DataNode, kernel: DataNode) -> DataNode:
    return fn.filter(data, kernel)


# timm's 15 operations and their ranges from severity 0 to 10 ("increasing"), done by DALI.
OPERATIONS = (
    dali.auto_contrast,
    _equalize,
    dali.invert,
    dali.rotate.augmentation(mag_range=(0, 30)),
    dali.posterize.augmentation(mag_range=np.maximum(4 - np.floor(4 * LEVELS), 1)),
    dali.solarize.augmentation(mag_range=256 - np.floor(256 * LEVELS)),
    dali.solarize_add.augmentation(mag_range=np.floor(110 * LEVELS)),
    dali.color.augmentation(mag_range=(0, 0.9)),
    dali.contrast.augmentation(mag_range=(0, 0.9)),
    dali.brightness.augmentation(mag_range=(0, 0.9)),
    _sharpness,
    dali.shear_x.augmentation(mag_range=(0, 0.3)),
    dali.shear_y.augmentation(mag_range=(0, 0.3)),
    dali.translate_x.augmentation(mag_range=(0, 0.45)),
    dali.translate_y.augmentation(mag_range=(0, 0.45)),
)


def draw_operations(key: SampleKey, recipe: RandAugmentConfig) -> np.ndarray:
    """int32 [layers, 3]: number of an operation (len(OPERATIONS): none), severity 0 to 100, sign 0 or 1."""
    draws, rows = key.draws(Purpose.AUGMENT), []
    for _ in range(recipe.layers):
        operation = draws.below(len(OPERATIONS))
        done = draws.uniform() < OPERATION_PROBABILITY
        level = round(10 * min(10.0, max(0.0, draws.normal(recipe.magnitude, recipe.deviation))))
        rows.append((operation if done else len(OPERATIONS), level, draws.below(2)))
    return np.array(rows or [(0, 0, 0)], dtype=np.int32)


def apply_operations(pixels: DataNode, operations: DataNode, shape: DataNode, layers: int, fill: float) -> DataNode:
    """uint8 FHWC -> the same, each sample's operations one after the other, the same for all of its frames.

    `shape`: height and width of the frames [2]. `fill`: grey of what was outside of the frame.
    """
    for layer in range(layers):
        severity = signed_bin(operations[layer, 1], operations[layer, 2])
        pixels = _one_of(pixels, operations[layer, 0], 0, len(OPERATIONS) + 1, severity, shape, fill)
    return pixels


def _one_of(
    pixels: DataNode, chosen: DataNode, first: int, stop: int, severity: object, shape: DataNode, fill: float
) -> DataNode:
    """Operation number `chosen` of those from `first` to `stop`, found by halving: DALI splits the batch at each if."""
    if stop - first == 1:
        if first == len(OPERATIONS):
            done = pixels
        else:
            done = OPERATIONS[first](
                pixels, magnitude_bin=severity, num_magnitude_bins=len(LEVELS), shape=shape, fill_value=fill
            )
    else:
        middle = (first + stop) // 2
        if chosen < middle:
            done = _one_of(pixels, chosen, first, middle, severity, shape, fill)
        else:
            done = _one_of(pixels, chosen, middle, stop, severity, shape, fill)
    return done


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
    if not (recipe.mixup or recipe.cutmix) or draws.uniform() >= recipe.mix_probability:
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

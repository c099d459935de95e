"""Parts of DALI's graph, from which datasets put theirs together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nvidia.dali import fn, types
from nvidia.dali.auto_aug import augmentations as dali
from nvidia.dali.auto_aug.core import augmentation, signed_bin
from nvidia.dali.pipeline import DataNode

from mvd_fast.data.augment import LEVELS, OPERATIONS

if TYPE_CHECKING:
    from mvd_fast.data.crops import CroppedConfig
    from mvd_fast.data.inputs import Inputs

# ---- decoding ----


def decoded_video(inputs: Inputs, device: str) -> DataNode:
    """Frames from DALI's decoder where the sample is encoded, else those the source decoded; uint8 FHWC."""
    if inputs.is_encoded:
        pixels = fn.decoders.video(
            inputs.encoded,
            frames=inputs.frames,
            pad_mode="none",  # by default a frame past the end is memory that nobody wrote
            device="mixed" if device == "gpu" else "cpu",
            affine=False,
        )
    else:
        pixels = inputs.decoded.gpu() if device == "gpu" else inputs.decoded
    return pixels


def decoded_image(inputs: Inputs, device: str) -> DataNode:
    """The image from DALI's decoder where the sample is encoded, else what the source decoded; uint8 HWC.

    Orientation tags stay unused, as in the field's image folders: the box is in stored pixels.
    """
    if inputs.is_encoded:
        pixels = fn.decoders.image(
            inputs.encoded,
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
    else:
        pixels = inputs.decoded.gpu()[0] if device == "gpu" else inputs.decoded[0]
    return pixels


# ---- RandAugment ----


# These two as in auto_aug, which calls them by names that DALI has deprecated.
@augmentation
def _equalize(data: DataNode, _: None) -> DataNode:
    return fn.equalize(data)


@augmentation(randomly_negate=True, mag_to_param=dali.sharpness_kernel, param_device="auto")
def _sharpness(data: DataNode, kernel: DataNode) -> DataNode:
    return fn.filter(data, kernel)


def _operation(name: str, mag_range: Any) -> Any:
    found = {"equalize": _equalize, "sharpness": _sharpness}.get(name) or getattr(dali, name)
    return found if mag_range is None else found.augmentation(mag_range=mag_range)


DONE_BY = [_operation(name, mag_range) for name, mag_range in OPERATIONS.items()]


def augmented(pixels: DataNode, operations: DataNode, layers: int, fill: float) -> DataNode:
    """uint8 FHWC -> the same, each sample's operations one after the other, the same for all of its frames.

    `operations` as `augment.draw_operations` gives them. `fill`: grey of what was outside of the frame.
    """
    shape = pixels.shape()[1:3]
    for layer in range(layers):
        severity = signed_bin(operations[layer, 1], operations[layer, 2])
        pixels = _one_of(pixels, operations[layer, 0], 0, len(DONE_BY) + 1, severity, shape, fill)
    return pixels


def _one_of(
    pixels: DataNode, chosen: DataNode, first: int, stop: int, severity: object, shape: DataNode, fill: float
) -> DataNode:
    """Operation number `chosen` of those from `first` to `stop`, found by halving: DALI splits the batch at each if."""
    if stop - first == 1:
        if first == len(DONE_BY):
            done = pixels
        else:
            done = DONE_BY[first](
                pixels, magnitude_bin=severity, num_magnitude_bins=len(LEVELS), shape=shape, fill_value=fill
            )
    else:
        middle = (first + stop) // 2
        if chosen < middle:
            done = _one_of(pixels, chosen, first, middle, severity, shape, fill)
        else:
            done = _one_of(pixels, chosen, middle, stop, severity, shape, fill)
    return done


# ---- the input ----


def cropped(pixels: DataNode, inputs: Inputs, data: CroppedConfig, size: int, layout: str) -> DataNode:
    """uint8 FHWC or HWC -> float32 in `layout` (CFHW or CHW): the sample's box as size x size, flipped and normalised.

    Antialiased like Pillow's resize, which the reference recipes use.
    """
    axes = (0, 1) if layout == "CHW" else (1, 2)
    pixels = fn.slice(pixels, start=inputs.box[0:2], shape=inputs.box[2:4], axes=axes)
    pixels = fn.resize(
        pixels,
        resize_x=size,
        resize_y=size,
        interp_type=types.INTERP_CUBIC if data.crop.bicubic else types.INTERP_LINEAR,
        antialias=True,
    )
    return normalised(pixels, inputs, data, layout)


def normalised(pixels: DataNode, inputs: Inputs, data: CroppedConfig, layout: str) -> DataNode:
    """The same of pixels that have the input's size."""
    return fn.crop_mirror_normalize(
        pixels,
        dtype=types.FLOAT,
        output_layout=layout,
        mirror=inputs.flip,
        mean=[255 * value for value in data.mean],
        std=[255 * value for value in data.std],
    )

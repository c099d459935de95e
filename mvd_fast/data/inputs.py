"""What a sample hands to the DALI pipeline."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mvd_fast.data.sampling import Box


class Inputs(NamedTuple):
    """What a sample hands to the pipeline. The pipeline receives the same fields as DALI nodes.

    `encoded` uint8 [bytes] and `frames` int32 [T] go to DALI's decoder, unless `decoded` uint8 [T, H, W, 3] already
    holds those frames; the one that is not used is a placeholder of one element. `box` int32 [4]: y, x, height, width.
    `flip` int32 scalar, `is_encoded` bool scalar. `operations` int32 [layers, 3]: which of RandAugment's operations are
    done, how severely and with which sign.
    """

    encoded: np.ndarray
    frames: np.ndarray
    decoded: np.ndarray
    is_encoded: np.ndarray
    box: np.ndarray
    flip: np.ndarray
    operations: np.ndarray = np.zeros((1, 3), dtype=np.int32)

    @classmethod
    def of_encoded(cls, data: np.ndarray, frames: np.ndarray, box: Box, flip: bool) -> Inputs:
        """For DALI to decode: `data` uint8 [bytes]."""
        nothing = np.zeros((1, 1, 1, 3), dtype=np.uint8)
        return cls(data, frames, nothing, np.array(True), np.array(box, dtype=np.int32), np.array(flip, dtype=np.int32))

    @classmethod
    def of_pixels(cls, frames: np.ndarray, box: Box, flip: bool) -> Inputs:
        """Already decoded: `frames` uint8 [T, H, W, 3]. Cropped here, so that less is handed on."""
        y, x, height, width = box
        decoded = np.ascontiguousarray(frames[:, y : y + height, x : x + width])
        nothing, rest = np.zeros(1, dtype=np.uint8), np.array([0, 0, height, width], dtype=np.int32)
        no_frames = np.zeros(1, dtype=np.int32)
        return cls(nothing, no_frames, decoded, np.array(False), rest, np.array(flip, dtype=np.int32))

"""Kinds of datasets: each module's `build(config)` returns a `Kind`; `data.kind` in the config is the module's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from nvidia.dali.pipeline import DataNode

    from mvd_fast.data.sampling import Box, SampleKey


class Inputs(NamedTuple):
    """What a sample hands to the pipeline. The pipeline receives the same fields as DALI nodes.

    `encoded` uint8 [bytes] and `frames` int32 [T] go to DALI's decoder, unless `decoded` uint8 [T, H, W, 3] already
    holds those frames; the one that is not used is a placeholder of one element. `box` int32 [4]: y, x, height, width.
    `flip` int32 scalar, `is_encoded` bool scalar. `operations` int32 [layers, 3]: which of an augmenting kind's
    operations are done, how severely and with which sign.
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


class Kind(Protocol):
    """One kind of dataset. Instances are picklable: worker processes receive a copy."""

    output: str  # name of the pixels in a batch: "video" or "image"
    extensions: tuple[str, ...]  # files that count inside a folder dataset

    def check(self, path: str) -> object:
        """Facts of a file; raises BadFile. Depends on the file's contents only."""

    def load(self, path: str, facts: object, key: SampleKey, by_dali: bool) -> Inputs:
        """One sample of a file that `check` gave `facts` of, a pure function of its contents and the other arguments.

        With `by_dali` encoded bytes are handed on wherever DALI shows the same; without, pixels are decoded
        here. Raises BadFile when what the sample needs is decoded here and cannot be.
        """

    def graph(self, inputs: Inputs, device: str) -> DataNode:
        """The pipeline's graph from inputs to normalised float32 pixels; `device` is "cpu" or "gpu"."""


@runtime_checkable
class Annotated(Protocol):
    """A kind whose samples are not the lines of a list: it names their files itself and adds to them what no pixel
    holds."""

    def paths(self) -> list[str]:
        """The file of every sample; several samples may share one."""

    def annotate(self, width: int, height: int, key: SampleKey) -> dict[str, np.ndarray]:
        """What belongs to a sample of a file with frames of width x height pixels, a pure function of its arguments."""

    def collate(self, notes: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What joins the batch, of what `annotate` gave for its samples."""


@runtime_checkable
class Finishing(Protocol):
    """An Annotated kind that changes whole batches at the end, on the device: what is random follows from the notes."""

    def finish(self, batch: dict[str, Any], notes: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """The batch as it is handed out; `notes` is what `annotate` gave, one for each sample."""

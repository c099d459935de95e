"""Kinds of datasets: `data.kind` in a config is the name of a module here, or in a folder of MVD_PLUGINS
(mvd_fast.config.kinds).

A module has its settings, `class Config(CroppedConfig)`, and `build(data, request, on_gpu)`, which makes a `Dataset` of
them and of what the task asks for. It imports neither torch nor DALI: configs are read without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mvd_fast.config.kinds import with_plugins
from mvd_fast.config.run import DataRequest
from mvd_fast.data.crops import CroppedConfig
from mvd_fast.data.inputs import Inputs
from mvd_fast.data.lists import read_dataset
from mvd_fast.data.sampling import Box, Purpose, SampleKey

if TYPE_CHECKING:
    from nvidia.dali.pipeline import DataNode

__path__ = with_plugins(__path__, __name__)


@dataclass(frozen=True)
class Dataset:
    """One kind of dataset; it defines `check` and `load`, and what else differs from here.

    Instances are picklable: worker processes receive a copy.
    """

    output: ClassVar[str] = "video"  # name of the pixels in a batch: "video" or "image"
    extensions: ClassVar[tuple[str, ...]] = ()  # files that count inside a folder dataset
    decoder: ClassVar[str] = "its dataset"  # of what DALI does not decode, for sentences

    data: CroppedConfig
    request: DataRequest
    on_gpu: bool = False
    class_names: tuple[str, ...] = ()  # by label; empty where there are none

    def paths(self) -> list[str]:
        """The file of every sample; several samples may share one."""
        return [entry.path for entry in read_dataset(self.data.train, self.data.root, self.extensions)]

    def check(self, path: str) -> Any:
        """Facts of a file, its `width` and `height` among them; raises BadFile. Depends on the file's contents only."""
        raise NotImplementedError

    def frames(self, facts: Any, key: SampleKey) -> np.ndarray:
        """Numbers of the frames that a sample shows, int32 [T]; of an image 0."""
        return np.zeros(1, dtype=np.int32)

    def load(self, path: str, facts: Any, key: SampleKey, by_dali: bool) -> Inputs:
        """One sample of a file that `check` gave `facts` of, a pure function of its contents and the other arguments.

        With `by_dali` encoded bytes are handed on wherever DALI shows the same; without, pixels are decoded
        here. Raises BadFile when what the sample needs is decoded here and cannot be.
        """
        raise NotImplementedError

    def load_views(self, path: str, facts: Any, number: int) -> list[Inputs]:
        """All that is shown of file `number` in a test, decoded here, not by DALI: what cannot be decoded is then known
        by name."""
        return [self.load(path, facts, SampleKey(0, 0, number), by_dali=False)]

    def box(self, key: SampleKey, width: int, height: int) -> Box:
        """Where a sample is cut out of a width x height frame."""
        return self.data.crop.box(key.draws(Purpose.CROP), width, height, self.request.image_size)

    def flipped(self, key: SampleKey) -> bool:
        return key.draws(Purpose.FLIP).uniform() < self.data.flip

    def graph(self, inputs: Inputs, device: str) -> DataNode:
        """The pipeline's graph from inputs to normalised float32 pixels; `device` is "cpu" or "gpu"."""
        from mvd_fast.data import graph

        return graph.cropped(graph.decoded_video(inputs, device), inputs, self.data, self.request.image_size, "CFHW")

    def describe(self, facts: Any) -> str:
        """A file in a few words."""
        return f"{facts.width} x {facts.height}"

    def why_not_dali(self, facts: Any) -> str:
        """Why DALI does not decode a file, which follows `as`; empty: for no special reason."""
        return ""

    def annotate(self, facts: Any, key: SampleKey) -> dict[str, Any] | None:
        """Notes of what no pixel of a sample holds, a pure function of the arguments; None: there is nothing."""
        return None

    def collate(self, notes: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """What joins the batch, of the notes of its samples."""
        return {}

    def finish(self, batch: dict[str, Any], notes: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as it is handed out, changed on the device: what is random follows from the notes."""
        return batch

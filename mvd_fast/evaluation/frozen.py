"""Features of video files from a frozen network: every file once, in order, bad ones named and left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import DataNode
from torch import Tensor

from mvd_fast.data import media
from mvd_fast.data.datasets import Dataset
from mvd_fast.data.datasets.video import VideoDataset
from mvd_fast.data.graph import decoded_video, normalised
from mvd_fast.data.inputs import Inputs
from mvd_fast.data.lists import Entry
from mvd_fast.data.pipeline import PipelineSpec, build_pipeline, outputs_to_torch
from mvd_fast.data.sampling import (
    Box,
    SampleKey,
    clip_indices,
    dense_view,
    start_choices,
    uniform_view,
    view_offset,
)
from mvd_fast.data.source import Choice, Sample
from mvd_fast.errors import UserError
from mvd_fast.names import printable

from .backbone import Backbone, Preprocessing

PADDING_SEED = 1  # of the samples that fill up the last batch; all others have seed 0


@dataclass(frozen=True)
class UniformViews(VideoDataset):
    """`views` clips per video at uniform distances from its start to its end; one: the centre. The view's number is the
    key's epoch."""

    views: int = 1

    def load_views(self, path: str, facts: media.VideoInfo, number: int) -> list[Inputs]:
        return [self.load(path, facts, SampleKey(0, view, number), by_dali=False) for view in range(self.views)]

    def frames(self, facts: media.VideoInfo, key: SampleKey) -> np.ndarray:
        if self.views == 1:
            return super().frames(facts, key)
        shape = facts.frames, self.request.num_frames, self.data.sampling_rate
        return clip_indices(*shape, key.epoch * (start_choices(*shape) - 1) // (self.views - 1))


@dataclass(frozen=True)
class MultiView(VideoDataset):
    """The test views of a video, as the authors take them: `clips` in time, each in `crops` along the longer side."""

    sampling: str = "dense"
    clips: int = 1
    crops: int = 1

    @property
    def views(self) -> int:
        return self.clips * self.crops

    def load_views(self, path: str, facts: media.VideoInfo, number: int) -> list[Inputs]:
        """The crops of a clip side by side. The box holds where the crop starts and the resized frame's
        height and width."""
        size, views = self.request.image_size, []
        for clip in range(self.clips):
            frames = media.decode_frames(path, self._frames(facts.frames, clip), facts)
            whole = Inputs.of_pixels(frames, Box(0, 0, *frames.shape[1:3]), flip=False)
            for crop in range(self.crops):
                box, width, height = view_offset(facts.width, facts.height, size, crop, self.crops)
                views.append(whole._replace(box=np.array([box.y, box.x, height, width], dtype=np.int32)))
        return views

    def _frames(self, video_frames: int, clip: int) -> np.ndarray:
        if self.sampling == "uniform":
            return uniform_view(video_frames, self.request.num_frames, clip, self.clips)
        return dense_view(video_frames, self.request.num_frames, self.data.sampling_rate, clip, self.clips)

    def graph(self, inputs: Inputs, device: str) -> DataNode:
        """The whole frame resized, then cropped: a crop of the source would start between two of its pixels."""
        pixels = fn.resize(
            decoded_video(inputs, device), size=fn.cast(inputs.box[2:4], dtype=types.FLOAT), antialias=True
        )
        size = self.request.image_size
        pixels = fn.slice(pixels, start=inputs.box[0:2], shape=[size, size], axes=(1, 2))
        return normalised(pixels, inputs, self.data, "CFHW")


@dataclass
class FrozenFeatures:
    """Of the S files that could be read: `entries`; `pooled` float32 [S, C], the mean over the views; `tokens`
    float16 [S, views * N, C] where asked for. `bad`: path -> why it was left out."""

    entries: list[Entry]
    pooled: Tensor
    tokens: Tensor | None
    bad: dict[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> np.ndarray:
        """int64 [S]; every entry must have one."""
        return np.array([entry.label for entry in self.entries], dtype=np.int64)


def frozen_features(
    backbone: Backbone,
    clips: Preprocessing,
    entries: Sequence[Entry],
    device: torch.device,
    *,
    views: int = 1,
    batch: int = 16,
    threads: int = 2,
    keep_tokens: bool = False,
    on_file: Callable[[], None] = lambda: None,
) -> FrozenFeatures:
    """Runs `views` centre-cropped clips of every file through the network; `on_file` is called once per file.

    Raises UserError if not one file can be used, or a feature is not finite.
    """
    spec = PipelineSpec(clips.dataset(UniformViews, views=views), batch, threads, device)
    bad: dict[str, str] = {}
    pooled: dict[int, list[Tensor]] = {}
    tokens: dict[int, list[Tensor]] = {}
    with ThreadPoolExecutor(threads) as pool:
        samples = samples_of(pool, spec.dataset, entries, threads, bad, on_file)
        for video, index in batches_of(spec, samples):
            x = backbone.tokens(video)
            for number, mean in zip(index, backbone.pool(x).cpu(), strict=True):
                pooled.setdefault(number, []).append(mean)
            if keep_tokens:
                for number, token in zip(index, x.half().cpu(), strict=True):
                    tokens.setdefault(number, []).append(token)
    if not pooled:
        path, reason = next(iter(bad.items()))
        raise UserError(f"none of {len(entries)} files can be used, for instance {printable(path)} {reason}")
    found = FrozenFeatures(
        [entries[number] for number in pooled],
        torch.stack([torch.stack(parts).mean(0) for parts in pooled.values()]),
        torch.stack([torch.cat(parts) for parts in tokens.values()]) if keep_tokens else None,
        bad,
    )
    _require_finite(found)
    return found


def samples_of(
    pool: ThreadPoolExecutor,
    dataset: Dataset,
    entries: Sequence[Entry],
    threads: int,
    bad: dict[str, str],
    on_file: Callable[[], None],
) -> Iterator[Sample]:
    """All views of every usable file, in order; a few files are decoded ahead."""

    def load(number: int) -> list[Sample] | str:
        try:
            path = entries[number].path
            views = dataset.load_views(path, dataset.check(path), number)
            return [Sample(Choice(SampleKey(0, view, number)), inputs) for view, inputs in enumerate(views)]
        except media.BadFile as error:
            return str(error)

    numbers = range(len(entries))
    for chunk in (numbers[start : start + 2 * threads] for start in numbers[:: 2 * threads]):
        for number, loaded in zip(chunk, pool.map(load, chunk), strict=True):
            on_file()
            if isinstance(loaded, str):
                bad[entries[number].path] = loaded
            else:
                yield from loaded


def batches_of(spec: PipelineSpec, samples: Iterator[Sample]) -> Iterator[tuple[Tensor, list[int]]]:
    """(pixels [b, 3, T, H, W], positions of their files) until the samples run out."""

    def read(_: int) -> list[Sample]:
        taken = list(itertools.islice(samples, spec.batch))
        if not taken:
            raise StopIteration
        last = taken[-1]
        padding = Sample(Choice(SampleKey(PADDING_SEED, 0, last.choice.key.index)), last.inputs)
        return taken + [padding] * (spec.batch - len(taken))

    pipeline = build_pipeline(spec, read)
    while True:
        try:
            outputs = outputs_to_torch(pipeline.run(), spec)
        except StopIteration:
            return
        numbers = outputs["numbers"]
        real = numbers[:, 0] != PADDING_SEED
        yield outputs["video"][real.to(outputs["video"].device)], numbers[real, 2].tolist()


def _require_finite(found: FrozenFeatures) -> None:
    finite = found.pooled.isfinite().all(1)
    if found.tokens is not None:
        finite &= found.tokens.isfinite().all(2).all(1)
    if not finite.all():
        some = found.entries[int((~finite).nonzero()[0])].path
        raise UserError(
            f"the features of {printable(some)} are not finite; the checkpoint may be damaged, or needs fp32"
        )

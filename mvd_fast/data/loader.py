"""Batches for the trainer: a thread runs the pipeline ahead, recovers from bad files and hands tensors over."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvd_fast.config.kinds import DATASETS, kind_module
from mvd_fast.config.run import DataConfig, DataRequest, RunConfig
from mvd_fast.data.pipeline import PIPELINE_DEPTH, PipelineSpec, build_pipeline, failing_samples, outputs_to_torch
from mvd_fast.data.quarantine import quarantine_path, read_quarantine
from mvd_fast.data.sampling import SampleKey
from mvd_fast.data.source import Choice, Readers, Sample, Schedule, Source
from mvd_fast.data.workers import no_interrupts
from mvd_fast.errors import UserError
from mvd_fast.names import printable

logger = logging.getLogger(__name__)

ReadTargets = Callable[[list[SampleKey]], dict[str, Tensor]]


@dataclass(frozen=True)
class Targets:
    """What is stored for every clip and view, and joins the batches."""

    bad: Mapping[tuple[int, int], str]  # (position in the list, view) that has nothing stored -> why
    read: ReadTargets


OpenTargets = Callable[[list[str]], Targets]  # from the list's paths


JUDGED_FROM = 1000  # files seen before a share of bad ones says something about a long list
LOOK_FOR_MISSING = 20  # files looked for when the loader is built


@dataclass(frozen=True)
class DataSetup:
    """What of a RunConfig decides on its samples; for other samples than a run's own."""

    data: DataConfig
    request: DataRequest
    seed: int = 0


class TooManyBadFiles(UserError):
    """More than `data.max_bad_share` of the files are unusable."""


def build_loader(
    config: RunConfig | DataSetup,
    rank: int,
    world_size: int,
    device: torch.device,
    micro: int,
    accumulation: int,
    open_targets: OpenTargets | None = None,
) -> Loader:
    """The loader of one rank; `micro` counts samples: clips x masks of each.

    With `open_targets` (mvd_fast.target_store.store) the stored targets of the views that epochs show join the batches.
    Raises UserError sentences for lists that are missing, empty or too short.
    """
    request = config.request
    clips = micro // request.samples
    source, spec = build_source(config, device, clips * request.rows)
    targets = open_targets(source.paths) if open_targets else None
    shape = clips, accumulation, rank, world_size, request.rows, request.views
    schedule = Schedule(config.seed, len(source.paths), *shape)
    if schedule.steps_per_epoch == 0:
        raise UserError(
            f"{config.data.train} lists {len(source.paths)} files, less than one step of {schedule.size} clips; "
            "list more files or lower batch.size"
        )
    if targets is None:
        return Loader(source, schedule, spec, config.data)
    source.missing_targets.update(targets.bad)
    return Loader(source, schedule, spec, config.data, targets.read)


def build_source(
    config: RunConfig | DataSetup, device: torch.device, clips: int, paths: list[str] | None = None
) -> tuple[Source, PipelineSpec]:
    """The files of a run (`paths`, or what `data.train` lists) and what its pipeline is built from, `clips` at a time.

    Raises UserError sentences for unusable lists.
    """
    data, request = config.data, config.request
    dataset = kind_module(DATASETS, data.kind).build(data, request, device.type == "cuda")
    paths = dataset.paths() if paths is None else paths
    _require_some_present(paths, data.train)
    quarantine = read_quarantine(data.train)
    if quarantine:
        logger.info("%d files are set aside by %s", len(quarantine), printable(quarantine_path(data.train)))
    spec = PipelineSpec(dataset, clips, data.threads, device, request.masks)
    return Source(paths, dataset, frozenset(quarantine)), spec


def _require_some_present(paths: list[str], train: str) -> None:
    some = paths[:: -(-len(paths) // LOOK_FOR_MISSING)]
    if not any(os.path.exists(path) for path in some):
        raise UserError(
            f"none of {len(some)} files looked for from all over {printable(train)} exists, for instance "
            f"{printable(some[0])}; "
            "set data.root to the folder that the list's paths start from"
        )


class Loader:
    """Micro batches of one rank; see `batches`. Made by `build_loader`."""

    def __init__(
        self,
        source: Source,
        schedule: Schedule,
        spec: PipelineSpec,
        data: DataConfig,
        read_targets: ReadTargets | None = None,
    ):
        self.schedule, self.spec, self.data, self.read_targets = schedule, spec, data, read_targets
        self.source, self.paths = source, source.paths
        self.readers = Readers(source, data.threads, data.workers)
        self.suspects: dict[str, str] = {}  # path -> why DALI failed on it; decoded by the readers since
        self.bad_files: dict[str, str] = {}
        self.replaced = 0
        self._touched: set[int] = set()
        self._producers: weakref.WeakSet[_Producer] = weakref.WeakSet()
        atexit.register(_close, weakref.ref(self))  # a pipeline must not run while the interpreter goes down

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the dataset; the remainder is dropped."""
        return self.schedule.steps_per_epoch

    def names(self, index: Tensor) -> list[str]:
        """Paths of the samples of a batch, from its `index`."""
        return [self.paths[i] for i in index.tolist()]

    def batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        """Micro batches from step `start_step` on, without end.

        Each is a dict on the device: `video` float32 [B, 3, T, H, W] or `image` float32 [B, 3, H, W], normalised;
        `mask`, where the task asks for one, bool [B, N] (of several per clip [B, masks, N]), True = masked; `index`
        int64 [B], positions in the dataset of what is really shown. With augment.repeats there are so many rows for
        each clip, side by side. With stored targets also what TargetStore.read gives, and what the dataset's `collate`
        and `finish` add.
        Raises TooManyBadFiles; NoUsableFile when one sample finds no replacement at all.
        """
        producer = _Producer(self, start_step * self.schedule.accumulation)
        self._producers.add(producer)
        try:
            while True:
                yield self._accept(*producer.next())
        finally:
            producer.close()

    def close(self) -> None:
        """Stop whatever is still being prepared. Iterators of `batches` end with an error if they go on."""
        for producer in list(self._producers):
            producer.close()
        self.readers.close()

    def _accept(self, batch: dict[str, Tensor], asked: list[SampleKey], choices: list[Choice]) -> dict[str, Tensor]:
        """Count replacements, name newly found bad files, stop when they are too many; adds `index`."""
        for key, (shown, passed_over) in zip(asked, choices, strict=True):
            self.replaced += key != shown
            self._touched.update([shown.index, *(index for index, _ in passed_over)])
            for index, reason in passed_over:
                self._note_bad(self.paths[index], reason)
        self._require_few_bad()
        index = batch.pop("numbers")[:, 2]
        return {**batch, "index": index.to(self.spec.device)}

    def _note_bad(self, path: str, reason: str) -> None:
        if path not in self.bad_files:
            self.bad_files[path] = reason
            logger.warning("%s %s; another file is shown in its place", printable(path), reason)

    def _require_few_bad(self) -> None:
        """The share is taken of the files seen so far, or of the whole list (up to JUDGED_FROM) if that is more."""
        judged = max(len(self._touched), min(JUDGED_FROM, len(self.paths)))
        bad = list(self.bad_files.items())
        if len(bad) <= self.data.max_bad_share * judged:
            return
        some = "; ".join(f"{printable(path)} {reason}" for path, reason in bad[:3])
        train = printable(self.data.train)
        raise TooManyBadFiles(
            f"{len(bad)} of {judged} files of {train} are unusable, more than the share data.max_bad_share "
            f"{self.data.max_bad_share:g} allows ({some}{'; ...' if len(bad) > 3 else ''}); run `mvd-fast data check "
            f"{train}`, which names them all and sets them aside, or raise data.max_bad_share"
        )


def _close(reference: weakref.ref[Loader]) -> None:
    loader = reference()
    if loader is not None:
        loader.close()


class _Producer:
    """Runs the pipeline in a thread, from micro batch `number` on, `data.prefetch` batches ahead of the consumer."""

    def __init__(self, loader: Loader, number: int):
        self._schedule, self._spec, self._read_targets = loader.schedule, loader.spec, loader.read_targets
        self._readers, self._suspects, self._paths = loader.readers, loader.suspects, loader.paths
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=loader.data.prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(number,), name="mvd-loader", daemon=True)
        self._thread.start()

    def next(self) -> tuple[dict[str, Tensor], list[SampleKey], list[Choice]]:
        """The next batch, the samples that were due and what they turned out to be; raises what stopped the thread."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it; a consumer that still waits is released with an error."""
        self._stop.set()
        while self._thread.is_alive():
            _drain(self._queue)
            self._thread.join(timeout=0.05)
        _drain(self._queue)
        self._queue.put_nowait(RuntimeError("the loader was closed"))

    def _run(self, number: int) -> None:
        with no_interrupts():  # of this thread, which starts the reading processes
            self._produce(number)

    def _produce(self, number: int) -> None:
        try:
            while not self._stop.is_set():
                number = self._run_pipeline(number)
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _run_pipeline(self, first: int) -> int:
        """Produce from micro batch `first` until told to stop or until DALI fails; returns the number to go on with."""
        ahead: dict[int, list[Sample]] = {}  # what is inside the pipeline, by number; without its pixels

        def read(iteration: int) -> list[Sample]:
            samples = self._samples(first + iteration)
            ahead[first + iteration] = [sample._replace(inputs=None) for sample in samples]
            return samples

        pipeline = build_pipeline(self._spec, read)
        number = first
        while not self._stop.is_set():
            try:
                outputs = pipeline.run()
            except RuntimeError as error:
                self._suspect_culprits(number, error)
                break
            batch, samples = outputs_to_torch(outputs, self._spec), ahead.pop(number)
            choices = [sample.choice for sample in samples]
            if samples[0].notes is not None:
                batch = _annotated(self._spec, batch, [sample.notes for sample in samples])
            if self._read_targets:
                batch |= self._read_targets([choice.key for choice in choices])
            self._put((batch, self._schedule.keys(number), choices))
            number += 1
        return number

    def _samples(self, number: int) -> list[Sample]:
        return self._readers.samples(self._schedule.keys(number), frozenset(self._suspects))

    def _suspect_culprits(self, number: int, error: RuntimeError) -> None:
        """Find the files DALI fails on and keep them away from it; raises `error` again when there are none.

        The pipeline works ahead, so the failure may belong to one of the next micro batches.
        """
        for ahead in range(PIPELINE_DEPTH + 1):
            failing = failing_samples(self._spec, self._samples(number + ahead))
            culprits = {self._paths[index]: reason for index, reason in failing.items()}
            if culprits.keys() & self._suspects.keys():  # not the decoder's failure
                break
            for path, reason in culprits.items():
                logger.warning("%s: DALI cannot decode it (%s); trying without DALI", printable(path), reason)
            self._suspects.update(culprits)
            if culprits:
                return
        raise error

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def _annotated(spec: PipelineSpec, batch: dict[str, Tensor], notes: list[Any]) -> dict[str, Tensor]:
    """The batch with what the dataset adds, on the device, finished."""
    batch |= {name: torch.from_numpy(value).to(spec.device) for name, value in spec.dataset.collate(notes).items()}
    return spec.dataset.finish(batch, notes)


def _drain(items: queue.Queue[Any]) -> None:
    while True:
        try:
            items.get_nowait()
        except queue.Empty:
            return

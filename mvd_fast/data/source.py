"""Samples as pure functions of (seed, epoch, position in the dataset), bad files included."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mvd_fast.data import media, sampling
from mvd_fast.data.datasets import Dataset
from mvd_fast.data.inputs import Inputs
from mvd_fast.data.sampling import SampleKey
from mvd_fast.errors import UserError
from mvd_fast.names import printable

MAX_REPLACEMENTS = 64  # with half of the files bad, running out has a chance of 2^-64


class NoUsableFile(UserError):
    """One sample and all of its replacements are unusable: practically every file is."""


class Choice(NamedTuple):
    """What a sample turned out to be."""

    key: SampleKey  # of what is really shown
    passed_over: tuple[tuple[int, str], ...] = ()  # (dataset position, reason) of bad files met on the way


class Sample(NamedTuple):
    """A sample and what the pipeline gets for it."""

    choice: Choice
    inputs: Inputs
    notes: dict[str, Any] | None = None  # see `Dataset.annotate`


@lru_cache(maxsize=2)  # batches prepared ahead may belong to the next epoch already
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return sampling.epoch_order(seed, epoch, count)


@dataclass(frozen=True)
class Schedule:
    """Which samples each micro batch holds.

    Step s is in epoch s // steps_per_epoch and takes `size` consecutive entries of that epoch's permutation; they
    are dealt out by micro batch, then rank. So every world size sees the same samples in a step.
    """

    seed: int
    count: int  # samples in the dataset
    micro: int
    accumulation: int
    rank: int
    world_size: int
    repeats: int = 1  # augmented copies of each sample, side by side
    views: int | None = None  # epoch e shows view e % views of every sample; None: each epoch its own

    @property
    def size(self) -> int:
        """Samples of one step, over all ranks."""
        return self.micro * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.size

    def keys(self, number: int) -> list[SampleKey]:
        """Samples of this rank's micro batch `number`, counted from the first step of the run."""
        step, part = divmod(number, self.accumulation)
        epoch, step = divmod(step, self.steps_per_epoch)
        first = step * self.size + (part * self.world_size + self.rank) * self.micro
        order = _order(self.seed, epoch, self.count)
        view = epoch % self.views if self.views else None
        return [
            SampleKey(self.seed, epoch, int(index), view, copy)
            for index in order[first : first + self.micro]
            for copy in range(self.repeats)
        ]


@dataclass
class Source:
    """Turns sample keys into pipeline inputs and replaces what cannot be used.

    A sample is bad when its file is (see `Dataset.check`) or when what it needs of the file cannot be decoded. It then
    gives way to another position of the dataset, found by hashing its own (seed, epoch, index) and the number of the
    attempt. That depends on the files' contents only, never on when or by whom the damage was found: resumed and
    differently sharded runs see the same samples.
    """

    paths: list[str]
    dataset: Dataset
    quarantine: frozenset[str] = frozenset()  # paths set aside before the run
    missing_targets: dict[tuple[int, int], str] = field(
        default_factory=dict
    )  # (index, view) without stored targets -> why
    _verdicts: dict[str, Any] = field(default_factory=dict)  # path -> facts, or why `check` refused it

    def sample(self, key: SampleKey, suspects: frozenset[str] = frozenset()) -> Sample:
        """The sample for `key`, or its replacement. `suspects` are files that DALI failed on: decoded here instead.

        Raises NoUsableFile when MAX_REPLACEMENTS replacements are bad too.
        """
        passed_over: list[tuple[int, str]] = []
        for candidate in _candidates(key, len(self.paths)):
            path = self.paths[candidate.index]
            if path in self.quarantine:
                continue
            try:
                inputs, notes = self._load(candidate, path not in suspects)
            except media.BadFile as error:
                passed_over.append((candidate.index, str(error)))
            else:
                return Sample(Choice(candidate, tuple(passed_over)), inputs, notes)
        some = "; ".join(f"{printable(self.paths[index])} {reason}" for index, reason in passed_over[:3])
        raise NoUsableFile(
            f"{printable(self.paths[key.index])} and the {MAX_REPLACEMENTS} files tried in its place are all unusable"
            f"{f' ({some}; ...)' if some else ''}; run `mvd-fast data check` on the list to see every reason"
        )

    def _load(self, key: SampleKey, by_dali: bool) -> tuple[Inputs, dict[str, Any] | None]:
        path = self.paths[key.index]
        if (key.index, key.view) in self.missing_targets:
            raise media.BadFile(self.missing_targets[key.index, key.view])
        facts = self.facts(path)
        notes = self.dataset.annotate(facts, key)
        return self.dataset.load(path, facts, key, by_dali), notes

    def facts(self, path: str) -> Any:
        """What the dataset says of a file, looked at the first time it is asked for. Raises BadFile."""
        if path not in self._verdicts:
            try:
                self._verdicts[path] = self.dataset.check(path)
            except media.BadFile as error:
                self._verdicts[path] = str(error)
        verdict = self._verdicts[path]
        if isinstance(verdict, str):
            raise media.BadFile(verdict)
        return verdict


def _candidates(key: SampleKey, count: int) -> Iterator[SampleKey]:
    """`key`, then what stands in for it, in order."""
    yield key
    for attempt in range(1, MAX_REPLACEMENTS + 1):
        yield replace(key, index=sampling.replacement(key, attempt, count))


class Readers:
    """Where samples are read (and partly decoded): threads of this process, or worker processes."""

    def __init__(self, source: Source, threads: int, workers: int):
        self._sample, self._pool = _pool(source, threads, workers)

    def samples(self, keys: list[SampleKey], suspects: frozenset[str]) -> list[Sample]:
        """The samples for `keys`, in that order. Raises ChildProcessError when a worker process died."""
        try:
            return list(self._pool.map(self._sample, keys, [suspects] * len(keys)))
        except BrokenExecutor as error:
            raise ChildProcessError(
                "a process that reads data died, perhaps for lack of memory; lower data.workers, or set it to 0 to "
                "read inside the trainer"
            ) from error

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _pool(source: Source, threads: int, workers: int) -> tuple[Any, Executor]:
    if not workers:
        return source.sample, ThreadPoolExecutor(threads, thread_name_prefix="mvd-read")
    context = multiprocessing.get_context("spawn")  # a fork would copy DALI's and CUDA's threads half-alive
    return _worker_sample, ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(source,))


def _start_worker(source: Source) -> None:
    global _worker_source
    _worker_source = source
    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer's to handle: it may still want batches to save
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A trainer that is killed outright cannot stop its workers; they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _worker_sample(key: SampleKey, suspects: frozenset[str]) -> Sample:
    return _worker_source.sample(key, suspects)


def to_columns(samples: list[Sample]) -> tuple[list[np.ndarray], ...]:
    """What `external_source` takes: a list for each field of Inputs, then one of int64 [3] (seed, epoch, index)."""
    rows = [(*inputs, np.array([key.seed, key.epoch, key.index], dtype=np.int64)) for (key, _), inputs, _ in samples]
    return tuple(list(column) for column in zip(*rows, strict=True))

"""`mvd-fast teachers cache`: run the teachers once over every view of every clip and store what they say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mvd_fast.config.base import ConfigError
from mvd_fast.data.loader import Loader, build_source
from mvd_fast.data.sampling import SampleKey
from mvd_fast.names import printable
from mvd_fast.target_store.store import (
    Layout,
    ShardWriter,
    StoreError,
    TargetStore,
    layout,
    prepare,
    quantize,
    shard_path,
)
from mvd_fast.tasks import build_task
from mvd_fast.tasks.distill import Config, Distill
from mvd_fast.training import launch

DEFAULT_BATCH = 16


def build_store(config: Config, batch: int | None, rows_per_shard: int | None, shard: str | None) -> None:
    """Builds, or goes on with, this process's part of a config's store. batch: clips at a time."""
    device = launch.device()
    batch = batch or config.batch.micro_batch_size or DEFAULT_BATCH
    Builder(config, device, batch, rows_per_shard, *_share(shard)).run()


def verify_store(config: Config) -> int:
    """The rows of a complete store, all of them as written; raises UserError where they are not."""
    source, _ = build_source(config, launch.device(), DEFAULT_BATCH)
    return TargetStore(config, source.paths).verify()


def _share(option: str | None) -> tuple[int, int]:
    """(number, of how many): from `--shard`, else the launcher's rank."""
    if option is None:
        place = launch.placement()
        return place.rank, place.world_size
    found = re.fullmatch(r"(\d+)/(\d+)", option)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"--shard: got {option!r}; it must be I/N with I from 0 to N - 1, such as 0/4")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class ViewSchedule:
    """Every view of every clip, shard by shard. A shard's last batch repeats its last row up to `micro` samples.

    So a shard's batches, and with them every bit of its features, depend on nothing outside the shard.
    """

    seed: int
    layout: Layout
    shards: list[int]  # ascending
    micro: int
    accumulation: int = 1

    def rows(self, step: int) -> list[int]:
        """Rows of batch `step`; past the end the last one again."""
        steps = -(-self.layout.rows_per_shard // self.micro)
        number, part = divmod(step, steps)
        held = self.layout.rows_of(self.shards[min(number, len(self.shards) - 1)])
        return [min(held.start + part * self.micro + i, held[-1]) for i in range(self.micro)]

    def keys(self, step: int) -> list[SampleKey]:
        return [self.layout.key(row, self.seed) for row in self.rows(step)]


class Builder:
    """One process's part of a store: shards `number`, `number + of`, ... that are not there yet."""

    def __init__(
        self, config: Config, device: torch.device, batch: int, rows_per_shard: int | None, number: int, of: int
    ) -> None:
        self.config, self.device, self.batch = config, device, batch
        self.folder = Path(config.teachers.cache.path)
        self.source, self.spec = build_source(config, device, batch)
        self.lead, self.console = number == 0, Console()
        self._require_space(rows_per_shard)
        self.layout = prepare(config, self.source.paths, rows_per_shard)
        mine = range(number, self.layout.shards, of)
        self.missing = [shard for shard in mine if not shard_path(self.folder, shard).exists()]

    def _require_space(self, rows_per_shard: int | None) -> None:
        """Says what the store will take, before anything is written, and refuses where the disk is too small."""
        shapes = layout(self.config, len(self.source.paths), rows_per_shard)
        there = sum(path.stat().st_size for path in self.folder.glob("shard-*.safetensors"))
        home = next(parent for parent in (self.folder.absolute(), *self.folder.absolute().parents) if parent.exists())
        free, needed = shutil.disk_usage(home).free, max(0, shapes.bytes - there)
        if self.lead:
            widths = " + ".join(str(channels) for channels in shapes.channels.values())
            self.console.print(
                f"{shapes.clips} clips x {shapes.views} views x {shapes.tokens} tokens x ({widths}) channels: "
                f"{_size(shapes.bytes)} in {self.folder}, {_size(there)} of them there; {_size(free)} free",
                soft_wrap=True,
                highlight=False,
            )
        if needed > free:
            raise StoreError(
                f"teachers.cache.path: {self.folder} needs {_size(needed)} more, and its disk has {_size(free)} free; "
                "name a folder on a larger disk, lower teachers.cache.views or shorten the list"
            )

    def run(self) -> None:
        if not self.missing:
            return
        task = build_task(self.config.without_cache()).to(self.device)
        schedule = ViewSchedule(self.config.seed, self.layout, self.missing, self.batch)
        loader = Loader(self.source, schedule, self.spec, self.config.data)
        rows = sum(len(self.layout.rows_of(shard)) for shard in self.missing)
        columns = (TextColumn("teachers cache"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, console=self.console, disable=not self.lead) as progress:
                bar = progress.add_task("", total=rows)
                for done in self._shards(task, loader, schedule):
                    progress.advance(bar, done)
        finally:
            loader.close()

    def _shards(self, task: Distill, loader: Loader, schedule: ViewSchedule) -> Iterator[int]:
        """Writes shard after shard; yields the number of rows after each batch."""
        batches, step = loader.batches(0), 0
        for shard in self.missing:
            held, writer = self.layout.rows_of(shard), ShardWriter(self.folder, self.layout, shard)
            for batch in islice(batches, -(-len(held) // self.batch)):
                rows = list(dict.fromkeys(schedule.rows(step)))  # without the padding
                self._store(writer, task, loader, batch, [row - held.start for row in rows], schedule.keys(step))
                step += 1
                yield len(rows)
            writer.finish()

    def _store(
        self,
        writer: ShardWriter,
        task: Distill,
        loader: Loader,
        batch: dict[str, torch.Tensor],
        rows: list[int],
        keys: list[SampleKey],
    ) -> None:
        """The features of one batch. A clip that another was shown for has none: its row is marked as bad."""
        targets = task.with_targets(batch)
        shown = batch["index"].tolist()
        for row, key, index in zip(rows, keys, shown, strict=False):
            if index != key.index:
                path = loader.paths[key.index]
                writer.bad[str(row)] = loader.bad_files.get(path, "was set aside when the targets were stored")
        for name in self.config.used_targets:
            features = targets[f"target_{name}"][: len(rows)]
            if not features.isfinite().all():
                names = ", ".join(map(printable, loader.names(batch["index"])[:4]))
                raise StoreError(
                    f"targets.{name}: its features of some of {names}, ... are not finite; nothing to store"
                )
            values, scale = (part.cpu() for part in quantize(features))
            for place, (row, key) in enumerate(zip(rows, keys, strict=False)):
                if shown[place] == key.index:
                    writer.put(row, name, values[place], scale[place])


def _size(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count / 1e3:.4g} kB"

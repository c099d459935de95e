"""A folder with the teachers' features of every clip and view, in 8 bits with a scale for every token.

`manifest.json` says what the features were made from and how the store is laid out. Row `index * views + view` holds
view `view` of the list's file `index`; `shard-*.safetensors` hold `rows_per_shard` rows each:

    <name>.values    int8 [rows, N, C]     the feature is values * scale
    <name>.scale     float32 [rows, N]
    <name>.checksum  int64 [rows]          CRC-32 of the row's values and scales

and, in the header, the store that the shard belongs to and the rows whose file could not be used. A shard is complete
or absent. Headers are checked when a store is opened, a row's checksum whenever the row is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from mvd_fast.config.base import flat
from mvd_fast.data.loader import OpenTargets, Targets
from mvd_fast.data.sampling import SampleKey
from mvd_fast.errors import UserError
from mvd_fast.files import write_text, written_aside
from mvd_fast.models.frozen import DTYPES
from mvd_fast.tasks.distill import Config
from mvd_kernels.linear_8bit import quantize_rows

FORMAT = 2
MANIFEST = "manifest.json"
SHARD_BYTES = 2**28
HEADER_BYTES = 1024  # of a shard; a little more than it takes

# What of `data` and `model` decides the pixels of a view and the tokens of a feature. `data`: all but these.
UNSEEN_DATA_SETTINGS = ("train", "root", "threads", "workers", "prefetch", "max_bad_share")
CLIP_SETTINGS = ("image_size", "patch_size", "num_frames", "tubelet_size")


class StoreError(UserError):
    """A store that is missing, incomplete, damaged, or made for another run."""


@dataclass(frozen=True)
class Layout:
    """Shapes of a store. `channels`: C of each name."""

    clips: int
    views: int
    tokens: int
    channels: dict[str, int]
    rows_per_shard: int

    @property
    def rows(self) -> int:
        return self.clips * self.views

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.tokens, self.channels)

    @property
    def bytes(self) -> int:
        """Size of all shards on disk: exact but for their headers."""
        return self.rows * self.row_bytes + self.shards * HEADER_BYTES

    def rows_of(self, shard: int) -> range:
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def key(self, row: int, seed: int) -> SampleKey:
        """The view that a row holds."""
        index, view = divmod(row, self.views)
        return SampleKey(seed, view, index, view)


def row_bytes(tokens: int, channels: dict[str, int]) -> int:
    """Bytes of one row: values, scales and checksums of every name."""
    return sum(tokens * (width + 4) + 8 for width in channels.values())


def layout(config: Config, clips: int, rows_per_shard: int | None = None) -> Layout:
    """The layout that a config asks for; shards of about SHARD_BYTES where `rows_per_shard` is not given."""
    tokens = config.model.num_tokens
    channels = {name: target.target_dim for name, target in config.used_targets.items()}
    if rows_per_shard is None:
        rows_per_shard = max(1, SHARD_BYTES // row_bytes(tokens, channels))
    return Layout(clips, config.teachers.cache.views, tokens, channels, rows_per_shard)


# ---- what a store was made from ----


def identity(config: Config, paths: Sequence[str], known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything that decides what the rows hold, by config key; files appear as BLAKE2 digests.

    `known`: `files` of a manifest; a checkpoint with the same path, size and time as there is not read again.
    """
    found = {"format": FORMAT, "seed": config.seed, "teachers.cache.views": config.teachers.cache.views}
    view = config.data.model_dump(mode="json", exclude=set(UNSEEN_DATA_SETTINGS))
    found |= flat(view, "data.")
    found |= {f"model.{name}": getattr(config.model, name) for name in CLIP_SETTINGS}
    found["data.train"] = _digest_of_names(paths)
    for name, target in config.used_targets.items():
        found |= {f"targets.{name}.{key}": value for key, value in target.identity(config.precision).items()}
        for setting, path in target.files().items():
            key = f"targets.{name}.{setting}"
            found[key] = file_facts(path, (known or {}).get(key))["digest"]
    return found


def file_facts(path: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Path, size, time and digest of a file; read only where the first three differ from `known`."""
    stat = os.stat(path)
    facts = {"path": os.path.abspath(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if known and facts.items() <= known.items():
        return known
    with open(path, "rb") as file:
        return {**facts, "digest": hashlib.file_digest(file, _blake2).hexdigest()}


def _blake2() -> Any:
    return hashlib.blake2b(digest_size=16)


def _digest_of_names(paths: Sequence[str]) -> str:
    """Of the files' order and names below their common folder, which may move."""
    start = os.path.commonpath([os.path.dirname(path) for path in paths])
    digest = _blake2()
    for path in paths:
        digest.update(os.path.relpath(path, start).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _digest_of(content: Any) -> str:
    digest = _blake2()
    digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def _require_same(folder: Path, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    """What a run does not use (a second teacher) may be in the store."""
    changed = [f"{key} was {made.get(key)} and is {wanted[key]}" for key in wanted if made.get(key) != wanted[key]]
    if changed:
        raise StoreError(
            f"teachers.cache.path: the targets stored in {folder} do not belong to this run: {', '.join(changed)}; "
            "undo the change, or name another folder and run `mvd-fast teachers cache` for it"
        )


# ---- 8 bits ----


def quantize(features: Tensor) -> tuple[Tensor, Tensor]:
    """[..., C] -> int8 [..., C] and float32 scale [...], symmetric: a token's largest channel becomes 127."""
    return quantize_rows(features, torch.int8)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` was given, to half a step of the scale; rounded to `dtype`."""
    return (values * scale[..., None]).to(dtype)


# ---- writing ----


def prepare(config: Config, paths: Sequence[str], rows_per_shard: int | None = None) -> Layout:
    """Start a store, or go on with the one that is there if it is the same. Raises StoreError if it is another."""
    folder = Path(config.teachers.cache.path)
    if (folder / MANIFEST).exists():
        manifest = _read_manifest(folder)
        wanted = identity(config, paths, manifest["files"])
        _require_same(folder, manifest["identity"], wanted)
        there = Layout(**manifest["layout"])
        if there != layout(config, len(paths), rows_per_shard or there.rows_per_shard):
            raise StoreError(
                f"teachers.cache.path: {folder} was begun with {there.rows_per_shard} rows per shard and targets "
                f"{' and '.join(there.channels)}; go on with the same, or name another folder"
            )
        return there
    shapes = layout(config, len(paths), rows_per_shard)
    files = {
        f"targets.{name}.{setting}": file_facts(path)
        for name, target in config.used_targets.items()
        for setting, path in target.files().items()
    }
    manifest = {"identity": identity(config, paths, files), "layout": asdict(shapes), "files": files}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return shapes


def shard_path(folder: str | Path, shard: int) -> Path:
    return Path(folder) / f"shard-{shard:05d}.safetensors"


class ShardWriter:
    """Collects the rows of one shard; `finish` puts the file in place."""

    def __init__(self, folder: str | Path, shapes: Layout, shard: int) -> None:
        self.path, self.shard = shard_path(folder, shard), shard
        self.rows, self.bad = len(shapes.rows_of(shard)), {}
        self._store = _digest_of(_read_manifest(Path(folder))["identity"])
        self._tensors: dict[str, np.ndarray] = {}
        for name, channels in shapes.channels.items():
            self._tensors[f"{name}.values"] = np.zeros((self.rows, shapes.tokens, channels), np.int8)
            self._tensors[f"{name}.scale"] = np.zeros((self.rows, shapes.tokens), np.float32)

    def put(self, row: int, name: str, values: Tensor, scale: Tensor) -> None:
        """Row `row` of the shard: int8 [N, C] and float32 [N] on the CPU."""
        self._tensors[f"{name}.values"][row] = values.numpy()
        self._tensors[f"{name}.scale"][row] = scale.numpy()

    def finish(self) -> None:
        """Writes aside and renames, also over what a killed process left."""
        for name in [name.removesuffix(".values") for name in self._tensors if name.endswith(".values")]:
            pairs = zip(self._tensors[f"{name}.values"], self._tensors[f"{name}.scale"], strict=True)
            self._tensors[f"{name}.checksum"] = np.array([_checksum(*pair) for pair in pairs], np.int64)
        for left in self.path.parent.glob(f".{self.path.stem}.*"):
            left.unlink(missing_ok=True)
        body = {"store": self._store, "shard": self.shard, "bad": self.bad}
        # One entry: safetensors does not keep the order of several, and equal stores shall be equal byte for byte.
        metadata = {"mvd_fast": json.dumps({**body, "digest": _digest_of(body)})}
        with written_aside(self.path) as aside:
            save_file(self._tensors, aside, metadata)


def _checksum(values: np.ndarray, scale: np.ndarray) -> int:
    return zlib.crc32(scale, zlib.crc32(values))


# ---- reading ----


class TargetStore:
    """A complete store, memory-mapped. `read` is safe to call from any thread."""

    def __init__(self, config: Config, paths: Sequence[str]) -> None:
        """Raises StoreError with one sentence for a store that this run cannot use."""
        self.folder = Path(config.teachers.cache.path)
        manifest = _read_manifest(self.folder)
        _require_same(self.folder, manifest["identity"], identity(config, paths, manifest["files"]))
        self.layout, self.names = Layout(**manifest["layout"]), tuple(config.used_targets)
        self._require_complete()
        self.bad: dict[tuple[int, int], str] = {}  # (position in the list, view) -> why there are no features
        self._shards = [self._open(shard, _digest_of(manifest["identity"])) for shard in range(self.layout.shards)]

    def _require_complete(self) -> None:
        shards = [shard_path(self.folder, shard) for shard in range(self.layout.shards)]
        missing = [path.name for path in shards if not path.exists()]
        if missing:
            raise StoreError(
                f"teachers.cache.path: {len(missing)} of {len(shards)} shards of {self.folder} are missing "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); run `mvd-fast teachers cache` with "
                "this config to make them"
            )

    def _open(self, shard: int, store: str) -> Any:
        path, rows = shard_path(self.folder, shard), self.layout.rows_of(shard)
        try:
            file = safe_open(path, framework="numpy")
            body = json.loads(file.metadata()["mvd_fast"])
            whole = body.pop("digest") == _digest_of(body) and self._has_shapes(file, len(rows))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole or (body["store"], body["shard"]) != (store, shard):
            raise self._damage(path, "is damaged or belongs to another store")
        for row, reason in body["bad"].items():
            self.bad[divmod(rows[int(row)], self.layout.views)] = reason
        return file

    def _has_shapes(self, file: Any, rows: int) -> bool:
        expected = [rows, self.layout.tokens]
        return all(
            file.get_slice(f"{name}.values").get_shape() == [*expected, channels]
            and file.get_slice(f"{name}.scale").get_shape() == expected
            and file.get_slice(f"{name}.checksum").get_shape() == [rows]
            for name, channels in self.layout.channels.items()
        )

    def _damage(self, path: Path, what: str) -> StoreError:
        return StoreError(
            f"teachers.cache.path: {path} {what}; delete that file and run `mvd-fast teachers cache` with this config "
            "to make it again"
        )

    def read(self, keys: Sequence[SampleKey], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """`target_<name>` [B, N, C] in `dtype` on `device`, for each name that the run uses.

        Raises StoreError where a row is not what was written.
        """
        targets = {}
        for name in self.names:
            rows = [self._row(name, key.index * self.layout.views + key.view) for key in keys]
            values, scale = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*rows, strict=True))
            targets[f"target_{name}"] = dequantize(values, scale, dtype)
        return targets

    def _row(self, name: str, row: int) -> tuple[np.ndarray, np.ndarray]:
        shard, row = divmod(row, self.layout.rows_per_shard)
        names = (f"{name}.values", f"{name}.scale", f"{name}.checksum")
        values, scale, checksum = (self._shards[shard].get_slice(name)[row : row + 1] for name in names)
        if _checksum(values, scale) != checksum[0]:
            raise self._damage(shard_path(self.folder, shard), f"is damaged: row {row} differs from what was written")
        return values, scale

    def verify(self) -> int:
        """Reads every row of every name in the store; returns how many rows there are. Raises StoreError."""
        for row in range(self.layout.rows):
            for name in self.layout.channels:
                self._row(name, row)
        return self.layout.rows


def open_targets(config: Config, device: torch.device) -> OpenTargets:
    """For `build_loader`: opens the run's store."""

    def open_store(paths: list[str]) -> Targets:
        store = TargetStore(config, paths)
        return Targets(store.bad, partial(store.read, device=device, dtype=DTYPES[config.precision]))

    return open_store


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["identity"]["format"] == FORMAT:
            Layout(**manifest["layout"])
        return {name: manifest[name] for name in ("identity", "layout", "files")}
    except FileNotFoundError:
        raise StoreError(
            f"teachers.cache.path: {folder} holds no stored targets; make them with `mvd-fast teachers cache` and this "
            "config, or leave the path empty to run the teachers in every step"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            f"teachers.cache.path: {folder / MANIFEST} is damaged; delete the folder and run `mvd-fast teachers cache`"
        ) from None

"""Checkpoints that are complete or invisible.

DeepSpeed writes into a hidden folder; every file is fsynced, a manifest with sizes and SHA-256 is added, and one rename
makes the checkpoint appear as `step-00000042`. Reading verifies the manifest first and never unpickles code.

    run_dir/checkpoints/step-00000042/manifest.json, model.safetensors, DeepSpeed's state files
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import save_file

from mvd_fast.convert.storage import read_classes, read_metadata
from mvd_fast.errors import UserError
from mvd_fast.files import WEIGHTS, fsync, seal, write_text, written_aside
from mvd_fast.names import printable

from . import launch

log = logging.getLogger(__name__)

PREFIX, HIDDEN, MANIFEST = "step-", ".writing-", "manifest.json"
FORMAT = 1
# Everything but tensors and plain containers that DeepSpeed's state files hold.
TRUSTED_CLASSES = [
    ZeroStageEnum,
    LossScaler,
    DynamicLossScaler,
    fragment_address,
    collections.OrderedDict,
    collections.defaultdict,
    dict,
    torch.Size,
]


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another run."""


class SafeTorchEngine(TorchCheckpointEngine):
    """DeepSpeed's reader and writer of state files, without the unpickling of code when reading."""

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(TRUSTED_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: the steps done, the ranks that wrote it, ZeRO stage and precision, and its files."""

    step: int
    world_size: int
    zero_stage: int
    precision: str
    files: dict[str, dict[str, Any]]
    format: int = FORMAT


def folder(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def save(
    engine: Any,
    weights: dict[str, torch.Tensor],
    state: dict[str, Any],
    run_dir: str | Path,
    step: int,
    precision: str,
    keep: int,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes the checkpoint after `step` steps (collective: every rank calls it) and removes all but the newest `keep`.

    weights: the network's full float32 state dict, used on rank 0. state: plain values of the trainer's own, rank 0's.
    metadata: of the file of weights.
    """
    root, name = folder(run_dir), f"{PREFIX}{step:08d}"
    hidden, final = root / (HIDDEN + name), root / name
    if engine.global_rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
    launch.barrier()
    engine.save_checkpoint(str(root), tag=hidden.name, client_state={"trainer": state}, save_latest=False)
    launch.barrier()
    if engine.global_rank == 0:
        save_file(weights, hidden / WEIGHTS, metadata)
        stage = int(engine.zero_optimization_stage())
        manifest = Manifest(step, launch.world_size(), stage, precision, _seal(hidden))
        write_text(hidden / MANIFEST, json.dumps(asdict(manifest), indent=1))
        fsync(hidden)
        if final.exists():  # of an earlier attempt at the same step
            shutil.rmtree(final)
        hidden.rename(final)
        fsync(root)
        for old in _list(root)[keep:]:
            shutil.rmtree(old)
    launch.barrier()
    return final


def find_start(run_dir: str | Path, resume: str) -> Path | None:
    """Where a run starts from: "auto", its newest valid checkpoint if any; "never", none; else the path of one.

    Refuses what would mix two histories in one run folder.
    """
    if resume == "auto":
        return newest_valid(run_dir)
    there = _list(folder(run_dir))
    if resume == "never":
        if there:
            raise CheckpointError(
                f"{run_dir} holds checkpoints of an earlier run; give another --run-dir or delete them"
            )
        return None
    path = Path(resume)
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"--resume {resume} is no checkpoint: it takes auto, never, or a folder with a {MANIFEST}, such as one in "
            f"{folder(run_dir)}"
        )
    verify(path)
    if newer := [p.name for p in there if p.name > path.name]:
        raise CheckpointError(
            f"{run_dir} holds newer checkpoints than {path} ({', '.join(newer)}); give another --run-dir or delete them"
        )
    return path


def newest_valid(run_dir: str | Path) -> Path | None:
    """The newest checkpoint whose files match its manifest; damaged ones are named in the log and passed over."""
    for path in _list(folder(run_dir)):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
    return None


def verify(path: Path) -> Manifest:
    """The manifest, after every file's size and checksum were found right. Raises CheckpointError."""
    try:
        manifest = Manifest(**json.loads((path / MANIFEST).read_text()))
    except (OSError, TypeError, ValueError) as error:  # of text and of JSON
        raise CheckpointError(f"{path} is no checkpoint of mvd-fast: its {MANIFEST} is unreadable ({error})") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.format}, this version reads format {FORMAT}")
    for name, facts in manifest.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{file} is missing or not {facts['bytes']} bytes long")
        if _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{file} does not match its checksum")
    return manifest


def require_classes(path: Path, names: Sequence[str]) -> None:
    """Raises CheckpointError for a checkpoint whose classes have other names, or another order, than the data now."""
    before = read_classes(read_metadata(path / WEIGHTS))
    if not before or not names or before == tuple(names):
        return
    pairs = enumerate(zip_longest(before, names, fillvalue="missing"))
    number, (old, new) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    raise CheckpointError(
        f"{path} was trained with other classes than data.train has now: class {number} was {printable(old)} and is "
        f"{printable(new)}; undo the change of the data, or start a new run with another --run-dir"
    )


def load(engine: Any, path: Path, precision: str) -> tuple[int, dict[str, Any]]:
    """Restores the engine (collective); returns (steps done, the trainer's state). `path` was verified before."""
    manifest = Manifest(**json.loads((path / MANIFEST).read_text()))
    here = {"ranks": launch.world_size(), "ZeRO stage": int(engine.zero_optimization_stage()), "precision": precision}
    there = {"ranks": manifest.world_size, "ZeRO stage": manifest.zero_stage, "precision": manifest.precision}
    if here != there:
        different = ", ".join(f"{k} {there[k]} (this run: {here[k]})" for k in here if here[k] != there[k])
        raise CheckpointError(f"{path} was written with {different}; resume with the same, or start a new run")
    _, client_state = engine.load_checkpoint(str(path.parent), tag=path.name)
    return manifest.step, client_state["trainer"]


def write_weights(weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file aside, fsyncs it and renames it into place."""
    with written_aside(path) as aside:
        save_file(weights, aside, metadata)


def _list(root: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted(root.glob(f"{PREFIX}*"), reverse=True)


def _seal(path: Path) -> dict[str, dict[str, Any]]:
    return {str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in seal(path)}


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Where weights lie: files, Hugging Face folders, runs and checkpoints of ours; and how weight files are written.

Every reader gives a `Source`: the state dict as it is in the file, and the facts that came with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mvd_fast.config.run import RunConfig
from mvd_fast.files import WEIGHTS, written_aside
from mvd_fast.names import printable

from .network import SIZE_FIELDS, Network
from .weights import WeightsError, read_weights

CLASSES = "classes"  # of a file's metadata: the names of the classes by number, as JSON
RUN = "run"  # likewise, of a run's weights: see `run_metadata`
KINDS_OF_TASKS = {
    "distill": "student",
    "mae": "mae",
    "videomae": "videomae",
    "classify": "classifier",
    "detect": "detector",
}
CONFIG, MANIFEST, BIN, CHECKPOINTS = "config.json", "manifest.json", "pytorch_model.bin", "checkpoints"
FILE_ENDINGS = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True)
class Source:
    """path: the file or folder as given. facts: what is known beside names and shapes, see `network.recognise`."""

    path: Path
    state: dict[str, Tensor] = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict)
    hf_config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_source(path: str | Path) -> Source:
    """Reads a weight file, a Hugging Face VideoMAE folder, a run folder or a checkpoint folder of ours.

    Raises WeightsError (a ValueError) for anything else, and for damaged files.
    """
    path = Path(path)
    if not path.is_dir():
        return Source(path, read_unprefixed(path), _facts_of_file(path))
    config = _read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if "model_type" in config:
        return Source(path, _read_hf_weights(path), hf_config=config)
    file = _consolidated(path)
    return Source(path, read_unprefixed(file), _facts_of_file(file))


def read_unprefixed(path: Path) -> dict[str, Tensor]:
    """`read_weights`, also without the prefix `backbone.`"""
    return {name.removeprefix("backbone."): value for name, value in read_weights(path).items()}


def _read_hf_weights(folder: Path) -> dict[str, Tensor]:
    for name in (WEIGHTS, BIN):
        if (folder / name).is_file():
            return read_weights(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            shards = sorted(set(_read_json(index)["weight_map"].values()))
            return {key: value for shard in shards for key, value in read_weights(folder / shard).items()}
    raise WeightsError(f"{folder} has a {CONFIG} of Hugging Face, but neither {WEIGHTS} nor {BIN}")


def _consolidated(folder: Path) -> Path:
    """The full-precision weights of a finished run, of its newest checkpoint, or of one checkpoint."""
    if (folder / MANIFEST).is_file():
        return _verified(folder)
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if checkpoints := sorted((folder / CHECKPOINTS).glob("step-*")):
        return _verified(checkpoints[-1])
    raise WeightsError(
        f"{folder} is no folder of weights: wanted is one of Hugging Face ({CONFIG} with model_type), a run of "
        f"mvd-fast or one of its checkpoints (step-*); another DeepSpeed checkpoint needs its zero_to_fp32.py first"
    )


def _verified(checkpoint: Path) -> Path:
    """The weights of a checkpoint of ours, after size and checksum were found right."""
    file = checkpoint / WEIGHTS
    facts = _read_json(checkpoint / MANIFEST).get("files", {}).get(WEIGHTS, {})
    if not file.is_file() or file.stat().st_size != facts.get("bytes"):
        raise WeightsError(f"{file} is missing or not as long as {MANIFEST} says")
    with open(file, "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != facts.get("sha256"):
            raise WeightsError(f"{file} does not match its checksum in {MANIFEST}")
    return file


# ---- facts ----


def _facts_of_file(file: Path) -> dict[str, Any]:
    """What a .safetensors file that a run or `save_weights` wrote says of itself."""
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    named = {CLASSES: names} if (names := read_classes(metadata)) else {}
    if RUN in metadata:
        return _facts_of_run(json.loads(metadata[RUN])) | named
    if "architecture" in metadata:
        facts = {name: parse(metadata[name]) for name, parse in SIZE_FIELDS.items() if name in metadata}
        return facts | {"positions": metadata["positions"]} | named
    return named


def read_metadata(file: Path) -> dict[str, str]:
    """Of a .safetensors file."""
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def classes_metadata(names: Sequence[str]) -> dict[str, str]:
    """What a file's metadata say of the names of its classes: nothing where there are none."""
    return {CLASSES: json.dumps(list(names))} if names else {}


def read_classes(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the classes by number, from a file's metadata; empty where it has none."""
    return tuple(json.loads(metadata.get(CLASSES, "[]")))


def class_names(source: Source, network: Network) -> tuple[str, ...]:
    """The names of a classifier's classes by number; empty where nothing says them."""
    names = tuple(source.facts.get(CLASSES, ()))
    return names if names and len(names) == network.sizes.num_classes else ()


def run_metadata(config: RunConfig, class_names: Sequence[str]) -> dict[str, str]:
    """What the weights of a run say of themselves: its task, the sizes of its network, how clips are shown to it, and
    its classes."""
    said = config.model_dump(mode="json", include={"task", "model", "evaluation"})
    data = config.data
    shown = {"mean": data.mean, "std": data.std, "sampling_rate": getattr(data, "sampling_rate", None)}
    said["data"] = {name: value for name, value in shown.items() if value is not None}
    return {RUN: json.dumps(said), **classes_metadata(class_names)}


def _facts_of_run(said: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `run_metadata` wrote."""
    kind = KINDS_OF_TASKS.get(said["task"])
    names = ("num_heads", "image_size", "num_frames")
    facts = {"kind": kind} | {name: said["model"][name] for name in names if name in said["model"]}
    # Our networks' positions: VideoMAE's are 1-D, all other video networks' are MVD's.
    facts |= {} if kind in (None, "mae") else {"positions": "1d" if kind == "videomae" else "3d"}
    facts |= {"evaluation": said["evaluation"]} if "evaluation" in said else {}
    return facts | said["data"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return content


# ---- writing ----


def save_weights(state: Mapping[str, Tensor], network: Network, layout: str, source: Source, path: Path) -> None:
    """Writes a .safetensors file with metadata, or, as the ending says, a .pth with the state dict under `model`."""
    with written_aside(path) as aside:
        if path.suffix == ".safetensors":
            save_file(owned(state), aside, metadata(network, layout, source))
        else:
            torch.save({"model": owned(state)}, aside)


def owned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, each tensor in memory of its own and in order: what safetensors asks for."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def metadata(network: Network, layout: str, source: Source) -> dict[str, str]:
    """What a file should say about itself; safetensors keeps strings only."""
    return {
        "format": "pt",
        "architecture": network.kind,
        "layout": layout,
        "positions": network.positions,
        **{name: repr(getattr(network.sizes, name)) for name in SIZE_FIELDS},
        **classes_metadata(class_names(source, network)),
        "source": printable(source.name),
        "mvd_fast": our_version(),
    }


def our_version() -> str:
    try:
        return version("mvd-fast")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"

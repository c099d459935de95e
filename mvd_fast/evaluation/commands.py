"""`mvd-fast probe` and `mvd-fast features`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvd_fast.arguments import above_zero, add_checkpoint_arguments, add_network_arguments, from_zero, positive
from mvd_fast.data.labels import Labelled, read_labelled, together, with_numbers
from mvd_fast.data.lists import Entry, ListError, read_dataset
from mvd_fast.errors import UserError
from mvd_fast.files import make_folder, write_text, written_aside
from mvd_fast.names import printable
from mvd_fast.training import launch

from .probe import NEIGHBOURS, TEMPERATURE, AttentiveSettings

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .backbone import Backbone, Preprocessing
    from .frozen import FrozenFeatures

KINDS = ("linear", "knn", "attentive")


# ---- probe ----


def probe_main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 1 when files had to be left out."""
    args = _probe_parser().parse_args(argv)
    kinds = _choices(args.kind)
    seeds = _seeds(args.seeds)
    train = _labelled(args.train, args.root)
    test = _labelled(args.test, args.root)
    test = test.numbered_as(train.classes, args.train, "put a classes.txt beside it, one name a line")
    _check_classes(train.entries, test.entries, args)
    if args.out:
        make_folder(Path(args.out).parent)
    opened = _open(args)
    sides = [_extract(opened, side.entries, args, "attentive" in kinds) for side in (train, test)]
    _check_classes(sides[0].entries, sides[1].entries, args)
    settings = AttentiveSettings(args.epochs, args.batch, args.lr, args.weight_decay)
    results = {kind: _run_probe(kind, *sides, args, opened, settings, seeds) for kind in kinds}
    report = {
        "checkpoint": str(args.checkpoint),
        "network": opened.description,
        "preprocessing": asdict(opened.clips) | {"clips": args.clips},
        "train": {"list": args.train, "clips": len(sides[0].entries), "left_out": sides[0].bad},
        "test": {"list": args.test, "clips": len(sides[1].entries), "left_out": sides[1].bad},
        "classes": len(np.unique(sides[0].labels)),
        "class_names": list(train.classes) or None,
        "test_labels": test.note or "as they are",
        "probes": results,
    }
    if args.out:
        write_text(args.out, json.dumps(report, indent=1))
    if test.note:
        opened.console.print(f"labels: {test.note}", markup=False, soft_wrap=True)
    _print_table(report)
    return _tell_left_out(opened.console, *sides)


def _run_probe(
    kind: str,
    train: FrozenFeatures,
    test: FrozenFeatures,
    args: argparse.Namespace,
    opened: _Opened,
    settings: AttentiveSettings,
    seeds: list[int],
) -> dict[str, Any]:
    """top1 and top5 (null with five classes or fewer): means over the seeds, and each seed's where there are any."""
    from .probe import knn_scores, linear_scores, top_k

    pooled = train.pooled.numpy(), train.labels, test.pooled.numpy()
    if kind == "linear":
        runs = [linear_scores(*pooled, args.regularisation)]
        used: dict[str, Any] = {"regularisation": args.regularisation}
    elif kind == "knn":
        runs = [knn_scores(*pooled, args.neighbours, args.temperature)]
        used = {"neighbours": args.neighbours, "temperature": args.temperature}
    else:
        runs = _attentive_runs(train, test, opened, settings, seeds)
        used = asdict(settings) | {"seeds": seeds}
    labels = np.unique(train.labels)
    result: dict[str, Any] = {"settings": used}
    for k in (1, 5):
        each = [top_k(scores, labels, test.labels, k) for scores in runs] if k < len(labels) else []
        result[f"top{k}"] = float(np.mean(each)) if each else None
        if len(each) > 1:
            result |= {f"top{k}_each": each, f"top{k}_std": float(np.std(each, ddof=1))}
    return result


def _attentive_runs(
    train: FrozenFeatures, test: FrozenFeatures, opened: _Opened, settings: AttentiveSettings, seeds: list[int]
) -> list[np.ndarray]:
    from rich.progress import Progress

    from .attentive import attentive_scores

    assert train.tokens is not None and test.tokens is not None, "kept when the features were made"
    heads, scores = opened.backbone.num_heads, []
    with Progress(console=opened.console) as bar:
        task = bar.add_task("attentive probe", total=settings.epochs * len(seeds))
        for seed in seeds:
            tokens = train.tokens, train.labels, test.tokens
            scores.append(
                attentive_scores(*tokens, heads, seed, settings, opened.device, on_epoch=lambda: bar.advance(task))
            )
    return scores


def _labelled(path: str, root: str) -> Labelled:
    from mvd_fast.data.media import VIDEO_EXTENSIONS

    return read_labelled(path, root, VIDEO_EXTENSIONS)


def _check_classes(train: Sequence[Entry], test: Sequence[Entry], args: argparse.Namespace) -> None:
    """Refuses what no probe can be trained or judged on; called before the work, and on what could be read."""
    classes = {entry.label for entry in train}
    if len(classes) < 2:
        raise UserError(f"{args.train} has usable clips of one class only; a probe needs at least two")
    if unseen := sorted({entry.label for entry in test} - classes):
        some = ", ".join(map(str, unseen[:4])) + (", ..." if len(unseen) > 4 else "")
        raise UserError(f"{args.test} has {len(unseen)} classes that {args.train} has no usable clip of: {some}")
    if "knn" in _choices(args.kind) and len(train) < args.neighbours:
        raise UserError(
            f"{args.train} has {len(train)} usable clips, fewer than the {args.neighbours} neighbours of --kind knn; "
            "lower --neighbours"
        )


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    counts = f"{report['train']['clips']} training, {report['test']['clips']} test clips, {report['classes']} classes"
    table = Table("probe", "top-1", "top-5", title=f"{report['network']}\n{counts}")
    for kind, result in report["probes"].items():
        cells = []
        for k in ("top1", "top5"):
            spread = f" +- {100 * result[f'{k}_std']:.2f}" if f"{k}_std" in result else ""
            cells.append("-" if result[k] is None else f"{100 * result[k]:.2f}{spread}")
        table.add_row(kind, *cells)
    Console().print(table)


# ---- features ----


def features_main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 1 when files had to be left out."""
    args = _features_parser().parse_args(argv)
    if Path(args.out).suffix != ".safetensors":
        raise UserError(f"--out {args.out} must end in .safetensors")
    entries, names = _inputs(args)
    make_folder(Path(args.out).parent)
    opened = _open(args)
    found = _extract(opened, entries, args, args.tokens)
    _write_features(found, names, opened, args)
    print(f"{printable(args.out)}: {len(found.entries)} videos, {found.pooled.shape[1]} features each")
    return _tell_left_out(opened.console, found)


def _inputs(args: argparse.Namespace) -> tuple[list[Entry], tuple[str, ...]]:
    """All videos, and the names of their classes by number; no labels of an input where some video has none."""
    parts = [(path, _entries(path, args.root)) for path in args.inputs]
    is_labelled = [all(entry.label is not None for entry in part) for _, part in parts]
    joined = together([with_numbers(*part) for part, labelled in zip(parts, is_labelled, strict=True) if labelled])
    numbered, entries = iter(joined.entries), []
    for (_, part), labelled in zip(parts, is_labelled, strict=True):
        entries += [next(numbered) if labelled else entry._replace(label=None) for entry in part]
    return entries, joined.classes


def _write_features(found: FrozenFeatures, names: Sequence[str], opened: _Opened, args: argparse.Namespace) -> None:
    """names: of the classes of the videos, where they are known."""
    import torch
    from safetensors.torch import save_file

    from mvd_fast.convert.storage import classes_metadata

    tensors = {"pooled": found.pooled}
    if found.tokens is not None:
        tensors["tokens"] = found.tokens
    if all(entry.label is not None for entry in found.entries):
        tensors["labels"] = torch.from_numpy(found.labels)
    metadata = {
        "checkpoint": printable(args.checkpoint),
        "network": opened.description,
        "preprocessing": json.dumps(asdict(opened.clips) | {"clips": args.clips}),
        "names": json.dumps([entry.path for entry in found.entries]),
        "left_out": json.dumps(found.bad),
        **(classes_metadata(names) if "labels" in tensors else {}),
    }
    with written_aside(args.out) as aside:
        save_file(tensors, aside, metadata)


# ---- shared ----


@dataclass(frozen=True)
class _Opened:
    backbone: Backbone
    clips: Preprocessing
    description: str
    device: torch.device
    console: Console


def _open(args: argparse.Namespace) -> _Opened:
    """The network on its device."""
    from rich.console import Console

    from mvd_fast.models.frozen import DTYPES

    from .backbone import load_backbone

    device = launch.device(args.device)
    backbone, clips, description = load_backbone(
        args.checkpoint,
        heads=args.heads,
        positions=args.positions,
        image_size=args.image_size,
        frames=args.frames,
        sampling_rate=args.sampling_rate,
    )
    backbone.encoder.to(DTYPES[args.precision])
    return _Opened(backbone.to(device), clips, description, device, Console(stderr=True, highlight=False))


def _extract(opened: _Opened, entries: Sequence[Entry], args: argparse.Namespace, keep_tokens: bool) -> FrozenFeatures:
    from rich.progress import Progress

    from .frozen import frozen_features

    with Progress(console=opened.console) as bar:
        task = bar.add_task("features", total=len(entries))
        return frozen_features(
            opened.backbone,
            opened.clips,
            entries,
            opened.device,
            views=args.clips,
            batch=args.feature_batch,
            threads=args.threads,
            keep_tokens=keep_tokens,
            on_file=lambda: bar.advance(task),
        )


def _entries(path: str, root: str) -> list[Entry]:
    """Of a video, a list or a folder."""
    from mvd_fast.data.media import VIDEO_EXTENSIONS

    if path.lower().endswith(VIDEO_EXTENSIONS):
        return [Entry(path, None)]
    if not Path(path).exists():
        raise ListError(f"{path} does not exist; give a list of `path label` lines or a folder of videos")
    return read_dataset(path, root, VIDEO_EXTENSIONS)


def _tell_left_out(console: Console, *sides: FrozenFeatures) -> int:
    bad = {path: reason for side in sides for path, reason in side.bad.items()}
    for path, reason in bad.items():
        console.print(f"left out: {printable(path)} {reason}", markup=False, soft_wrap=True)
    return 1 if bad else 0


def _choices(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--kind: unknown probe {unknown[0]!r}; there are: {', '.join(KINDS)}")
    return list(dict.fromkeys(kinds))


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--seeds {text} must be whole numbers with commas between them, such as 0,1,2")
    return list(map(int, parts))


def _probe_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mvd-fast probe", description="Classify clips from a network's frozen features.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder, or what `mvd-fast convert` reads")
    parser.add_argument("--train", required=True, metavar="LIST", help="`path label` lines or folder of class folders")
    parser.add_argument("--test", required=True, metavar="LIST", help="likewise, to test on")
    parser.add_argument("--kind", default="linear,knn", help=f"of {', '.join(KINDS)} (default: %(default)s)")
    parser.add_argument("--out", metavar="JSON", help="write the results to this file, too")
    parser.add_argument("--seeds", default="0", help="attentive: one training for each (default: %(default)s)")
    parser.add_argument(
        "--regularisation", type=above_zero, default=1.0, help="linear: scikit-learn's C, larger is weaker"
    )
    parser.add_argument("--neighbours", type=positive, default=NEIGHBOURS, help="knn (default: %(default)s)")
    parser.add_argument("--temperature", type=above_zero, default=TEMPERATURE, help="knn (default: %(default)s)")
    settings = AttentiveSettings()
    parser.add_argument("--epochs", type=positive, default=settings.epochs, help="attentive (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=settings.batch, help="attentive (default: %(default)s)")
    parser.add_argument("--lr", type=above_zero, default=settings.lr, help="attentive (default: %(default)s)")
    parser.add_argument("--weight-decay", type=from_zero, default=settings.weight_decay, help="attentive")
    _add_network_options(parser)
    return parser


def _features_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mvd-fast features", description="Store a network's features of videos.")
    parser.add_argument("inputs", nargs="+", metavar="VIDEO_OR_FOLDER_OR_LIST", help="videos, folders, lists")
    parser.add_argument("--checkpoint", required=True, help="a run folder, or what `mvd-fast convert` reads")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors")
    parser.add_argument("--tokens", action="store_true", help="also every token's features, float16")
    _add_network_options(parser)
    return parser


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="", help="folder that relative paths start from (default: the list's)")
    parser.add_argument("--clips", type=positive, default=1, help="clips per video, averaged (default: the centre)")
    parser.add_argument("--sampling-rate", type=positive, help="every n-th frame (default: the run's, or 4)")
    parser.add_argument("--frames", type=positive, help="frames of a clip (default: the checkpoint's)")
    parser.add_argument("--image-size", type=positive, help="pixels (default: the checkpoint's)")
    add_checkpoint_arguments(parser)
    add_network_arguments(parser)
    parser.add_argument("--feature-batch", type=positive, default=16, help="clips at once (default: %(default)s)")

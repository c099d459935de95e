"""`mvd-fast evaluate CHECKPOINT --data LIST`: a classifier tested with several views of each video."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvd_fast.arguments import add_checkpoint_arguments, add_network_arguments, positive
from mvd_fast.errors import UserError
from mvd_fast.files import make_folder, write_text, written_aside
from mvd_fast.names import printable
from mvd_fast.training import launch

from .settings import EvaluationConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mvd_fast.data.labels import Labelled

    from .backbone import Preprocessing
    from .views import Predictions, Views

AS_THEY_ARE = "as they are"  # labels that needed no mapping
FILES = ("summary.json", "predictions.jsonl", "per_class.csv", "confusion.png")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 1 when files had to be left out. Under a launcher every rank takes its share."""
    args = _parser().parse_args(argv)
    if args.out and find_spec("matplotlib") is None:
        raise UserError("--out draws with matplotlib, which is not installed: `pip install matplotlib`")

    from mvd_fast.models.frozen import DTYPES

    with launch.init_process_group(alone=False) as rank:
        with launch.errors_together():
            network, clips, views, description, known = load_classifier(args)
            classes = network.head.out_features
            given = _given_names(args, known, classes)
            found = _labelled(args, known or given, classes)
            entries, numbering = found.entries, found.note
            names = given or known or [str(number) for number in range(classes)]
            if args.out:
                make_folder(args.out)
        device = launch.device(args.device)
        network = network.to(device, DTYPES[args.precision]).eval()
        found = _with_progress(network, clips, views, entries, device, args, rank)
    if rank:
        return 0
    facts = {
        "checkpoint": str(args.checkpoint),
        "network": description,
        "data": args.data,
        "labels": numbering or AS_THEY_ARE,
        "preprocessing": asdict(clips),
        "views": asdict(views),
        "precision": args.precision,
    }
    summary = {**facts, **found.summary(), "left_out": found.bad}
    if args.out:
        write_results(Path(args.out), found, summary, names)
    _print(summary, args.out)
    return 1 if found.bad else 0


def load_classifier(args: argparse.Namespace) -> tuple[nn.Module, Preprocessing, Views, str, tuple[str, ...]]:
    """The classifier, its clips, its views, one line on it, and the names of its classes where they are known: from the
    checkpoint, changed by the options given.

    Raises WeightsError (a ValueError) for a checkpoint that is damaged, incomplete or no classifier.
    """
    from mvd_fast.config.base import IMAGENET_MEAN, IMAGENET_STD
    from mvd_fast.convert.convert import read_network
    from mvd_fast.convert.storage import class_names
    from mvd_fast.convert.weights import WeightsError, load_into
    from mvd_fast.models import VideoClassifier
    from mvd_kernels import AddLayerNorm

    from .backbone import SAMPLING_RATE, Preprocessing
    from .views import Views

    found, _, network, faults = read_network(args.checkpoint, args.heads, args.positions)
    if network.kind == "detector":
        raise WeightsError(f"{args.checkpoint} is an {network.describe()}; test it with `mvd-fast ava-evaluate`")
    if network.kind != "classifier":
        raise WeightsError(
            f"{args.checkpoint} is a {network.describe()}, no classifier; fine-tune it first (mvd-fast finetune), or "
            "probe its features (mvd-fast probe)"
        )
    if faults.missing or faults.reshaped:
        raise WeightsError(f"{args.checkpoint} is not complete: {'; '.join(faults.lines(most=4))}")
    s = network.sizes
    model = VideoClassifier(s.clip, s.num_classes)
    own = model.state_dict()
    load_into(model, {name: value for name, value in network.state.items() if name in own}, args.checkpoint)
    model.positions.copy_(network.table)
    for module in model.modules():
        if isinstance(module, AddLayerNorm):
            module.eps = s.norm_eps
    model.fc_norm.eps = s.head_eps
    facts = found.facts
    clips = Preprocessing(
        s.num_frames,
        args.sampling_rate or facts.get("sampling_rate", SAMPLING_RATE),
        s.image_size,
        tuple(facts.get("mean", IMAGENET_MEAN)),
        tuple(facts.get("std", IMAGENET_STD)),
    )
    given = {name: value for name in ("sampling", "clips", "crops") if (value := getattr(args, name))}
    asked = EvaluationConfig.model_validate(facts.get("evaluation", {})).model_copy(update=given)
    views = Views(asked.sampling, asked.clips, asked.crops)
    return model, clips, views, network.describe(), class_names(found, network)


def write_results(folder: Path, found: Predictions, summary: dict[str, Any], names: Sequence[str]) -> None:
    """The FILES; `names` are the classes'."""
    write_text(folder / "predictions.jsonl", "".join(line + "\n" for line in prediction_lines(found)))
    confusion = found.confusion()
    write_text(folder / "per_class.csv", per_class_table(confusion, names))
    draw_confusion(confusion, names, folder / "confusion.png")
    write_text(folder / "summary.json", json.dumps(summary, indent=1))  # last: with it the others are there


def prediction_lines(found: Predictions) -> list[str]:
    """One JSON object for each video: path, label, the best five classes and their probabilities."""
    from .views import TOP

    best = found.scores.topk(min(TOP, found.scores.shape[1]), dim=1)
    rows = zip(found.entries, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        json.dumps({"path": entry.path, "label": entry.label, "classes": classes, "probabilities": values})
        for entry, classes, values in rows
    ]


def per_class_table(confusion: Tensor, names: Sequence[str]) -> str:
    """CSV: class, name, videos, correct, accuracy (empty where there are none), the class most often confused with."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class", "name", "videos", "correct", "accuracy", "most_confused_with"])
    for number, row in enumerate(confusion.tolist()):
        correct, videos = row[number], sum(row)
        others = [0 if other == number else count for other, count in enumerate(row)]
        worst = names[others.index(max(others))] if any(others) else ""
        table.writerow([number, names[number], videos, correct, f"{correct / videos:.4f}" if videos else "", worst])
    return text.getvalue()


def draw_confusion(confusion: Tensor, names: Sequence[str], path: Path) -> None:
    """A PNG: the share of each label's videos (row) that were taken for each class (column)."""
    from matplotlib.figure import Figure

    classes, names = len(names), [printable(name) for name in names]
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(14.0, 3.5 + 0.22 * classes)
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="label")
    if classes <= 60:  # more would be unreadable
        axes.set_xticks(range(classes), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(classes), names, fontsize=7, parse_math=False)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the label's videos")
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


def _with_progress(network, clips, views, entries, device, args, rank: int) -> Predictions:
    from rich.console import Console
    from rich.progress import Progress

    from .views import predict

    with Progress(console=Console(stderr=True, highlight=False), disable=rank > 0) as bar:
        task = bar.add_task(launch.title("videos"), total=len(launch.shard(len(entries))))
        return predict(
            network, clips, views, entries, device,
            dtype=next(network.parameters()).dtype, batch=args.batch, threads=args.threads,
            on_file=lambda: bar.advance(task),
        )  # fmt: skip


def _given_names(args: argparse.Namespace, known: Sequence[str], classes: int) -> tuple[str, ...]:
    """Those of --classes, in the order of the checkpoint's classes; none where it is not given."""
    from mvd_fast.data.labels import read_class_names

    if not args.classes:
        return ()
    if not Path(args.classes).is_file():
        raise UserError(f"--classes {args.classes} does not exist; give a text file with one name a line")
    given = read_class_names(args.classes)
    if len(given) != classes:
        raise UserError(f"--classes {args.classes} has {len(given)} names, but the classifier has {classes} classes")
    for number, name in enumerate(given):
        if name in known and known.index(name) != number:
            raise UserError(
                f"--classes {args.classes} has {printable(name)} as number {number}, but it is class "
                f"{known.index(name)} of {args.checkpoint}; leave --classes out: the checkpoint has names"
            )
    return given


def _labelled(args: argparse.Namespace, names: Sequence[str], classes: int) -> Labelled:
    """--data with the classifier's numbers as labels."""
    from mvd_fast.data.labels import read_labelled
    from mvd_fast.data.media import VIDEO_EXTENSIONS

    found = read_labelled(args.data, args.root, VIDEO_EXTENSIONS)
    found = found.numbered_as(names, args.checkpoint, "give its names in its order: --classes FILE, one a line")
    found.require_below(classes, "the classifier's number of classes", "give labels that it was trained on")
    return found


def _print(summary: dict[str, Any], out: str | None) -> None:
    from rich.console import Console

    views = summary["views"]
    top5 = "" if summary["top5"] is None else f", top-5 {summary['top5']:.2%}"
    console = Console(highlight=False)
    console.print(summary["network"], markup=False, soft_wrap=True)
    if summary["labels"] != AS_THEY_ARE:
        console.print(f"labels: {summary['labels']}", markup=False, soft_wrap=True)
    console.print(
        f"{summary['videos']} videos, {views['clips']} x {views['crops']} views ({views['sampling']}): top-1 "
        f"{summary['top1']:.2%}{top5}",
        soft_wrap=True,
    )
    for path, reason in summary["left_out"].items():
        Console(stderr=True).print(f"left out: {printable(path)} {reason}", markup=False, soft_wrap=True)
    if out:
        console.print(f"wrote {', '.join(FILES)} to {out}", markup=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mvd-fast evaluate", description="Test a classifier on labelled videos.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder or its best.safetensors, or a file")
    parser.add_argument("--data", required=True, metavar="LIST", help="`path label` lines or folder of class folders")
    parser.add_argument("--root", default="", help="folder that relative paths start from (default: the list's)")
    parser.add_argument("--out", metavar="FOLDER", help=f"write {', '.join(FILES)}")
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line, for the files")
    parser.add_argument("--sampling", choices=("dense", "uniform"), help="of the clips (default: the run's, or dense)")
    parser.add_argument("--clips", type=positive, help="views in time (default: the run's, or 5)")
    parser.add_argument("--crops", type=positive, help="views in space (default: the run's, or 3)")
    parser.add_argument("--sampling-rate", type=positive, help="dense: every n-th frame (default: the run's, or 4)")
    add_checkpoint_arguments(parser)
    add_network_arguments(parser)
    parser.add_argument("--batch", type=positive, default=16, help="views at once (default: %(default)s)")
    return parser

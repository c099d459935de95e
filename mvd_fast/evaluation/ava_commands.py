"""`mvd-fast ava-map`, AVA's metric of any detections, and `mvd-fast ava-evaluate`, of a detector trained here."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvd_fast.arguments import add_network_arguments, from_zero, positive
from mvd_fast.data import ava_files
from mvd_fast.errors import UserError
from mvd_fast.files import make_folder, write_text
from mvd_fast.names import printable
from mvd_fast.training import launch

from .ava import MOST, FrameMap, frame_map

if TYPE_CHECKING:
    import torch

    from mvd_fast.config.run import RunConfig
    from mvd_fast.data.ava_files import Boxes, KeyFrame
    from mvd_fast.data.datasets.ava import Scene

THRESHOLD = 0.8  # of person boxes: VideoMAE's detector, SlowFast


def map_main(argv: Sequence[str] | None = None) -> int:
    """The command `ava-map`: the metric alone."""
    parser = argparse.ArgumentParser("mvd-fast ava-map", description="Frame mAP at 0.5 IoU by AVA's official protocol.")
    parser.add_argument("detections", metavar="DETECTIONS", help="CSV: video,timestamp,x1,y1,x2,y2,action_id,score")
    _add_truth(parser)
    parser.add_argument("--out", metavar="JSON", help="write the result to this file, too")
    args = parser.parse_args(argv)
    actions, truth, excluded = _read_truth(args)
    result = frame_map(truth, ava_files.read_detections(args.detections), actions, excluded)
    report = {"detections": args.detections, "annotations": args.annotations, **summary(result, actions)}
    if args.out:
        write_text(args.out, json.dumps(report, indent=1))
    _print(report)
    return 0


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """The command `ava-evaluate`; 0, or 1 when videos were left out. Under a launcher each rank takes its share."""
    args = _evaluate_parser().parse_args(argv)
    out = Path(args.out or Path(args.checkpoint) / "ava_detections.csv")
    with launch.init_process_group(alone=False) as rank:
        with launch.errors_together():
            actions, truth, excluded = _read_truth(args)
            model, config, scenes = _tested(args, actions, truth, excluded)
            make_folder(out.parent)
        found, left_out = _with_progress(model, config, scenes, sorted(actions), args, rank)
    if rank:
        return 0
    ava_files.write_detections(out, found)
    result = frame_map(truth, ava_files.read_detections(out), actions, excluded)
    report = {
        "checkpoint": args.checkpoint,
        "detections": str(out),
        "annotations": args.annotations,
        "boxes": f"{args.proposals}, score {args.threshold:g} or more" if args.proposals else "ground truth",
        "key_frames": len(scenes),
        "left_out": left_out,
        **summary(result, actions),
    }
    write_text(out.with_suffix(".json"), json.dumps(report, indent=1))
    _print(report)
    print(f"detections: {out}; summary: {out.with_suffix('.json')}")
    return 1 if left_out else 0


def _tested(
    args: argparse.Namespace, actions: dict[int, str], truth: Boxes, excluded: frozenset[KeyFrame]
) -> tuple[torch.nn.Module, RunConfig, list[Scene]]:
    """The detector, its run's config, and the scenes that it is tested on."""
    from mvd_fast.data.datasets.ava import scenes_of

    model, config = load_detector(args.checkpoint)
    classes = config.model.num_classes
    if beyond := [number for number in actions if number > classes]:
        raise UserError(f"{args.label_map} has action {beyond[0]}, but the checkpoint knows {classes} actions only")
    people = ava_files.read_proposals(args.proposals, args.threshold) if args.proposals else truth
    root = args.root or str(Path(args.annotations).absolute().parent)
    origin = args.proposals or args.annotations
    return model, config, scenes_of(people, classes, excluded, root, origin, with_labels=False)


def summary(result: FrameMap, actions: Mapping[int, str]) -> dict[str, Any]:
    """For JSON: `map` and of each action its name, average precision (null without ground truth) and true boxes."""

    def plain(value: float) -> float | None:
        return None if math.isnan(value) else value

    each = {
        str(number): {"name": name, "ap": plain(result.precision[number]), "boxes": result.truths[number]}
        for number, name in actions.items()
    }
    return {"map": plain(result.mean), "actions": each}


def load_detector(checkpoint: str) -> tuple[torch.nn.Module, RunConfig]:
    """The detector of a run folder or of one of its checkpoints, in eval mode, and the run's config.

    Raises UserError for anything else.
    """
    from mvd_fast.config.load import load_config
    from mvd_fast.convert.storage import read_source
    from mvd_fast.convert.weights import load_into
    from mvd_fast.models.detector import ActionDetector

    folder = Path(checkpoint)
    places = [folder / "config.json", folder.absolute().parent.parent / "config.json"]
    file = next((place for place in places if place.is_file()), None)
    if not folder.is_dir() or file is None:
        raise UserError(f"{checkpoint} is no folder of a run with a config.json, nor one of its checkpoints")
    config = load_config(str(file))
    if config.task != "detect":
        raise UserError(f"{checkpoint} is a run of task {config.task!r}; AVA needs task 'detect'")
    model = ActionDetector(config.model, config.model.num_classes)
    load_into(model, read_source(folder).state, checkpoint)
    return model.eval(), config


def detect(
    model: torch.nn.Module,
    config: RunConfig,
    scenes: Sequence[Scene],
    actions: Sequence[int],
    device: torch.device,
    batch: int = 8,
    threads: int = 2,
    on_scene: Callable[[], None] = lambda: None,
) -> tuple[Boxes, dict[str, str]]:
    """A row for each box of the scenes and each of `actions`: the boxes as they are, scored by the action's
    probability times the box's score; of each key frame only as many rows as the metric looks at. And the videos
    that could not be read, with the reason. Collective where there are several ranks: each takes its share of the
    scenes, and all get all the rows, in the scenes' order.

    Raises UserError when no video could be read.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch

    from mvd_fast.data.ava_files import Boxes
    from mvd_fast.data.crops import WholeFrame
    from mvd_fast.data.datasets.ava import AvaDataset
    from mvd_fast.data.lists import Entry
    from mvd_fast.data.pipeline import PipelineSpec
    from mvd_fast.data.sampling import SampleKey

    from .frozen import batches_of, samples_of
    from .results import gather_results

    mine = launch.shard(len(scenes))
    data = config.data.replaced(crop=WholeFrame(), flip=0.0)
    shown = tuple(scenes[number] for number in mine)
    dataset = AvaDataset(data, config.request, scenes=shown, is_training=False)
    spec = PipelineSpec(dataset, batch, threads, device)
    entries, left_out = [Entry(scenes[number].path, None) for number in mine], {}
    columns = np.array(actions) - 1
    found: dict[int, tuple[np.ndarray, ...]] = {}  # of a scene: boxes, actions, scores, best first
    with ThreadPoolExecutor(threads) as pool, torch.inference_mode():
        samples = samples_of(pool, dataset, entries, threads, left_out, on_scene)
        for video, index in batches_of(spec, samples) if mine else ():
            # The whole frame is shown: shares of it are shares of the input, whatever its size.
            extra = dataset.collate([dataset.boxes(SampleKey(0, 0, number), 1, 1) for number in index])
            boxes, box_clip = (torch.from_numpy(extra[name]).to(device) for name in ("boxes", "box_clip"))
            chances = model(video, boxes, box_clip).float().sigmoid().cpu().numpy()[:, columns]
            for place, number in enumerate(index):
                scene = shown[number]
                scores = (chances[extra["box_clip"] == place] * scene.scores[:, None]).ravel()
                best = np.argsort(-scores, kind="stable")[:MOST]
                person, action = np.divmod(best, len(actions))
                found[mine[number]] = scene.boxes[person], columns[action] + 1, scores[best]
    found, left_out = gather_results(found, left_out, len(scenes), "key frames")
    frames = [scenes[number].frame for number, (_, _, scores) in found.items() for _ in scores]
    boxes, numbers, scores = (np.concatenate(parts) for parts in zip(*found.values(), strict=True))
    return Boxes(frames, boxes=boxes, actions=numbers, scores=scores), left_out


def _with_progress(
    model: torch.nn.Module,
    config: RunConfig,
    scenes: Sequence[Scene],
    actions: list[int],
    args: argparse.Namespace,
    rank: int,
) -> tuple[Boxes, dict[str, str]]:
    from rich.console import Console
    from rich.progress import Progress

    from mvd_fast.models.frozen import DTYPES

    device = launch.device(args.device)
    model = model.to(device, DTYPES[args.precision])
    console = Console(stderr=True, highlight=False, quiet=rank > 0)
    with Progress(console=console) as bar:
        task = bar.add_task(launch.title("key frames"), total=len(launch.shard(len(scenes))))
        found, left_out = detect(
            model, config, scenes, actions, device, args.batch, args.threads, lambda: bar.advance(task)
        )
    for path, reason in left_out.items():
        console.print(f"left out: {printable(path)} {reason}", markup=False, soft_wrap=True)
    return found, left_out


def _read_truth(args: argparse.Namespace) -> tuple[dict[int, str], Boxes, frozenset[KeyFrame]]:
    excluded = ava_files.read_exclusions(args.excluded) if args.excluded else frozenset()
    return ava_files.read_label_map(args.label_map), ava_files.read_annotations(args.annotations), excluded


def _add_truth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, metavar="CSV", help="ground truth, such as ava_val_v2.2.csv")
    parser.add_argument(
        "--label-map", required=True, metavar="PBTXT", help="the actions that count: AVA's map of the 60 evaluated ones"
    )
    parser.add_argument("--excluded", metavar="CSV", help="key frames that do not count")


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mvd-fast ava-evaluate", description="Frame mAP of a trained action detector.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder of a detector, or one of its checkpoints")
    _add_truth(parser)
    parser.add_argument("--proposals", metavar="CSV", help="person boxes with scores (default: the true boxes)")
    parser.add_argument(
        "--threshold",
        type=from_zero,
        default=THRESHOLD,
        help="score that a person box must reach (default: %(default)s)",
    )
    parser.add_argument("--root", default="", help="folder of the videos (default: the annotations')")
    parser.add_argument("--out", metavar="CSV", help="the detections (default: ava_detections.csv in CHECKPOINT)")
    add_network_arguments(parser)
    parser.add_argument("--batch", type=positive, default=8, help="clips at once (default: %(default)s)")
    return parser


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("action", "AP", "boxes")
    for number, action in report["actions"].items():
        shown = "-" if action["ap"] is None else f"{100 * action['ap']:.2f}"
        table.add_row(f"{number} {action['name']}", shown, str(action["boxes"]))
    console = Console()
    console.print(table)
    value = "undefined: no action has ground truth" if report["map"] is None else f"{100 * report['map']:.2f} %"
    of = f", on {report['boxes']}" if "boxes" in report else ""
    console.print(f"frame mAP at 0.5 IoU: {value}{of}", soft_wrap=True, highlight=False)

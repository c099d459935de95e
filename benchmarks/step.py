"""The whole distillation step against the authors' way of computing it (yardstick.py): `mvd-fast bench step`.

Networks of the recipe's sizes with random weights, random clips, the recipe's masks; the same weights on all sides.
Sides are the yardstick and the engine as a run uses it (DeepSpeed, its optimiser with a learning rate of 0, so that
every step is the same), and the engine with the recipes that need less work. Losses are checked before anything is
timed; then the sides run in turn. With `--data` each side has a loader that decodes, and reads stored targets, beside
it (step_data.py); else loading is not part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compare import clock, gemm_peak, memory_of
from less_work import RECIPES, STORED
from rich.console import Console
from rich.table import Table
from step_data import Feed, store_targets
from torch import Tensor, nn
from yardstick import distillation_losses

from mvd_fast.config import RunConfig, TeacherConfig
from mvd_fast.config_file import load_config
from mvd_fast.files import write_text
from mvd_fast.machine import cpu_name
from mvd_fast.models import ImageTeacher, VideoTeacher, build_model
from mvd_fast.objectives.distillation import DistillationObjective, assemble
from mvd_fast.targets.ahead import targets_ahead
from mvd_fast.teachers import DTYPES, to_precision
from mvd_fast.training import launch
from mvd_fast.training.engine import backward, start_engine
from mvd_fast.training.metrics import PhaseTimer
from mvd_fast.training.optim import build_optimizer
from mvd_kernels import tube_mask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DATA = "data"  # waiting for it
PHASES = (DATA, "image teacher", "video teacher", "student", "decoders", "heads and loss", "backward", "optimiser")

# Of the loss: bf16 rounds features to 2^-9, and the mean over half a million differences is much closer than each.
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-5}
EXACT = {f"engine {name}" for name in ("exact", "compiled", "ahead", "compiled+ahead")}


class Side(NamedTuple):
    """One way of making a step."""

    name: str
    run: Callable[[], list[Tensor]]  # -> loss and its two parts
    phases: Callable[[], dict[str, float]]  # seconds of each since the last call
    samples: int  # of the student, made by one call
    flops: float
    feed: Feed | None = None


def make_objective(config: RunConfig) -> DistillationObjective:
    torch.manual_seed(0)
    model, image, video = config.model, config.teachers.image, config.teachers.video
    video_teacher = VideoTeacher(
        video.image_size, video.patch_size, model.num_frames, model.tubelet_size, *_sizes(video)
    )
    image_teacher = ImageTeacher(image.image_size, image.patch_size, *_sizes(image))
    objective = assemble(config, build_model(model, config.teachers), image_teacher, video_teacher)
    for module in objective.modules():  # the same branches on both sides
        if hasattr(module, "drop_path"):
            module.drop_path.rate = 0.0
    return objective.train().to(DEVICE)


def _sizes(teacher: TeacherConfig) -> tuple[int, int, int]:
    return teacher.embed_dim, teacher.depth, teacher.num_heads


def make_batch(config: RunConfig, clips: int, masks: int = 1) -> dict[str, Tensor]:
    """The same clips for every number of masks, and the same first mask of each."""
    torch.manual_seed(1)
    model = config.model
    numbers = torch.arange(clips)[:, None] + clips * torch.arange(masks)
    mask = tube_mask(0, 0, numbers.flatten(), model.grid, config.data.mask_ratio).mask.view(clips, masks, -1)
    video = torch.randn(clips, 3, model.num_frames, model.image_size, model.image_size)
    return {"video": video.to(DEVICE), "mask": (mask[:, 0] if masks == 1 else mask).to(DEVICE)}


def make_feed(
    args: argparse.Namespace, changes: Sequence[str], objective: DistillationObjective, samples: int, folder: Path
) -> Feed | None:
    """The loader of a side, whose config has `changes` in it; none without `--data`."""
    if not args.data:
        return None
    overrides = [*args.set, *changes, f"data.train={json.dumps(args.data)}"]
    if STORED[0] in changes:
        own = Path(tempfile.mkdtemp(dir=folder))
        config = store_targets(args.config, overrides, objective, own, args.batch, DEVICE)
    else:
        config = load_config(args.config, overrides)
    return Feed(config, samples, DEVICE)


def wait_for(feed: Feed | None, timer: PhaseTimer) -> None:
    if feed:
        with timer.phase(DATA):
            feed.wait()


def yardstick_side(config: RunConfig, precision: str, args: argparse.Namespace, folder: Path) -> Side:
    clips = args.batch
    objective, batch, timer = make_objective(config), make_batch(config, clips), PhaseTimer(DEVICE)
    optimizer = build_optimizer(objective.model, config.optim)
    feed = make_feed(args, (), objective, clips, folder)

    def run() -> list[Tensor]:
        wait_for(feed, timer)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            out = distillation_losses(objective, batch, timer.phase)
        with timer.phase("backward"):
            out["loss"].backward()
        with timer.phase("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [part.detach() for part in out.values()]

    # The engine's FLOP for the same results; the yardstick does more.
    return Side(f"yardstick {precision}", run, timer.collect, clips, objective.flops() * clips, feed)


def engine_side(name: str, args: argparse.Namespace, folder: Path) -> Side:
    """The engine with the recipe `name` in its config."""
    config, clips = load_config(args.config, [*args.set, *RECIPES[name]]), args.batch
    objective, batch = make_objective(config), make_batch(config, clips, config.data.masks_per_clip)
    batch["video"] = batch["video"].to(DTYPES[config.precision])
    samples, student = clips * config.data.masks_per_clip, objective.model
    feed = make_feed(args, RECIPES[name], objective, samples, folder)  # stores teachers as a checkpoint has them
    teachers = {"image_teacher": config.teachers.image, "video_teacher": config.teachers.video}
    for role, teacher in teachers.items():
        to_precision(getattr(objective, role), teacher.precision or config.precision)
    if config.teachers.cache.path:
        with torch.no_grad():
            batch["target_image"], batch["target_video"] = objective.targets(batch["video"])
        objective.image_teacher = objective.video_teacher = None
    whole = config.model_copy(update={"batch": config.batch.model_copy(update={"size": samples})})
    engine = start_engine(student, whole, samples, 1)
    objective.model = engine
    timer = watch(objective, student)
    batches = repeat(batch)
    if config.teachers.ahead:
        batches = targets_ahead(objective, batches, DEVICE)

    def run() -> list[Tensor]:
        wait_for(feed, timer)
        torch.manual_seed(0)  # the same choice of tokens in every step
        out = objective(next(batches))
        with timer.phase("backward"):
            backward(engine, out["loss"])
        with timer.phase("optimiser"):
            engine.step()
        return [part.detach() for part in out.values()]

    return Side(f"engine {name}", run, lambda: _exclusive(timer.collect()), samples, objective.flops() * clips, feed)


def watch(objective: DistillationObjective, student: nn.Module) -> PhaseTimer:
    """Times the engine's parts by hooks on its modules."""
    timer = PhaseTimer(DEVICE)
    parts = [("student", student)]
    parts += [(name.replace("_", " "), part) for name, part in objective.named_children() if name != "model"]
    decoders = [student.decoder_img, student.decoder_vid]
    parts += [("decoders", decoder) for decoder in decoders] + [("heads and loss", one.head) for one in decoders]
    for name, part in parts:
        timer.watch(name, part)
    return timer


def _exclusive(spent: dict[str, float]) -> dict[str, float]:
    """Without what is inside: a student's decoders, their heads."""
    student, decoders, heads = (spent[name] for name in ("student", "decoders", "heads and loss"))
    return {**spent, "student": student - decoders, "decoders": decoders - heads}


def tolerance(config: RunConfig) -> float:
    """bf16's wherever something is in bf16."""
    used = {config.precision, config.teachers.image.precision, config.teachers.video.precision}
    return TOLERANCE["bf16" if "bf16" in used else "fp32"]


def check_losses(sides: Sequence[Side], accepted: float) -> dict[str, list[float]]:
    """The losses of all sides; raises unless the exact engines' agree with the first side's, the yardstick's."""
    losses = {side.name: [float(part) for part in side.run()] for side in sides}
    expected = losses[sides[0].name]
    for name in losses.keys() & EXACT:
        for mine, theirs in zip(losses[name], expected, strict=True):
            if not abs(mine / theirs - 1) <= accepted:
                raise RuntimeError(f"{name}: loss {mine:.6f}, {sides[0].name} {theirs:.6f}: nothing is timed")
    return losses


def measure(sides: Sequence[Side], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds per phase and `total` of every round; the sides run in turn, each round starting at another one."""
    found: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for side in sides:
        side.phases()  # of the calls before
    for number in range(rounds):
        first = number % len(sides)
        for side in (*sides[first:], *sides[:first]):
            total = clock(side.run, DEVICE.type)
            found[side.name].append({**side.phases(), "total": total})
    return found


def summarise(sides: Sequence[Side], rounds: dict[str, list[dict[str, float]]], peaks: dict[str, float]) -> list[dict]:
    """One row per side: medians over rounds; `ratios` to each yardstick, per student sample, round by round."""
    rows = []
    for side in sides:
        spans = rounds[side.name]
        seconds = {
            name: statistics.median(span.get(name, 0.0) for span in spans)
            for name in ("total", *PHASES)
            if any(name in span for span in spans)
        }
        peak = peaks["fp32" if side.name == "yardstick fp32" else "run"]
        ratios = {
            other.name: statistics.median(
                theirs["total"] / other.samples / (ours["total"] / side.samples)
                for ours, theirs in zip(spans, rounds[other.name], strict=True)
            )
            for other in sides
            if other.name.startswith("yardstick")
        }
        rate = side.flops / seconds["total"]
        rows.append(
            {
                "side": side.name,
                "samples": side.samples,
                "seconds": seconds,
                "seconds_per_sample": seconds["total"] / side.samples,
                "ratios": ratios,
                "gflops": rate / 1e9,
                "share_of_peak": rate / peak,
            }
        )
    return rows


def tables(rows: list[dict]) -> list[Table]:
    yardsticks = list(rows[0]["ratios"])
    speed = Table(title="one step", title_justify="left")
    for title in ("side", "samples", "s", "s/sample", *(f"x {name}" for name in yardsticks), "GFLOP/s", "peak", "MiB"):
        speed.add_column(title, justify="left" if title == "side" else "right")
    for row in rows:
        speed.add_row(
            row["side"],
            str(row["samples"]),
            f"{row['seconds']['total']:.2f}",
            f"{row['seconds_per_sample']:.2f}",
            *(f"{row['ratios'][name]:.2f}" for name in yardsticks),
            f"{row['gflops']:.0f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['temporary_bytes'] / 2**20:.0f}",
        )
    parts = Table(title="seconds by phase", title_justify="left")
    parts.add_column("side", no_wrap=True)
    phases = [name for name in PHASES if name != DATA or any(DATA in row["seconds"] for row in rows)]
    for name in phases:
        parts.add_column(name, justify="right")
    for row in rows:
        parts.add_row(row["side"], *(f"{row['seconds'].get(name, 0.0):.3f}" for name in phases))
    return [speed, parts]


def loading(rows: list[dict]) -> Table:
    """What loading takes when nothing else is done, and as a share of the step beside which it is done."""
    table = Table(title="loading alone", title_justify="left")
    table.add_column("side", no_wrap=True)
    for name in ("s per batch", "of the step", "s to read targets", "of the step"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = []
        for spent in (row["load_seconds"], row["read_seconds"]):
            cells += ["", ""] if spent is None else [f"{spent:.4f}", f"{spent / row['seconds']['total']:.2%}"]
        table.add_row(row["side"], *cells)
    return table


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    from mvd_kernels import implementation

    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "attention": implementation("attention", DEVICE.type)[0],
        **({"device": torch.cuda.get_device_name()} if DEVICE.type == "cuda" else {}),
    }


def bench(args: argparse.Namespace, config: RunConfig, names: Sequence[str]) -> None:
    """Checks and times the sides of the step, and prints what was found. args: of step_command.py."""
    with launch.init_process_group(), tempfile.TemporaryDirectory() as folder:
        _bench(args, config, names, Path(folder))


def _bench(args: argparse.Namespace, config: RunConfig, names: Sequence[str], folder: Path) -> None:
    precisions = dict.fromkeys([config.precision, *(["fp32"] if args.fp32 else [])])
    sides = [yardstick_side(config, precision, args, folder) for precision in precisions]
    sides += [engine_side(name, args, folder) for name in names]
    losses = check_losses(sides, tolerance(config))
    memory = {side.name: memory_of(side.run, DEVICE.type).temporary for side in sides}
    rounds = measure(sides, args.rounds)
    own = torch.bfloat16 if config.precision == "bf16" else torch.float32
    peaks = {"run": gemm_peak(DEVICE.type, own), "fp32": gemm_peak(DEVICE.type, torch.float32)}
    rows = summarise(sides, rounds, peaks)
    for row, side in zip(rows, sides, strict=True):
        row |= {"temporary_bytes": memory[side.name], "losses": losses[side.name]}
        if side.feed:
            row |= {"load_seconds": side.feed.load_seconds(), "read_seconds": side.feed.read_seconds()}
            side.feed.loader.close()
    console = Console(width=max(140, Console().width), highlight=False)
    for table in (*tables(rows), *([loading(rows)] if args.data else [])):
        console.print(table)
    batches = "the same batch in every step" if args.data else "no loading"
    console.print(
        f"medians of {args.rounds} rounds, sides in turn; ratios per student sample; peak: of torch's matrix product, "
        f"{peaks['run'] / 1e9:.0f} GFLOP/s in {config.precision}, {peaks['fp32'] / 1e9:.0f} in fp32; MiB: allocated by "
        f"a step at most; learning rate 0, random weights, {batches}"
    )
    if args.json:
        content = {"config": config.name, "clips": args.batch, "rounds": args.rounds, "machine": machine()}
        write_text(Path(args.json), json.dumps({**content, "peaks": peaks, "sides": rows}, indent=1) + "\n")

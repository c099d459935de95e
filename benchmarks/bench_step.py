"""The whole distillation step against the authors' way of computing it (yardstick.py).

Networks of the recipe's sizes with random weights, random clips, the recipe's masks; the same weights on all sides.
Sides are the yardstick and the engine as a run uses it (DeepSpeed, its optimiser with a learning rate of 0, so that
every step is the same), and the engine with the recipes that need less work. What is checked is the losses. With
`--data` each side has a loader that decodes, and reads stored targets, beside it (step_data.py); else loading is not
part of it. `mvd-fast bench step` is `pytest benchmarks/bench_step.py`; the options are in conftest.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import DEVICE, Case, Side
from less_work import RECIPES, STORED
from step_data import Feed, store_targets
from torch import Tensor
from yardstick import distillation_losses

pytest.importorskip("deepspeed")

from mvd_fast.config.load import load_config
from mvd_fast.errors import UserError
from mvd_fast.models import ClipConfig, ImageTeacher, VideoTeacher, ViTConfig
from mvd_fast.models.frozen import DTYPES, to_precision
from mvd_fast.targets.mae import FrameFeatures
from mvd_fast.tasks.distill import Config, Distill, DistilledStudent, assemble
from mvd_fast.training import launch
from mvd_fast.training.engine import backward, start_engine
from mvd_fast.training.metrics import PhaseTimer
from mvd_fast.training.optim import build_optimizer
from mvd_kernels import tube_mask

DATA = "data"  # waiting for it
PHASES = (DATA, "image teacher", "video teacher", "student", "decoders", "heads and loss", "backward", "optimiser")

# Of the loss: bf16 rounds features to 2^-9, and the mean over half a million differences is much closer than each.
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-5}
# Of recipes with another arithmetic, other masks or other tokens: their losses differ by some percent in small steps.
INEXACT, INEXACT_TOLERANCE = ("int8", "masks4", "half"), 0.1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    try:
        metafunc.parametrize("side", side_names(metafunc.config.option))
    except UserError as error:
        raise pytest.UsageError(str(error)) from None


def side_names(args: argparse.Namespace) -> list[str]:
    """The engine with each recipe, and the yardsticks: the first of them is the reference."""
    names = list(RECIPES) if args.recipes == "all" else args.recipes.split(",")
    if unknown := [name for name in names if name not in RECIPES]:
        raise UserError(f"--recipes: {unknown[0]!r} is unknown; there are: all, {', '.join(RECIPES)}")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: a step has at least one clip")
    precisions = dict.fromkeys([load_config(args.config, args.set).precision, *(["fp32"] if args.fp32 else [])])
    return [*(f"engine {name}" for name in names), *(f"yardstick {precision}" for precision in precisions)]


@pytest.fixture(scope="module")
def case(pytestconfig: pytest.Config) -> Iterator[Case]:
    args, feeds = pytestconfig.option, []
    with launch.init_process_group(), tempfile.TemporaryDirectory() as folder:
        sides = {}
        for name in side_names(args):
            kind, what = name.split()
            sides[name], feed = (engine_side if kind == "engine" else yardstick_side)(what, args, Path(folder))
            feeds += [feed] if feed else []
        reference = next(name for name in sides if name.startswith("yardstick"))
        name = Path(args.config).stem
        yield Case(f"step of {name}, {args.batch} clips", sides, reference=reference)
        for feed in feeds:
            feed.loader.close()


def test_step(compare, case, side):
    compare(case, side)


def make_task(config: Config) -> Distill:
    """The recipe's networks, an image teacher and a video teacher, with random weights."""
    torch.manual_seed(0)
    model, (image, video) = config.model, config.targets
    own = {"image_size", "patch_size", "embed_dim", "depth", "num_heads"}
    clip = {"num_frames": model.num_frames, "tubelet_size": model.tubelet_size}
    video_teacher = VideoTeacher(ClipConfig(**video.model_dump(include=own), **clip))
    image_teacher = ImageTeacher(ViTConfig(**image.model_dump(include=own)))
    frames = FrameFeatures(image_teacher, model.tubelet_size, model.grid[0])
    student = DistilledStudent(model, config.decoders)
    task = assemble(config, student, {"image": frames, "video": video_teacher})
    for module in task.modules():  # the same branches on both sides
        if hasattr(module, "drop_path"):
            module.drop_path.rate = 0.0
    return task.train().to(DEVICE)


def make_batch(config: Config, clips: int, masks: int = 1) -> dict[str, Tensor]:
    """The same clips for every number of masks, and the same first mask of each."""
    torch.manual_seed(1)
    model = config.model
    numbers = torch.arange(clips)[:, None] + clips * torch.arange(masks)
    mask = tube_mask(0, 0, numbers.flatten(), model.grid, config.mask.ratio).mask.view(clips, masks, -1)
    video = torch.randn(clips, 3, model.num_frames, model.image_size, model.image_size)
    return {"video": video.to(DEVICE), "mask": (mask[:, 0] if masks == 1 else mask).to(DEVICE)}


def make_feed(
    args: argparse.Namespace, changes: Sequence[str], task: Distill, samples: int, folder: Path
) -> Feed | None:
    """The loader of a side, whose config has `changes` in it; none without `--data`."""
    if not args.data:
        return None
    device = torch.device(DEVICE)
    overrides = [*args.set, *changes, f"data.train={json.dumps(args.data)}"]
    if STORED[0] in changes:
        own = Path(tempfile.mkdtemp(dir=folder))
        config = store_targets(args.config, overrides, task, own, args.batch, device)
    else:
        config = load_config(args.config, overrides)
    return Feed(config, samples, device)


def wait_for(feed: Feed | None, timer: PhaseTimer) -> None:
    if feed:
        with timer.phase(DATA):
            feed.wait()


def yardstick_side(precision: str, args: argparse.Namespace, folder: Path) -> tuple[Side, Feed | None]:
    config, clips, device = load_config(args.config, args.set), args.batch, torch.device(DEVICE)
    task, batch, timer = make_task(config), make_batch(config, clips), PhaseTimer(device)
    optimizer = build_optimizer(task.network, config.optim)
    feed = make_feed(args, (), task, clips, folder)

    def run() -> list[Tensor]:
        wait_for(feed, timer)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = distillation_losses(task, batch, timer.phase)
        with timer.phase("backward"):
            out["loss"].backward()
        with timer.phase("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [part.detach() for part in out.values()]

    return Side(
        run,
        TOLERANCE["bf16"],  # of a second yardstick, against the first
        flops=task.flops().step * clips,  # the engine's for the same results; the yardstick does more
        dtype=DTYPES[precision],
        samples=clips,
        phases=timer.collect,
        more=lambda: loading(feed),
    ), feed


def engine_side(recipe: str, args: argparse.Namespace, folder: Path) -> tuple[Side, Feed | None]:
    """The engine with a recipe in its config."""
    config, clips, device = load_config(args.config, [*args.set, *RECIPES[recipe]]), args.batch, torch.device(DEVICE)
    task, batch = make_task(config), make_batch(config, clips, config.mask.per_clip)
    batch["video"] = batch["video"].to(DTYPES[config.precision])
    samples, student = clips * config.mask.per_clip, task.network
    feed = make_feed(args, RECIPES[recipe], task, samples, folder)  # stores teachers as a checkpoint has them
    for target in config.targets:
        to_precision(task.targets[target.title], target.precision or config.precision)
    if config.teachers.cache.path:
        with torch.no_grad():
            batch = task.with_targets(batch)
        task.targets.clear()
    whole = config.model_copy(update={"batch": config.batch.model_copy(update={"size": samples})})
    engine = start_engine(student, whole, samples, 1)
    timer = watch(task)
    batches = task.batches(repeat(batch), device)

    def run() -> list[Tensor]:
        wait_for(feed, timer)
        torch.manual_seed(0)  # the same choice of tokens in every step
        out = task.loss(engine, next(batches))
        with timer.phase("backward"):
            backward(engine, out["loss"])
        with timer.phase("optimiser"):
            engine.step()
        return [part.detach() for part in out.values()]

    inexact = any(part in recipe for part in INEXACT)
    return Side(
        run,
        INEXACT_TOLERANCE if inexact else tolerance(config),
        flops=task.flops().step * clips,
        dtype=DTYPES[config.precision],
        samples=samples,
        phases=lambda: _exclusive(timer.collect()),
        more=lambda: loading(feed),
    ), feed


def tolerance(config: Config) -> float:
    """bf16's wherever something is in bf16."""
    used = {config.precision, *(target.precision for target in config.targets)}
    return TOLERANCE["bf16" if "bf16" in used else "fp32"]


def watch(task: Distill) -> PhaseTimer:
    """Times the engine's parts, on its modules and methods."""
    timer = PhaseTimer(torch.device(DEVICE))
    for name, network in {"whole student": task.network, **task.frozen()}.items():
        timer.watch(name.replace("_", " "), network)
    for name, method in (("student", "encode"), ("decoders", "decode")):
        setattr(task.network, method, timed(timer, name, getattr(task.network, method)))
    return timer


def timed(timer: PhaseTimer, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def timed_call(*args: Any, **options: Any) -> Any:
        with timer.phase(name):
            return call(*args, **options)

    return timed_call


def _exclusive(spent: dict[str, float]) -> dict[str, float]:
    """Of a student that is neither its encoder nor its decoders are the heads, which hold the loss."""
    heads = spent["whole student"] - spent["student"] - spent["decoders"]
    whole = {**spent, "heads and loss": heads}
    return {name: whole[name] for name in PHASES if name in whole}


def loading(feed: Feed | None) -> dict[str, float | None]:
    """What loading takes when nothing else is done."""
    return {"loading alone": feed.load_seconds(), "reading alone": feed.read_seconds()} if feed else {}

"""The whole distillation step, forward and backward, against the authors' way of computing it (yardstick.py).

    python benchmarks/step.py [--config vitb_from_vitb] [--clips 2] [--precision bf16] [--rounds 5]

Networks of the recipe's sizes with random weights, random clips, the recipe's masks; the same weights on both sides. In
bf16 the engine holds bf16 weights, as DeepSpeed does, and the yardstick runs under autocast. Losses are checked equal
before anything is timed; then both sides run in turn. Decoding and the optimiser are not part of it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from compare import clock, gemm_peak, memory_of
from torch import Tensor, nn
from yardstick import distillation_losses

from mvd_fast.config import RunConfig, TeacherConfig
from mvd_fast.config_file import load_config
from mvd_fast.models import ImageTeacher, VideoTeacher, build_model
from mvd_fast.objectives.distillation import DistillationObjective
from mvd_kernels import tube_mask

# Of the loss: bf16 rounds features to 2^-9, and the mean over half a million differences is much closer than each.
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-5}


def make_objective(config: RunConfig) -> DistillationObjective:
    torch.manual_seed(0)
    model, image, video = config.model, config.teachers.image, config.teachers.video
    video_teacher = VideoTeacher(
        video.image_size, video.patch_size, model.num_frames, model.tubelet_size, *_sizes(video)
    )
    image_teacher = ImageTeacher(image.image_size, image.patch_size, *_sizes(image))
    objective = DistillationObjective(build_model(model, config.teachers), image_teacher, video_teacher)
    objective.num_visible = config.num_visible
    for module in objective.modules():  # the same branches on both sides
        if hasattr(module, "drop_path"):
            module.drop_path.rate = 0.0
    return objective


def _sizes(teacher: TeacherConfig) -> tuple[int, int, int]:
    return teacher.embed_dim, teacher.depth, teacher.num_heads


def make_batch(config: RunConfig, clips: int) -> dict[str, Tensor]:
    model = config.model
    mask = tube_mask(0, 0, torch.arange(clips), model.grid, config.data.mask_ratio).mask
    return {"video": torch.randn(clips, 3, model.num_frames, model.image_size, model.image_size), "mask": mask}


def step(losses: Callable[[], dict[str, Tensor]], network: nn.Module) -> list[Tensor]:
    """Forward and backward; the gradients are dropped. -> the loss and its two parts."""
    out = losses()
    out["loss"].backward()
    network.zero_grad(set_to_none=True)
    return [part.detach() for part in out.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="vitb_from_vitb")
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--precision", choices=TOLERANCE, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config, narrow = load_config(args.config), args.precision == "bf16"
    theirs = make_objective(config).train()
    ours, batch = copy.deepcopy(theirs), make_batch(config, args.clips)
    ours_batch = dict(batch)
    if narrow:
        ours.bfloat16()
        ours_batch["video"] = batch["video"].bfloat16()

    def yardstick() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return step(lambda: distillation_losses(theirs, batch), theirs.model)

    def engine() -> list[Tensor]:
        return step(lambda: ours(ours_batch), ours.model)

    sides = {"engine": engine, "yardstick": yardstick}
    for number, (mine, expected) in enumerate(zip(engine(), yardstick(), strict=True)):
        print(f"{('loss', 'image teacher', 'video teacher')[number]}: {mine:.6f}, yardstick {expected:.6f}")
        assert abs(mine / expected - 1) <= TOLERANCE[args.precision], "the losses are not equal: nothing is timed"
    memory = {name: memory_of(side, "cpu").temporary for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, side in sorted(sides.items(), reverse=bool(number % 2)):
            times[name].append(clock(side, "cpu"))
    peak = gemm_peak("cpu", torch.bfloat16 if narrow else torch.float32)
    flops = ours.flops() * args.clips
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rate = flops / median
        print(
            f"{name:<10} {median:7.2f} s   {rate / 1e9:6.1f} GFLOP/s   {rate / peak:4.0%} of the matrix product's "
            f"{peak / 1e9:.0f}   {memory[name] / 2**20:7.0f} MiB at most"
        )
    ratio = statistics.median(b / a for a, b in zip(times["engine"], times["yardstick"], strict=True))
    print(f"ratio {ratio:.2f}x (median of {args.rounds} rounds), memory {memory['engine'] / memory['yardstick']:.0%}")


if __name__ == "__main__":
    main()

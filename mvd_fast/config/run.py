"""The schema of a run: one JSON file, strictly typed, checked before anything is loaded.

`RunConfig` is what all runs share. Each task extends it by settings of its own (`Config` of mvd_fast/tasks/<task>.py),
each kind of dataset extends `DataConfig` (mvd_fast/data/datasets/<kind>.py). Every field says what it means in its
description; `mvd-fast config explain KEY` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny, model_validator

from mvd_fast.errors import UserError

from .base import IMAGENET_MEAN, IMAGENET_STD, Precision, Strict
from .kinds import DATASETS, OfKind
from .network import ViTConfig


@dataclass(frozen=True)
class Masks:
    """Tube masks that a task asks for: how many of each clip, over which grid, and the share of tokens masked."""

    grid: tuple[int, int, int]
    ratio: float
    per_clip: int = 1

    @property
    def num_visible(self) -> int:
        """Tokens that a mask leaves visible, the same for every sample."""
        frames, height, width = self.grid
        return frames * (height * width - int(self.ratio * height * width))


@dataclass(frozen=True)
class DataRequest:
    """What a task asks of the data.

    gives: what a dataset must have, of "video" [B, 3, T, H, W], "image" [B, 3, H, W], "labels" and "boxes".
    views: epoch e shows view e modulo this of every clip; None: each epoch its own.
    """

    gives: frozenset[str]
    image_size: int
    num_frames: int = 1
    masks: Masks | None = None
    num_classes: int | None = None
    augment: Strict | None = None  # mvd_fast.data.augment.AugmentConfig
    rows: int = 1  # of a batch for each clip: augmented copies, side by side
    views: int | None = None

    @property
    def samples(self) -> int:
        """That a clip counts as in `batch.size`."""
        return self.masks.per_clip if self.masks else 1


class DataConfig(Strict):
    """Where samples come from; a kind of dataset extends it."""

    gives: ClassVar[frozenset[str]]  # see DataRequest
    files: ClassVar[str] = "videos"  # what a list holds, for sentences

    kind: str = Field(description="a module of mvd_fast/data/datasets")
    train: str = Field(description="list file (`path label` a line) or folder of class folders")
    root: str = Field("", description="folder that relative paths in the list start from; empty: the list's folder")
    flip: float = Field(0.0, ge=0.0, le=1.0, description="probability of a horizontal flip")
    mean: tuple[float, float, float] = Field(IMAGENET_MEAN, description="of RGB in [0, 1], subtracted")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        IMAGENET_STD, description="of RGB in [0, 1], divided by"
    )
    threads: PositiveInt = Field(2, description="DALI's CPU threads per rank")
    workers: int = Field(0, ge=0, description="processes that read and (H.264 on CPU) decode; 0: inside this process")
    prefetch: PositiveInt = Field(2, description="batches prepared ahead")
    max_bad_share: float = Field(0.05, ge=0.0, le=1.0, description="stop when more than this share of files is bad")

    @property
    def shows_one_view(self) -> bool:
        """Whether a sample looks the same in every epoch."""
        return False

    def missing_files(self) -> Iterator[str]:
        """One sentence for each input that is not on disk, saying how to get it."""
        yield from missing_list(self.train, self.files)
        yield from missing_root(self.root)

    def faults(self, request: DataRequest) -> Iterator[str]:
        """One sentence for everything that does not go with what the task asks for."""
        return iter(())

    def span(self, num_frames: int) -> int:
        """Frames from the first to the last one of a clip."""
        return num_frames


class BatchConfig(Strict):
    """`size = micro_batch_size x grad_accum_steps x ranks`; name any of the two, the rest is derived and checked."""

    size: PositiveInt = Field(description="samples (clips x masks of each) per optimiser step, over all ranks")
    micro_batch_size: PositiveInt | None = Field(None, description="samples per rank and forward pass")
    grad_accum_steps: PositiveInt | None = Field(None, description="forward passes per step")


class OptimConfig(Strict):
    """AdamW with linear warm-up and cosine decay, stepped every step."""

    base_lr: PositiveFloat = Field(1.5e-4, description="peak learning rate for batch 256; scaled by batch.size / 256")
    base_min_lr: float = Field(0.0, ge=0.0, description="final learning rate for batch 256; scaled likewise")
    warmup_lr: float = Field(0.0, ge=0.0, description="learning rate of the first step")
    epochs: PositiveInt = Field(description="times that the data is gone through")
    warmup_epochs: int = Field(40, ge=0, description="of these, the first ones, with a rising learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW's means of the gradient and of its square")
    eps: PositiveFloat = Field(1e-8, description="AdamW's")
    ema: float = Field(
        0.0, ge=0.0, lt=1.0, description="decay of averaged weights, which are validated and exported; 0: none"
    )
    weight_decay: float = Field(0.05, ge=0.0, description="none on 1-D tensors and biases; mask tokens are decayed")
    clip_grad: float = Field(0.0, ge=0.0, description="global gradient norm limit; 0: no clipping, as the recipes do")

    @model_validator(mode="after")
    def _warmup_fits(self) -> OptimConfig:
        if self.warmup_epochs > self.epochs:
            raise UserError(f"warmup_epochs is {self.warmup_epochs}, longer than the {self.epochs} epochs of the run")
        return self


class FineTuneOptimConfig(OptimConfig):
    """AdamW for a network that was pre-trained: lower layers learn more slowly."""

    layer_decay: float = Field(
        1.0, gt=0.0, le=1.0, description="factor of the learning rate from each block to the one below; 1: all the same"
    )


class CheckpointConfig(Strict):
    """When the run is saved."""

    every_steps: PositiveInt | None = Field(None, description="save every n steps; empty: at the end of each epoch")
    keep_last: PositiveInt = Field(2, description="checkpoints kept; older ones are removed")


class LogConfig(Strict):
    """What is written while the run goes."""

    every: PositiveInt = Field(10, description="steps between two log lines; the host waits for the device only then")
    tensorboard: bool = Field(True, description="write the numbers for TensorBoard, too")


class RunConfig(Strict):
    """One training run."""

    needs: ClassVar[frozenset[str]]  # of the data, see DataRequest
    stage: ClassVar[str] = "train"  # the command that runs it: train or finetune

    task: str = Field(description="what is trained, and by which loss: a module of mvd_fast/tasks")
    name: str = Field(description="of the run")
    run_dir: str = Field("", description="where checkpoints and logs go; empty: runs/<name>")
    seed: int = Field(0, ge=0, description="of the weights, the order of the data, its views and masks")
    precision: Precision = Field(
        "bf16", description="of weights and activations; float32 master weights and losses either way"
    )
    model: ViTConfig
    data: Annotated[SerializeAsAny[DataConfig], OfKind(DATASETS)] = Field(description="what is trained on")
    batch: BatchConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="passed to DeepSpeed as it is, e.g. {'zero_optimization': {'stage': 1}}"
    )

    @property
    def output_dir(self) -> str:
        return self.run_dir or f"runs/{self.name}"

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's, 0 where none is named."""
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)

    @property
    def request(self) -> DataRequest:
        """What the task asks of the data."""
        return DataRequest(self.needs, self.model.image_size, getattr(self.model, "num_frames", 1))

    @property
    def start(self) -> str:
        """What the weights of a new run are, for its first lines."""
        return "from scratch"

    @property
    def clips_per_step(self) -> float:
        """Clips of one optimiser step, over all ranks."""
        return self.batch.size / self.request.samples

    def stored_widths(self) -> dict[str, int]:
        """Width of each target that is stored, by name."""
        return {}

    def precisions(self) -> dict[str, str | None]:
        """Precisions that the task's frozen networks are asked for, by key."""
        return {}

    def as_written(self) -> Self:
        """The run for a look at its networks alone: nothing is loaded, nothing compiled."""
        return self

    def faults(self) -> Iterator[str]:
        """One sentence for everything of this task that cannot work together."""
        return iter(())

    def missing_files(self) -> Iterator[str]:
        """One sentence for each input of this task that is not on disk, saying how to get it."""
        return iter(())

    def describe(self) -> str:
        """The task's part of a line of `mvd-fast config list`."""
        model = self.model
        frames = f" x {self.request.num_frames} frames" if self.request.num_frames > 1 else ""
        return f"{self.task} {model.embed_dim}/{model.depth}/{model.num_heads}; {model.image_size} px{frames}"

    def inputs(self) -> dict[str, str]:
        """What a run's first lines say of the task's own inputs, by title."""
        return {}

    def next_command(self, folder: str) -> str:
        """What the weights in the run's folder are made for; empty: nothing that is known here."""
        return ""


def missing_list(train: str, what: str) -> Iterator[str]:
    """Where `data.train` is no list or folder of files."""
    ways = (
        f"give a text file with one of the {what} a line (path, then label) or a folder of class folders: "
        "--set data.train=PATH"
    )
    path = Path(train)
    if not path.exists():
        yield f"data.train: {train} does not exist; {ways}"
    elif path.is_dir() and not any(path.iterdir()):
        yield f"data.train: the folder {train} is empty; {ways}"


def missing_root(root: str) -> Iterator[str]:
    if root and not Path(root).is_dir():
        yield (
            f"data.root: {root} is not a folder; name the one that the list's relative paths start from, "
            "or leave it empty for the list's own folder"
        )

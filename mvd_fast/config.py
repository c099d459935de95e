"""The schema of a run: one JSON file, strictly typed, checked before anything is loaded.

Every field says what it means in its description; `mvd-fast config show CONFIG` prints the resolved file.
Loading (`extends`, `--set`, error sentences) lives in `mvd_fast.config_file`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from mvd_fast.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Fields of ModelConfig that networks of the other stage do without.
OF_PRE_TRAINING = ("decoder_dim", "decoder_depth", "decoder_heads")
OF_FINE_TUNING = ("num_classes", "init", "head_dropout")

Precision = Literal["fp32", "bf16"]
TeacherPrecision = Literal["fp32", "bf16", "int8", "fp8"]
Fraction = Field(ge=0.0, le=1.0)


class Strict(BaseModel):
    """Unknown keys are errors; values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelConfig(Strict):
    """The network that is trained. `kind` is the name of a module in `mvd_fast/models/`."""

    kind: str = Field("student", description="module of mvd_fast/models")
    image_size: PositiveInt = Field(224, description="side of the square input, pixels")
    patch_size: PositiveInt = Field(16, description="side of a patch, pixels")
    num_frames: PositiveInt = Field(16, description="frames of a clip; 1 for images")
    tubelet_size: PositiveInt = Field(2, description="frames covered by one token; 1 for images")
    embed_dim: PositiveInt = Field(description="width of the encoder")
    depth: PositiveInt = Field(description="blocks of the encoder")
    num_heads: PositiveInt = Field(description="attention heads of the encoder")
    decoder_dim: PositiveInt | None = Field(None, description="width of a pre-training network's decoders")
    decoder_depth: PositiveInt | None = Field(None, description="blocks of each decoder")
    decoder_heads: PositiveInt | None = Field(None, description="attention heads of each decoder")
    num_classes: PositiveInt | None = Field(None, description="of a network that is fine-tuned; AVA: the last action")
    init: str = Field("", description="checkpoint whose encoder a fine-tuned network starts from; empty: from scratch")
    head_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="classifier: dropout before the head")
    drop_path: float = Field(0.0, ge=0.0, lt=1.0, description="stochastic depth rate of the last block")
    activation_checkpointing: bool = Field(False, description="recompute block activations in backward")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        _require_divisible(self, "image_size", "patch_size")
        _require_divisible(self, "num_frames", "tubelet_size")
        _require_divisible(self, "embed_dim", "num_heads")
        if self.decoder_dim and self.decoder_heads:
            _require_divisible(self, "decoder_dim", "decoder_heads")
        return self


class TeacherConfig(Strict):
    """A frozen teacher. `kind` is the name of a module in `mvd_fast/teachers/`."""

    kind: str = Field(description="module of mvd_fast/teachers")
    checkpoint: str = Field(description="file with the teacher's weights: .pth or .safetensors")
    precision: TeacherPrecision | None = Field(
        None,
        description="of its weights and arithmetic; empty: the run's. int8, fp8: the blocks' linear layers in 8 bits, "
        "the rest bf16",
    )
    image_size: PositiveInt = Field(
        224, description="side of the square input, pixels; an image teacher's frames are resized to it"
    )
    patch_size: PositiveInt = Field(16, description="side of a patch, pixels")
    embed_dim: PositiveInt = Field(description="its width")
    depth: PositiveInt = Field(description="its blocks")
    num_heads: PositiveInt = Field(description="its attention heads")

    @model_validator(mode="after")
    def _divisible(self) -> TeacherConfig:
        _require_divisible(self, "image_size", "patch_size")
        _require_divisible(self, "embed_dim", "num_heads")
        return self


class CacheConfig(Strict):
    """Stored targets: `mvd-fast teachers cache` runs the teachers once, training only reads."""

    path: str = Field("", description="folder of the stored targets; empty: the teachers run in every step")
    views: PositiveInt = Field(1, description="crops of each clip that are stored; epoch e shows number e modulo this")


class TeachersConfig(Strict):
    """The frozen teachers of distillation: one for single frames, one for clips."""

    image: TeacherConfig | None = None
    video: TeacherConfig | None = None
    compile: bool = Field(
        False,
        description="run them through torch.compile, on a GPU in CUDA graphs; the first step takes longer",
    )
    ahead: bool = Field(
        False,
        description="run them on the next batch while the student trains on this one, on a GPU on a CUDA stream of "
        "their own; takes memory for both",
    )
    cache: CacheConfig = CacheConfig()


class ObjectiveConfig(Strict):
    """What is minimised. `kind` is the name of a module in `mvd_fast/objectives/`."""

    kind: str = Field("distillation", description="module of mvd_fast/objectives")
    image_weight: float = Field(1.0, ge=0.0, description="weight of the image teacher's loss")
    video_weight: float = Field(1.0, ge=0.0, description="weight of the video teacher's loss")
    normalize_targets: bool = Field(
        False, description="distillation: LayerNorm teacher features per token; off in every released recipe"
    )
    predict_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="distillation: share of the masked tokens decoded, chosen anew per sample"
    )
    normalize_pixels: bool = Field(True, description="pixel: normalise each target patch to zero mean, unit variance")


class DataConfig(Strict):
    """Where clips come from. `kind` is the name of a module in `mvd_fast/data/kinds/`."""

    kind: str = Field("video", description="module of mvd_fast/data/kinds")
    train: str = Field(description="list file (`path label` a line) or folder of class folders")
    root: str = Field("", description="folder that relative paths in the list start from; empty: the list's folder")
    sampling_rate: PositiveInt = Field(4, description="take every n-th frame")
    clip: Literal["random", "center", "segments"] = Field(
        "random",
        description="where in the video a clip starts; segments (labelled): one random frame of each of as many equal "
        "parts of the video as a clip has frames",
    )
    crop: Literal["multiscale", "random_resized", "center", "whole"] = Field(
        "multiscale",
        description="VideoMAE's multi-scale crop, MAE's random resized crop, the largest centre square, or the whole "
        "frame made square",
    )
    scales: tuple[PositiveFloat, ...] = Field((1.0, 0.875, 0.75, 0.66), description="multiscale: parts of the side")
    area: tuple[PositiveFloat, PositiveFloat] = Field((0.2, 1.0), description="random_resized: range of the area kept")
    flip: float = Field(0.0, ge=0.0, le=1.0, description="probability of a horizontal flip")
    excluded: str = Field("", description="ava: file of the key frames to leave out (`video,timestamp` a line)")
    first_second: int = Field(0, ge=0, description="ava: the second that whole videos start at; 900 for cut ones")
    box_jitter: tuple[float, float] = Field(
        (0.2, 0.1),
        description="ava: share of a box's width and height that its sides move outwards at most in training",
    )
    mean: tuple[float, float, float] = Field(IMAGENET_MEAN, description="of RGB in [0, 1], subtracted")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        IMAGENET_STD, description="of RGB in [0, 1], divided by"
    )
    mask_ratio: float = Field(0.9, gt=0.0, lt=1.0, description="share of tokens masked; the same in every time slice")
    masks_per_clip: PositiveInt = Field(
        1, description="student samples made of each clip that is decoded and seen by the teachers"
    )
    threads: PositiveInt = Field(2, description="DALI's CPU threads per rank")
    workers: int = Field(0, ge=0, description="processes that read and (H.264 on CPU) decode; 0: inside this process")
    prefetch: PositiveInt = Field(2, description="batches prepared ahead")
    max_bad_share: float = Field(0.05, ge=0.0, le=1.0, description="stop when more than this share of files is bad")


class RandAugmentConfig(Strict):
    """RandAugment (Cubuk et al. 2020) with timm's increasing severities, the same for all frames of a clip."""

    layers: int = Field(0, ge=0, description="operations drawn per sample, each done with probability 1/2; 0: none")
    magnitude: float = Field(7.0, ge=0.0, le=10.0, description="mean severity, of 10")
    deviation: float = Field(0.5, ge=0.0, description="standard deviation of the severity")


class AugmentConfig(Strict):
    """What fine-tuning does to labelled clips besides crop and flip; all off by default."""

    repeats: PositiveInt = Field(1, description="differently augmented copies of each clip in a batch")
    rand_augment: RandAugmentConfig = RandAugmentConfig()
    random_erasing: float = Field(0.0, ge=0.0, le=1.0, description="probability that a box is filled with noise")
    mixup: float = Field(0.0, ge=0.0, le=2.0, description="alpha of the beta distribution; 0: none")
    cutmix: float = Field(0.0, ge=0.0, le=2.0, description="alpha of the beta distribution; 0: none")
    mix_probability: float = Field(1.0, ge=0.0, le=1.0, description="that a micro batch is mixed")
    cutmix_probability: float = Field(0.5, ge=0.0, le=1.0, description="that it is cutmix where both are on")
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of the target spread over all classes")


class EvaluationConfig(Strict):
    """Testing on labelled videos: one central view after each epoch, `clips` x `crops` views by `mvd-fast evaluate`."""

    list: str = Field("", description="labelled videos to validate on after each epoch; empty: no validation")
    root: str = Field("", description="folder that relative paths in the list start from; empty: the list's folder")
    sampling: Literal["dense", "uniform"] = Field(
        "dense", description="clips of every n-th frame along the video (K400), or frames from all over it (SSv2)"
    )
    clips: PositiveInt = Field(5, description="views in time")
    crops: PositiveInt = Field(3, description="views along the longer side of the frame")
    batch: PositiveInt = Field(16, description="views at once on each rank")


class BatchConfig(Strict):
    """`size = micro x accumulation x ranks`; name any of micro and accumulation, the rest is derived and checked."""

    size: PositiveInt = Field(description="samples (clips x data.masks_per_clip) per optimiser update, over all ranks")
    micro: PositiveInt | None = Field(None, description="samples per rank and forward pass")
    accumulation: PositiveInt | None = Field(None, description="forward passes per update")


class OptimConfig(Strict):
    """AdamW with linear warm-up and cosine decay, stepped every update."""

    base_lr: PositiveFloat = Field(1.5e-4, description="peak learning rate for batch 256; scaled by batch.size / 256")
    base_min_lr: float = Field(0.0, ge=0.0, description="final learning rate for batch 256; scaled likewise")
    warmup_lr: float = Field(0.0, ge=0.0, description="learning rate of the first update")
    epochs: PositiveInt = Field(description="times that the data is gone through")
    warmup_epochs: int = Field(40, ge=0, description="of these, the first ones, with a rising learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW's means of the gradient and of its square")
    eps: PositiveFloat = Field(1e-8, description="AdamW's")
    layer_decay: float = Field(
        1.0, gt=0.0, le=1.0, description="factor of the learning rate from each block to the one below; 1: all the same"
    )
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


class CheckpointConfig(Strict):
    """When the run is saved."""

    every_updates: PositiveInt | None = Field(None, description="save every n updates; empty: at the end of each epoch")
    keep_last: PositiveInt = Field(2, description="checkpoints kept; older ones are removed")


class LogConfig(Strict):
    """What is written while the run goes."""

    every: PositiveInt = Field(10, description="updates between two log lines; the host waits for the device only then")
    tensorboard: bool = Field(True, description="write the numbers for TensorBoard, too")


class RunConfig(Strict):
    """One training run."""

    name: str = Field(description="of the run")
    run_dir: str = Field("", description="where checkpoints and logs go; empty: runs/<name>")
    seed: int = Field(0, ge=0, description="of the weights, the order of the data, its views and masks")
    precision: Precision = Field(
        "bf16", description="of weights and activations; float32 master weights and losses either way"
    )
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    teachers: TeachersConfig = TeachersConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
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
    def num_visible(self) -> int:
        """Tokens that the mask leaves visible, the same for every sample."""
        frames, height, width = self.model.grid
        return frames * (height * width - int(self.data.mask_ratio * height * width))

    @property
    def num_predicted(self) -> int | None:
        """Masked tokens decoded per sample; None: all."""
        if self.objective.predict_fraction == 1.0:
            return None
        masked = math.prod(self.model.grid) - self.num_visible
        return max(1, round(self.objective.predict_fraction * masked))


def _require_divisible(config: BaseModel, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise UserError(f"{whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}")

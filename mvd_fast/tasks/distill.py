"""Masked feature distillation (Wang et al. 2023, section 3): a student learns each target's features of what it does
not see; with an image teacher and a video teacher as targets it is the paper's spatial-temporal co-teaching."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveInt, SerializeAsAny, model_validator
from torch import Tensor, nn

from mvd_fast.config.base import Strict
from mvd_fast.config.kinds import TARGETS, OfKind
from mvd_fast.config.network import ClipConfig, DecoderConfig, size_of_width
from mvd_fast.config.run import DataRequest, Masks, RunConfig
from mvd_fast.errors import UserError
from mvd_fast.models.frozen import compile_frozen
from mvd_fast.models.student import MaskedVideoStudent, TargetDecoder, split_masks
from mvd_fast.models.tokens import choose_tokens, per_clip
from mvd_fast.targets import TargetConfig, build_target
from mvd_fast.tasks._prefetch import prefetched
from mvd_kernels import linear_smooth_l1

from . import Batch, Flops, Network, Task


class MaskConfig(Strict):
    """What the student does not see, and what of it is predicted."""

    ratio: float = Field(0.9, gt=0.0, lt=1.0, description="share of tokens masked; the same in every time slice")
    per_clip: PositiveInt = Field(
        1, description="student samples made of each clip that is decoded and seen by the teachers"
    )
    predict_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="share of the masked tokens decoded, chosen anew per sample"
    )


class CacheConfig(Strict):
    """Stored targets: `mvd-fast teachers cache` computes them once, training only reads."""

    path: str = Field("", description="folder of the stored targets; empty: they are computed in every step")
    views: PositiveInt = Field(1, description="crops of each clip that are stored; epoch e shows number e modulo this")


class TeachersConfig(Strict):
    """How the targets' networks are run."""

    compile: bool = Field(
        False,
        description="run them through torch.compile, on a GPU in CUDA graphs; the first step takes longer",
    )
    prefetch: bool = Field(
        False,
        description="run them on the next batch while the student trains on this one, on a GPU on a CUDA stream of "
        "their own; takes memory for both",
    )
    cache: CacheConfig = CacheConfig()


class Config(RunConfig):
    """A student that learns the features of one or several targets."""

    needs: ClassVar[frozenset[str]] = frozenset({"video"})

    task: Literal["distill"] = "distill"
    model: ClipConfig
    targets: list[Annotated[SerializeAsAny[TargetConfig], OfKind(TARGETS)]] = Field(
        min_length=1, description="what is predicted at the masked tokens, each by a decoder of its own"
    )
    decoder: DecoderConfig | None = Field(None, description="of every target that has none of its own")
    mask: MaskConfig = MaskConfig()
    teachers: TeachersConfig = TeachersConfig()

    @model_validator(mode="after")
    def _are_complete(self) -> Self:
        names = [target.title for target in self.targets]
        if lacking := [target.title for target in self.targets if not (target.decoder or self.decoder)]:
            raise UserError(f"decoder is missing; the targets {', '.join(lacking)} have none of their own")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"targets: two are named {twice[0]!r}; give one another name")
        return self

    @property
    def request(self) -> DataRequest:
        masks = Masks(self.model.grid, self.mask.ratio, self.mask.per_clip)
        views = self.teachers.cache.views if self.teachers.cache.path else None
        return DataRequest(self.needs, self.model.image_size, self.model.num_frames, masks, views=views)

    @property
    def used_targets(self) -> dict[str, TargetConfig]:
        """Those with a weight, by name."""
        return {target.title: target for target in self.targets if target.weight}

    @property
    def decoders(self) -> tuple[TargetDecoder, ...]:
        """The student's, one for each target, in their order."""
        return tuple(
            TargetDecoder(target=t.title, target_dim=t.target_dim, **(t.decoder or self.decoder).model_dump())
            for t in self.targets
        )

    @property
    def num_predicted(self) -> int | None:
        """Masked tokens decoded per sample; None: all."""
        if self.mask.predict_fraction == 1.0:
            return None
        masks = Masks(self.model.grid, self.mask.ratio)
        return max(1, round(self.mask.predict_fraction * (self.model.num_tokens - masks.num_visible)))

    def stored_widths(self) -> dict[str, int]:
        return {name: t.target_dim for name, t in self.used_targets.items()} if self.teachers.cache.path else {}

    def precisions(self) -> dict[str, str | None]:
        targets = {} if self.teachers.cache.path else self.used_targets
        return {f"targets.{name}.precision": getattr(target, "precision", None) for name, target in targets.items()}

    def as_written(self) -> Config:
        return self.replaced(teachers=self.teachers.replaced(compile=False))

    def without_cache(self) -> Config:
        """The same run with its teachers in every step."""
        return self.replaced(teachers=self.teachers.replaced(cache=CacheConfig()))

    def faults(self) -> Iterator[str]:
        for target in self.targets:
            yield from target.faults(self.model)
        if not self.used_targets:
            yield "targets: all weights are 0, and nothing is left to learn; give one target a weight"
        cache = self.teachers.cache
        if not cache.path:
            return
        if self.teachers.prefetch:
            yield "teachers.prefetch: no teachers run where targets are stored: remove it, or teachers.cache.path"
        if cache.views > self.optim.epochs:
            yield (
                f"teachers.cache.views: {cache.views} views are more than the {self.optim.epochs} epochs would show; "
                f"store {self.optim.epochs} at most"
            )
        if cache.views > 1 and self.data.shows_one_view:
            yield f"teachers.cache.views: with a centred clip and crop all {cache.views} views are the same: store 1"

    def missing_files(self) -> Iterator[str]:
        for target in self.used_targets.values():
            yield from target.missing_files()

    def describe(self) -> str:
        whole = super().describe()
        network, _, rest = whole.partition(";")
        widths = [f"{t.title} {t.target_dim}" + (f"/{t.depth}" if hasattr(t, "depth") else "") for t in self.targets]
        return f"{network} <- {', '.join(widths)};{rest}"

    def inputs(self) -> dict[str, str]:
        if self.teachers.cache.path:
            return {"teachers": f"stored targets in {self.teachers.cache.path}"}
        return {"teachers": ", ".join(file for target in self.targets for file in target.files().values())}

    def next_command(self, folder: str) -> str:
        if size := size_of_width(self.model.embed_dim):
            changes = f"init={folder} data.train=LIST evaluation.list=LIST"
            return f"mvd-fast finetune --config finetune/k400_vit{size} --set {changes}"
        return f"mvd-fast probe {folder} --train LIST --test LIST"


class DistilledStudent(MaskedVideoStudent):
    """The student as it is trained: its heads give losses, and neither predictions nor their gradients are held."""

    def forward(
        self,
        video: Tensor,
        mask: Tensor,
        targets: Mapping[str, Tensor],
        normalized: Collection[str] = (),
        num_visible: int | None = None,
        num_predicted: int | None = None,
    ) -> dict[str, Tensor]:
        """video, mask, num_visible: see MaskedVideoStudent. targets: each target's features of all tokens [B, N, C].

        Returns for each target the smooth-L1 loss (beta 1) of its predictions, a float32 scalar: the mean over masked
        tokens and channels. `normalized`: targets that go through a LayerNorm without affine (eps 1e-6) first.
        `num_predicted`: decode only so many masked tokens of each row, chosen by torch's random numbers; the others
        enter neither decoder nor loss.
        """
        visible, masked = split_masks(video, mask, num_visible)
        if num_predicted is not None:
            masked = choose_tokens(masked, num_predicted)
        decoded = self.decode(self.encode(video, visible), visible, masked, tuple(targets))
        index = per_clip(masked, len(video))
        losses = {}
        for name, x in decoded.items():
            head, tokens = self.decoder(name).head, x.reshape(*index.shape, -1)
            losses[name] = linear_smooth_l1(
                tokens, head.weight, head.bias, targets[name], index, normalize_target=name in normalized
            )
        return losses


class Distill(Task):
    """sum over targets of weight * SmoothL1(prediction, target at the masked tokens), in float32.

    targets: the frozen networks, by name; one that is not there is expected in the batch. A target of weight 0 is not
    computed.
    """

    def __init__(
        self,
        network: DistilledStudent,
        targets: Mapping[str, nn.Module],
        weights: Mapping[str, float],
        normalized: Collection[str] = (),
        masks: Masks | None = None,
        num_predicted: int | None = None,
        prefetch: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.targets = nn.ModuleDict(targets).eval().requires_grad_(False)
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.normalized, self.masks, self.num_predicted = frozenset(normalized), masks, num_predicted
        self.prefetch = prefetch

    def loss(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        """batch: `video` float [B, 3, T, H, W] (normalised), `mask` bool [B, N] or [B, masks, N], True = masked; where
        targets need not be computed any more, `target_<name>` [B, N, C] of all of them.

        Returns scalars `loss` and, unweighted, `loss_<name>`.
        """
        if not all(f"target_{name}" in batch for name in self.weights):
            batch = self.with_targets(batch)
        targets = {name: batch[f"target_{name}"] for name in self.weights}
        visible = self.masks.num_visible if self.masks else None
        losses = network(batch["video"], batch["mask"], targets, self.normalized, visible, self.num_predicted)
        loss = sum(self.weights[name] * part for name, part in losses.items())
        return {"loss": loss, **{f"loss_{name}": part for name, part in losses.items()}}

    @torch.inference_mode()
    def with_targets(self, batch: Batch) -> Batch:
        """The batch and the targets' features at every token, `target_<name>` [B, N, C]."""
        return batch | {f"target_{name}": self.targets[name](batch["video"]) for name in self.weights}

    def frozen(self) -> dict[str, nn.Module]:
        return {f"{name}_teacher": network for name, network in self.targets.items() if name in self.weights}

    def batches(self, batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
        return prefetched(self.with_targets, batches, device) if self.prefetch else batches

    def flops(self) -> Flops:
        """The targets forward (unless stored), the student for each mask."""
        assert self.masks is not None, "of a run"
        per_mask = self.network.flops(self.masks.num_visible, self.num_predicted)
        trained = {f"student {part}": self.masks.per_clip * flop for part, flop in per_mask.items()}
        frozen = {title: network.flops() for title, network in self.frozen().items()}
        return Flops(trained, frozen)


def build(config: Config) -> Distill:
    """The student of the run, fresh, and its targets, loaded from their checkpoints unless they are stored."""
    network = DistilledStudent(config.model, config.decoders)  # first: its weights are always drawn alike
    stored = bool(config.teachers.cache.path)
    targets = {
        name: build_target(target, config.model, config.precision)
        for name, target in config.used_targets.items()
        if not stored
    }
    return assemble(config, network, targets)


def assemble(config: Config, network: DistilledStudent, targets: Mapping[str, nn.Module]) -> Distill:
    """The task of a run around networks that are there already."""
    if config.teachers.compile:
        for target in targets.values():
            compile_frozen(target)
    return Distill(
        network,
        targets,
        {target.title: target.weight for target in config.targets},
        {target.title for target in config.targets if target.normalize},
        config.request.masks,
        config.num_predicted,
        config.teachers.prefetch,
    )


def distillation(
    student: DistilledStudent,
    image_teacher: nn.Module,
    video_teacher: nn.Module,
    image_weight: float = 1.0,
    video_weight: float = 1.0,
    normalize_targets: bool = False,
    **options: Any,
) -> Distill:
    """MVD's task from its three networks: a student with the decoders `image` and `video`, an ImageTeacher and a
    VideoTeacher. options: see Distill."""
    from mvd_fast.targets.mae import FrameFeatures

    frames = FrameFeatures(image_teacher, student.config.tubelet_size, student.grid[0])
    return Distill(
        student,
        {"image": frames, "video": video_teacher},
        {"image": image_weight, "video": video_weight},
        ("image", "video") if normalize_targets else (),
        **options,
    )

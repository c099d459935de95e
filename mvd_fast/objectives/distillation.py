"""Masked feature distillation with spatial-temporal co-teaching (Wang et al. 2023, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd_fast.config import RunConfig
from mvd_fast.models import build_model
from mvd_fast.teachers import build_teacher, compile_teacher

# Backward costs twice the forward: one product for the input's gradient, one for the weight's.
FORWARD_AND_BACKWARD = 3
TARGETS = ("target_image", "target_video")  # in a batch, [B, N, C] each


class DistillationObjective(nn.Module):
    """image_weight * SmoothL1(pred_image, T_image[M]) + video_weight * SmoothL1(pred_video, T_video[M]).

    SmoothL1 with beta 1, mean over masked tokens and channels, in float32. Teachers stay frozen and in eval mode.
    `normalize_targets`: LayerNorm without affine (eps 1e-6) per token on the teachers' features first; off in every
    released recipe. A teacher whose weight is 0 is not run. Without teachers (both None) batches bring stored targets.
    """

    def __init__(
        self,
        student: nn.Module,
        image_teacher: nn.Module | None,
        video_teacher: nn.Module | None,
        image_weight: float = 1.0,
        video_weight: float = 1.0,
        normalize_targets: bool = False,
    ) -> None:
        super().__init__()
        self.model = student
        self.grid, self.tubelet_size = student.grid, student.tubelet_size
        self.image_teacher = image_teacher and image_teacher.eval().requires_grad_(False)
        self.video_teacher = video_teacher and video_teacher.eval().requires_grad_(False)
        self.image_weight, self.video_weight = image_weight, video_weight
        self.normalize_targets = normalize_targets
        self.num_visible: int | None = None  # set by assemble(): spares a device synchronisation per step
        self.num_predicted: int | None = None  # set by assemble(): masked tokens decoded per mask, None: all
        self.masks_per_clip = 1  # for flops()

    def train(self, mode: bool = True) -> DistillationObjective:
        self.training = mode
        self.model.train(mode)
        return self

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: `video` float [B, 3, T, H, W] (normalised), `mask` bool [B, N] or [B, masks, N], True = masked; where
        the teachers need not run any more `target_image` and `target_video` [B, N, C].

        Returns scalars `loss`, `loss_image`, `loss_video` (the parts unweighted).
        """
        if not batch.keys() & set(TARGETS):
            batch = self.taught(batch)
        video, mask = batch["video"], batch["mask"]
        targets = tuple(batch.get(name) for name in TARGETS)
        losses = self.model(video, mask, self.num_visible, targets, self.normalize_targets, self.num_predicted)
        loss_image, loss_video = (video.new_zeros((), dtype=torch.float32) if part is None else part for part in losses)
        loss = self.image_weight * loss_image + self.video_weight * loss_video
        return {"loss": loss, "loss_image": loss_image, "loss_video": loss_video}

    @torch.inference_mode()
    def taught(self, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """The batch and what the teachers say of it, `target_image` and `target_video`."""
        return {**batch, **dict(zip(TARGETS, self.targets(batch["video"]), strict=True))}

    def targets(self, video: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both teachers' features at every token: ([B, N, C_image], [B, N, C_video]); None where the weight is 0."""
        image = self.frame_features(video) if self.image_weight else None
        clip = self.video_teacher(video) if self.video_weight else None
        return image, clip

    def frame_features(self, video: Tensor) -> Tensor:
        """The image teacher on the first frame of each tubelet, resized where it expects another size."""
        frames = video[:, :, :: self.tubelet_size].transpose(1, 2).flatten(0, 1)  # [B * T', 3, H, W]
        size = self.image_teacher.image_size
        if frames.shape[-1] != size:
            frames = F.interpolate(frames, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return self.image_teacher(frames).unflatten(0, (len(video), -1)).flatten(1, 2)

    def flops(self) -> float:
        """FLOP of one clip's training step: the teachers forward (unless stored), the student forward and backward for
        each mask."""
        assert self.num_visible is not None, "set by assemble()"
        student = getattr(self.model, "module", self.model)
        teachers = 0.0
        if self.image_teacher is not None:
            teachers += self.grid[0] * self.image_teacher.flops() * bool(self.image_weight)
            teachers += self.video_teacher.flops() * bool(self.video_weight)
        per_mask = FORWARD_AND_BACKWARD * student.flops(self.num_visible, self.num_predicted)
        return teachers + self.masks_per_clip * per_mask


def build(config: RunConfig) -> DistillationObjective:
    """The student of the run, fresh, and its teachers, loaded from their checkpoints unless targets are stored."""
    assert config.teachers.image is not None and config.teachers.video is not None, "checked when the config is loaded"
    student = build_model(config.model, config.teachers)  # first: its weights are drawn, with or without teachers
    image, video = (
        None if config.teachers.cache.path else build_teacher(teacher, config.model, config.precision)
        for teacher in (config.teachers.image, config.teachers.video)
    )
    return assemble(config, student, image, video)


def assemble(
    config: RunConfig, student: nn.Module, image_teacher: nn.Module | None, video_teacher: nn.Module | None
) -> DistillationObjective:
    """The objective of a run around networks that are there already."""
    for teacher in (image_teacher, video_teacher):
        if teacher is not None and config.teachers.compile:
            compile_teacher(teacher)
    objective = DistillationObjective(
        student,
        image_teacher,
        video_teacher,
        image_weight=config.objective.image_weight,
        video_weight=config.objective.video_weight,
        normalize_targets=config.objective.normalize_targets,
    )
    objective.num_visible, objective.num_predicted = config.num_visible, config.num_predicted
    objective.masks_per_clip = config.data.masks_per_clip
    return objective

"""What the masked tokens' targets are. One file per kind; an entry's `kind` in `targets` names the file.

A kind is a module with `class Config(TargetConfig)`, its settings, and `build(config, clip)`, which gives a module that
maps clips float [B, 3, T, H, W] (normalised) to features [B, N, C], one for each token of the student, and counts them
in `flops()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt, model_validator

from mvd_fast.config.base import Precision, Strict, TeacherPrecision, require_divisible
from mvd_fast.config.kinds import TARGETS, kind_module, with_plugins
from mvd_fast.config.network import ClipConfig, DecoderConfig, size_of_width

if TYPE_CHECKING:
    from torch import nn

__path__ = with_plugins(__path__, __name__)


class TargetConfig(Strict):
    """One target, and the student's decoder for it."""

    kind: str = Field(description="a module of mvd_fast/targets")
    name: str = Field("", pattern="^[a-z0-9_]*$", description="of the target, in logs and weights; empty: its kind")
    weight: float = Field(1.0, ge=0.0, description="of its loss; 0: it is not computed")
    normalize: bool = Field(
        False, description="LayerNorm the features per token, without affine; off in every released recipe"
    )
    decoder: DecoderConfig | None = Field(None, description="the student's for this target; empty: the run's `decoder`")

    @property
    def title(self) -> str:
        """The name of the target."""
        return self.name or self.kind

    @property
    def target_dim(self) -> int:
        """Width of the features."""
        raise NotImplementedError

    def identity(self, precision: Precision) -> dict[str, Any]:
        """All settings that decide the features, for stored targets. precision: the run's."""
        return self.model_dump(mode="json", exclude={"name", "weight", "normalize", "decoder"})

    def files(self) -> dict[str, str]:
        """Whose contents decide the features, by the setting that names them."""
        return {}

    def faults(self, clip: ClipConfig) -> Iterator[str]:
        """One sentence for everything that does not go with the student's clips."""
        return iter(())

    def missing_files(self) -> Iterator[str]:
        """One sentence for each input that is not on disk."""
        return iter(())


class TeacherConfig(TargetConfig):
    """The features of a frozen ViT."""

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

    @property
    def target_dim(self) -> int:
        return self.embed_dim

    @model_validator(mode="after")
    def _divisible(self) -> TeacherConfig:
        require_divisible(self, "image_size", "patch_size")
        require_divisible(self, "embed_dim", "num_heads")
        return self

    def identity(self, precision: Precision) -> dict[str, Any]:
        settings = super().identity(precision)
        del settings["checkpoint"]  # its contents count, not its name
        return {**settings, "precision": self.precision or precision}

    def files(self) -> dict[str, str]:
        return {"checkpoint": self.checkpoint}

    def faults(self, clip: ClipConfig) -> Iterator[str]:
        side, _, wanted = self.image_size // self.patch_size, *clip.grid[1:]
        if side != wanted:
            yield (
                f"targets.{self.title}: its token grid {side}x{side} (image_size {self.image_size} / patch_size "
                f"{self.patch_size}) must equal the student's {wanted}x{wanted}: set image_size to "
                f"{wanted * self.patch_size}"
            )

    def missing_files(self) -> Iterator[str]:
        if Path(self.checkpoint).is_file():
            return
        path, size = f"targets.{self.title}.checkpoint", size_of_width(self.embed_dim)
        source, published = self.published()
        ways = []
        if size and size in published:
            ways.append(f"take the pre-trained ViT-{size.upper()} from {source}")
        if size and source:
            recipe = f"configs/{self.kind}_vit{size}.json"
            ways.append(f"train it with `deepspeed mvd_fast/train.py --config {recipe}`")
        ways = ways or ["train it first"]
        yield f"{path}: {self.checkpoint} does not exist; {', or '.join(ways)}, and name the file: --set {path}=PATH"

    def published(self) -> tuple[str, str]:
        """Where pre-trained weights are to be had, and of which sizes ("sblh")."""
        return "", ""


def build_target(config: TargetConfig, clip: ClipConfig, precision: Precision) -> nn.Module:
    """The target's network with its weights, in its own precision or else in `precision`, eval mode, no gradients.

    Under `torch.device("meta")`, where there is no memory to load weights into, no checkpoint is read.
    """
    from mvd_fast.models.frozen import to_precision

    network = kind_module(TARGETS, config.kind).build(config, clip).eval().requires_grad_(False)
    return to_precision(network, getattr(config, "precision", None) or precision)

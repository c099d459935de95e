"""A frozen network of any checkpoint that `mvd-fast convert` reads: clips in, token features out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mvd_fast.config.base import IMAGENET_MEAN, IMAGENET_STD
from mvd_fast.config.run import DataRequest
from mvd_fast.convert.convert import read_network
from mvd_fast.convert.network import Network, resized
from mvd_fast.convert.weights import WeightsError, load_into
from mvd_fast.data.clips import Center
from mvd_fast.data.crops import CenterCrop
from mvd_fast.data.datasets.video import Config, VideoDataset
from mvd_fast.models import ImageTeacher
from mvd_fast.models.videomae import VideoEncoder
from mvd_kernels import AddLayerNorm

Views = TypeVar("Views", bound=VideoDataset)

# Where neither the checkpoint nor the user says otherwise.
SAMPLING_RATE = 4
FRAMES_PER_SLICE = 2  # an image network sees every second frame, as MVD's image teacher does


@dataclass(frozen=True)
class Preprocessing:
    """How clips are made for a network: frames, every how many, side in pixels, colours."""

    num_frames: int
    sampling_rate: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def dataset(self, kind: type[Views], **fields: Any) -> Views:
        """Of centred clips and crops of files that are named one by one."""
        clip = Center(sampling_rate=self.sampling_rate)
        data = Config(train="", clip=clip, crop=CenterCrop(), mean=self.mean, std=self.std)
        return kind(data, DataRequest(data.gives, self.image_size, self.num_frames), **fields)


class Backbone(nn.Module):
    """A frozen encoder. `tokens` are after the final norm where the checkpoint has one; `pool` is their mean, through
    `fc_norm` where the checkpoint is a classifier's (its encoder has no final norm)."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.is_video, self.num_heads = network.is_video, network.sizes.num_heads
        self.is_normed = "norm.weight" in network.encoder
        self.encoder = _encoder(network)
        self.pool_norm = _pool_norm(network)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def tokens(self, video: Tensor) -> Tensor:
        """video float [B, 3, T, H, W] (normalised) -> [B, N, C], time slowest."""
        video = video.to(next(self.encoder.parameters()).dtype)
        if self.is_video:
            return self.encoder(video, normed=self.is_normed)
        frames = video[:, :, ::FRAMES_PER_SLICE].transpose(1, 2).flatten(0, 1)
        pending = self.encoder.encode(frames)
        x = self.encoder.norm(*pending)[1] if self.is_normed else pending.sum()
        return x[:, 1:].unflatten(0, (len(video), -1)).flatten(1, 2)

    @torch.inference_mode()
    def pool(self, tokens: Tensor) -> Tensor:
        """[B, N, C] -> float32 [B, C]."""
        return self.pool_norm(tokens.float().mean(1))


def load_backbone(
    checkpoint: str | Path,
    *,
    heads: int | None = None,
    positions: str | None = None,
    image_size: int | None = None,
    frames: int | None = None,
    sampling_rate: int | None = None,
) -> tuple[Backbone, Preprocessing, str]:
    """The encoder, the clips that it expects, and one line that describes it.

    checkpoint: a run folder, one of its checkpoints, or a file or folder of another project. `image_size` and `frames`
    remake its position tables. Raises WeightsError (a ValueError) for a checkpoint that is damaged, unknown or
    incomplete.
    """
    found, _, network, faults = read_network(checkpoint, heads, positions)
    if missing := [name for name in faults.missing + faults.reshaped if name.startswith(("patch_embed.", "blocks."))]:
        raise WeightsError(f"{checkpoint}: the encoder is not complete: {', '.join(missing[:4])}")
    if image_size or frames:
        network, _ = resized(network, image_size, frames if network.is_video else None)
    num_frames = network.sizes.num_frames if network.is_video else frames or found.facts.get("num_frames", 1)
    clips = Preprocessing(
        num_frames=num_frames if network.is_video else max(num_frames, FRAMES_PER_SLICE),
        sampling_rate=sampling_rate or found.facts.get("sampling_rate", SAMPLING_RATE),
        image_size=network.sizes.image_size,
        mean=tuple(found.facts.get("mean", IMAGENET_MEAN)),
        std=tuple(found.facts.get("std", IMAGENET_STD)),
    )
    return Backbone(network), clips, network.describe()


def _encoder(network: Network) -> nn.Module:
    sizes = network.sizes
    encoder = VideoEncoder(sizes.clip) if network.is_video else ImageTeacher(sizes.image)
    own = encoder.state_dict()
    kept = {name: value for name, value in own.items() if name.startswith(("norm.", "pos_embed"))}
    load_into(encoder, {**kept, **network.encoder}, "the checkpoint")
    (encoder.positions if network.is_video else encoder.pos_embed).data.copy_(network.table)
    for module in encoder.modules():
        if isinstance(module, AddLayerNorm):
            module.eps = network.sizes.norm_eps
    return encoder


def _pool_norm(network: Network) -> nn.Module:
    if "fc_norm.weight" not in network.state:
        return nn.Identity()
    norm = nn.LayerNorm(network.sizes.embed_dim, eps=network.sizes.head_eps)
    norm.load_state_dict({name: network.state[f"fc_norm.{name}"] for name in ("weight", "bias")})
    return norm

"""MVD's student (Wang et al. 2023, arXiv 2212.04500): a ViT over the visible tubes, one shallow decoder per teacher."""

from __future__ import annotations

import math

from torch import Tensor

from mvd_fast.config import OF_FINE_TUNING, ModelConfig, TeachersConfig
from mvd_kernels import AddLayerNorm, scatter_mask_tokens

from .layers import (
    LN_EPS,
    ClipEncoder,
    Decoder,
    MaskTokens,
    Target,
    check_video,
    decoder_flops,
    frozen,
    init_linear,
    linear_flops,
    mask_token,
    run_blocks,
)
from .positions import sincos_3d
from .tokens import choose_tokens, per_clip, split_mask

BRANCHES = ("img", "vid")


class MaskedVideoStudent(ClipEncoder):
    """Predicts both teachers' features at the masked tokens from the visible tubes.

    Parameter names are the reference's: `patch_embed.proj`, `pos_embed`, `blocks.*`, `norm` and, for each of
    `img` and `vid`, `down_*`, `mask_token_*`, `pos_embed_*`, `decoder_*`.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_frames: int,
        tubelet_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        image_target_dim: int,
        video_target_dim: int,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        encoder = (image_size, patch_size, num_frames, tubelet_size, embed_dim, depth, num_heads)
        super().__init__(*encoder, drop_path, activation_checkpointing)
        self.tubelet_size, self.decoder_dim = tubelet_size, decoder_dim
        self.pos_embed = frozen(sincos_3d(embed_dim, *self.grid))
        self.norm = AddLayerNorm(embed_dim, eps=LN_EPS)
        for branch, target_dim in zip(BRANCHES, (image_target_dim, video_target_dim), strict=True):
            decoder = Decoder(decoder_dim, decoder_depth, decoder_heads, target_dim, drop_path)
            decoder.recompute = activation_checkpointing
            self.add_module(f"down_{branch}", MaskTokens(embed_dim, decoder_dim))
            self.register_parameter(f"mask_token_{branch}", mask_token(decoder_dim))
            self.register_parameter(f"pos_embed_{branch}", frozen(sincos_3d(decoder_dim, *self.grid)))
            self.add_module(f"decoder_{branch}", decoder)
        init_linear(self)

    def encode(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """video [B, 3, T, H, W] -> normed tokens [B, N, D], or [B S, Nv, D] for visible int64 [B S, Nv].

        With S masks per clip the rows of one clip's masks follow each other.
        """
        check_video(video, self.num_frames, self.image_size)
        if visible is None:
            x = self.patch_embed(video, self.pos_embed)
        else:  # all masks of a clip as one list of its tubes, which then go apart
            x = self.patch_embed(video, self.pos_embed, per_clip(visible, len(video))).view(
                *visible.shape, self.embed_dim
            )
        return self.norm(*run_blocks(self.blocks, x, self.recompute))[1]

    def forward(
        self,
        video: Tensor,
        mask: Tensor,
        num_visible: int | None = None,
        targets: tuple[Tensor | None, Tensor | None] | None = None,
        normalize_targets: bool = False,
        num_predicted: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """video float [B, 3, T, H, W] (normalised), mask bool [B, N] or, S masks per clip, [B, S, N], True = masked,
        equal counts per row. Shapes below are for S = 1; else there are B S rows, a clip's masks one after the other.

        Returns (pred_image [B, Nm, image_target_dim], pred_video [B, Nm, video_target_dim]), masked tokens ascending.
        `num_visible`: tokens visible per row, if known; saves a device synchronisation. With `targets`, both teachers'
        features of all tokens ([B, N, image_target_dim], [B, N, video_target_dim]), returns the two smooth-L1 losses
        instead (float32 scalars): of features normalised per token with `normalize_targets`, None for a target None.
        `num_predicted`: decode only so many masked tokens of each row, chosen by torch's random numbers; the others
        enter neither decoder nor loss.
        """
        if mask.ndim not in (2, 3) or len(mask) != len(video):
            raise ValueError(f"mask is {list(mask.shape)}; it must be [{len(video)}, N] or [{len(video)}, masks, N]")
        visible, masked = split_mask(mask.flatten(0, -2), num_visible)
        if num_predicted is not None:
            masked = choose_tokens(masked, num_predicted)
        x = self.encode(video, visible)
        if targets is None:
            return tuple(self._decode(dict.fromkeys(BRANCHES), x, visible, masked).values())
        index = per_clip(masked, len(video))
        wanted = {
            branch: Target(features, index, normalize_targets)
            for branch, features in zip(BRANCHES, targets, strict=True)
            if features is not None
        }
        losses = self._decode(wanted, x, visible, masked)
        return tuple(losses.get(branch) for branch in BRANCHES)

    def _decode(
        self, targets: dict[str, Target | None], x: Tensor, visible: Tensor, masked: Tensor
    ) -> dict[str, Tensor]:
        """Predictions, or losses where a target is given, of the decoders that `targets` names."""
        downs = [getattr(self, f"down_{branch}") for branch in targets]
        inputs = scatter_mask_tokens(
            x,
            [down.weight for down in downs],
            [down.bias for down in downs],
            [getattr(self, f"mask_token_{branch}") for branch in targets],
            [getattr(self, f"pos_embed_{branch}") for branch in targets],
            visible,
            masked,
        )
        return {
            branch: getattr(self, f"decoder_{branch}")(one, masked.shape[1], target)
            for one, (branch, target) in zip(inputs, targets.items(), strict=True)
        }

    def flops(self, num_visible: int, num_predicted: int | None = None) -> float:
        """Forward FLOP per mask of a clip: `num_visible` tokens visible, `num_predicted` (None: all others) decoded."""
        predicted = math.prod(self.grid) - num_visible if num_predicted is None else num_predicted
        tokens = num_visible + predicted
        total = self.encoder_flops(num_visible)
        for branch in BRANCHES:
            decoder: Decoder = getattr(self, f"decoder_{branch}")
            total += linear_flops(num_visible, self.embed_dim, self.decoder_dim)
            total += decoder_flops(tokens, self.decoder_dim, len(decoder.blocks), predicted)
            total += linear_flops(predicted, self.decoder_dim, decoder.head.out_features)
        return total


def build(config: ModelConfig, teachers: TeachersConfig) -> MaskedVideoStudent:
    """The student of a run; its heads are as wide as the teachers' features."""
    assert teachers.image is not None and teachers.video is not None, "checked when the config is loaded"
    return MaskedVideoStudent(
        **config.model_dump(exclude={"kind", *OF_FINE_TUNING}),
        image_target_dim=teachers.image.embed_dim,
        video_target_dim=teachers.video.embed_dim,
    )

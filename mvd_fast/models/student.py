"""MVD's student (Wang et al. 2023, arXiv 2212.04500): a ViT over the visible tubes, one shallow decoder per target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, PositiveInt
from torch import Tensor

from mvd_fast.config.network import ClipConfig, DecoderConfig
from mvd_kernels import AddLayerNorm, scatter_mask_tokens

from .layers import (
    LN_EPS,
    ClipEncoder,
    Decoder,
    MaskTokens,
    check_video,
    frozen,
    init_linear,
    linear_flops,
    mask_token,
    run_blocks,
)
from .positions import sincos_3d
from .tokens import per_clip, split_mask

# In parameter names, of the targets that the released checkpoints have.
RELEASED = {"image": "img", "video": "vid"}


class TargetDecoder(DecoderConfig):
    """The decoder of one target."""

    target: str = Field(description="name of the target")
    target_dim: PositiveInt = Field(description="width of the target's features")

    @property
    def suffix(self) -> str:
        """Of the names of its parameters."""
        return RELEASED.get(self.target, self.target)


def released_decoders(
    decoder_dim: int, decoder_depth: int, decoder_heads: int, image_target_dim: int, video_target_dim: int
) -> tuple[TargetDecoder, TargetDecoder]:
    """The two equal decoders of the released students: for an image teacher and a video teacher."""
    sizes = {"dim": decoder_dim, "depth": decoder_depth, "num_heads": decoder_heads}
    widths = {"image": image_target_dim, "video": video_target_dim}
    image, video = (TargetDecoder(target=name, target_dim=width, **sizes) for name, width in widths.items())
    return image, video


class MaskedVideoStudent(ClipEncoder):
    """Predicts the features of every target at the masked tokens from the visible tubes.

    Given as a ClipConfig and decoders, or by name: `image_size`, `patch_size`, ... of a ClipConfig, and `decoder_dim`,
    `decoder_depth`, `decoder_heads`, `image_target_dim`, `video_target_dim` of the two decoders of MVD.

    Parameter names are the reference's: `patch_embed.proj`, `pos_embed`, `blocks.*`, `norm` and, for each target,
    `down_*`, `mask_token_*`, `pos_embed_*`, `decoder_*`: `img` and `vid` for image and video, else the target's name.
    """

    def __init__(self, config: ClipConfig | None = None, decoders: Sequence[TargetDecoder] = (), **fields: Any) -> None:
        if config is None:
            own = {name: fields.pop(name) for name in list(fields) if name in ClipConfig.model_fields}
            config, decoders = ClipConfig(**own), released_decoders(**fields)
        super().__init__(config)
        self.decoders = tuple(decoders)
        self.pos_embed = frozen(sincos_3d(config.embed_dim, *self.grid))
        self.norm = AddLayerNorm(config.embed_dim, eps=LN_EPS)
        for decoder in self.decoders:
            network = Decoder(decoder, decoder.target_dim, config.drop_path, config.activation_checkpointing)
            self.add_module(f"down_{decoder.suffix}", MaskTokens(config.embed_dim, decoder.dim))
            self.register_parameter(f"mask_token_{decoder.suffix}", mask_token(decoder.dim))
            self.register_parameter(f"pos_embed_{decoder.suffix}", frozen(sincos_3d(decoder.dim, *self.grid)))
            self.add_module(f"decoder_{decoder.suffix}", network)
        init_linear(self)

    def encode(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """video [B, 3, T, H, W] -> normed tokens [B, N, D], or [B S, Nv, D] for visible int64 [B S, Nv].

        With S masks per clip the rows of one clip's masks follow each other.
        """
        check_video(video, self.config)
        if visible is None:
            x = self.patch_embed(video, self.pos_embed)
        else:  # all masks of a clip as one list of its tubes, which then go apart
            tubes = self.patch_embed(video, self.pos_embed, per_clip(visible, len(video)))
            x = tubes.view(*visible.shape, self.config.embed_dim)
        return self.norm(*run_blocks(self.blocks, x, self.config.activation_checkpointing))[1]

    def forward(self, video: Tensor, mask: Tensor, num_visible: int | None = None) -> tuple[Tensor, ...]:
        """See `predict`."""
        return self.predict(video, mask, num_visible)

    def predict(self, video: Tensor, mask: Tensor, num_visible: int | None = None) -> tuple[Tensor, ...]:
        """video float [B, 3, T, H, W] (normalised), mask bool [B, N] or, S masks per clip, [B, S, N], True = masked,
        equal counts per row -> each target's predictions [B S, Nm, C], masked tokens ascending.

        `num_visible`: tokens visible per row, if known; saves a device synchronisation.
        """
        visible, masked = split_masks(video, mask, num_visible)
        features = self.decode(self.encode(video, visible), visible, masked)
        return tuple(self.decoder(name).head(x) for name, x in features.items())

    def decode(
        self, x: Tensor, visible: Tensor, masked: Tensor, targets: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """What the heads of the targets (None: all) read, [B S, M, D] for masked int64 [B S, M]. x: see `encode`."""
        wanted = [decoder for decoder in self.decoders if targets is None or decoder.target in targets]
        downs = [getattr(self, f"down_{decoder.suffix}") for decoder in wanted]
        inputs = scatter_mask_tokens(
            x,
            [down.weight for down in downs],
            [down.bias for down in downs],
            [getattr(self, f"mask_token_{decoder.suffix}") for decoder in wanted],
            [getattr(self, f"pos_embed_{decoder.suffix}") for decoder in wanted],
            visible,
            masked,
        )
        names = [decoder.target for decoder in wanted]
        return {n: self.decoder(n).features(tokens, masked.shape[1]) for n, tokens in zip(names, inputs, strict=True)}

    def decoder(self, target: str) -> Decoder:
        """The decoder of a target."""
        return getattr(self, f"decoder_{RELEASED.get(target, target)}")

    def flops(self, num_visible: int, num_predicted: int | None = None) -> dict[str, float]:
        """Forward FLOP per mask of a clip, of `encoder` and `decoders`: `num_visible` tokens visible, `num_predicted`
        (None: all others) decoded."""
        predicted = self.config.num_tokens - num_visible if num_predicted is None else num_predicted
        decoders = 0.0
        for decoder in self.decoders:
            decoders += linear_flops(num_visible, self.config.embed_dim, decoder.dim)
            decoders += self.decoder(decoder.target).flops(num_visible + predicted, predicted)
        return {"encoder": self.encoder_flops(num_visible), "decoders": decoders}


def split_masks(video: Tensor, mask: Tensor, num_visible: int | None) -> tuple[Tensor, Tensor]:
    """`split_mask` of the masks bool [B, N] or [B, S, N] of clips: int64 [B S, Nv] and [B S, Nm]."""
    if mask.ndim not in (2, 3) or len(mask) != len(video):
        raise ValueError(f"mask is {list(mask.shape)}; it must be [{len(video)}, N] or [{len(video)}, masks, N]")
    return split_mask(mask.flatten(0, -2), num_visible)

"""The encoder of a pre-trained checkpoint as the start of another network of ours."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .convert import read_network
from .network import resized
from .weights import WeightsError, few, load_into


def load_encoder(model: nn.Module, checkpoint: str | Path) -> None:
    """Puts the encoder of any video checkpoint that `mvd-fast convert` reads into `model`: `patch_embed`, `blocks`,
    `pos_embed` and, where both have it, `norm`. Everything else stays as it is.

    model: with a ClipConfig as `config` and the student's parameter names. Position tables are remade for its
    clips. Raises WeightsError (a ValueError) for a checkpoint that is damaged, of images, incomplete or of other sizes.
    """
    _, _, network, faults = read_network(checkpoint)
    if not network.is_video:
        raise WeightsError(f"{checkpoint} is an {network.describe()}; a video network starts from a video checkpoint")
    lacking = [name for name in faults.missing + faults.reshaped if name.startswith(("patch_embed.", "blocks."))]
    if lacking:
        raise WeightsError(f"{checkpoint}: the encoder is not complete: {few(lacking)}")
    if not hasattr(model, "pos_embed") and network.positions != "3d":
        raise WeightsError(
            f"{checkpoint} is a {network.describe()}; the positions that {type(model).__name__} adds are 3-D, so that "
            "it cannot start from it"
        )
    if (heads := model.blocks[0].attn.num_heads) != network.sizes.num_heads:
        raise WeightsError(
            f"{checkpoint} has {network.sizes.num_heads} attention heads, model.num_heads is {heads}; make them equal"
        )
    network, _ = resized(network, model.config.image_size, model.config.num_frames)
    own = model.state_dict()
    found = network.encoder | {"pos_embed": network.table}
    kept = {name: value for name, value in own.items() if not name.startswith(("patch_embed.", "blocks."))}
    load_into(model, kept | {n: v for n, v in found.items() if n in own or n.startswith("blocks.")}, checkpoint)

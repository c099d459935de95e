"""VideoMAE's names: in pre-training the encoder has the prefix `encoder.`; the 1-D positions are not stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mvd_fast.errors import UserError

from ..names import NameTable
from ..network import Network
from ..storage import Source, save_weights

FOLDER = False
HOLDS = "VideoMAE's pre-training networks and classifiers as a whole, of MVD's students the encoder"
PRETRAINING = NameTable(
    [
        ("mask_token", "mask_token"),
        ("decoder.{rest}", "decoder.{rest}"),
        ("encoder_to_decoder.{x}", "encoder_to_decoder.{x}"),
        ("encoder.{rest}", "{rest}"),
    ]
)


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "encoder.patch_embed.proj.weight" in state


def read(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The prefix alone tells VideoMAE's positions, unless a table is stored or a classifier has the prefix, too."""
    state = {PRETRAINING.ours(name): value for name, value in source.state.items()}
    return state, {} if {"pos_embed", "head.weight"} & state.keys() else {"positions": "1d"}


def select(network: Network) -> dict[str, Tensor]:
    if not network.is_video:
        raise UserError("the videomae layout holds video networks, and this is an image ViT: use --to mvd or timm")
    if network.kind == "videomae":
        return {name: value for name, value in network.state.items() if name != "pos_embed"}
    return {**network.encoder, **network.head}


def loses(network: Network) -> str:
    if network.positions != "1d":
        return f"its {network.positions} positions, where VideoMAE's code adds its own 1-D table"
    return ""


def write(kept: Mapping[str, Tensor], network: Network, source: Source, target: Path) -> None:
    fine_tuned = network.kind == "classifier"
    state = {name if fine_tuned else PRETRAINING.theirs(name): value for name, value in kept.items()}
    save_weights(state, network, "videomae", source, target)

"""The reference MVD's names, which are ours; MAE's image ViT keeps its own, as MVD's code reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..network import Network
from ..storage import Source, save_weights

FOLDER = False
HOLDS = "MVD's students, classifiers and detectors and MAE's image ViTs as a whole, of VideoMAE the encoder"


def recognises(state: Mapping[str, Tensor]) -> bool:
    patch = state.get("patch_embed.proj.weight")
    return patch is not None and not (patch.ndim == 5 and "blocks.0.attn.qkv.bias" in state)


def read(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return source.state, {}


def select(network: Network) -> dict[str, Tensor]:
    """Students store their table, so that one of another kind is kept by storing it; classifiers have 3-D positions."""
    if network.kind in ("student", "mae", "detector"):
        return dict(network.state)
    if network.kind == "classifier":
        return {**network.encoder, **network.head}
    return {**network.encoder, "pos_embed": network.table}


def loses(network: Network) -> str:
    if network.kind == "classifier" and network.positions != "3d":
        return f"its {network.positions} positions, where MVD's classifier adds its own 3-D table"
    if network.kind == "mae" and network.positions == "learned":
        return "its learned positions, where MVD's image teacher adds its own 2-D table"
    return ""


def write(kept: Mapping[str, Tensor], network: Network, source: Source, target: Path) -> None:
    save_weights(kept, network, "mvd", source, target)

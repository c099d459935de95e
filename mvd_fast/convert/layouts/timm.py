"""timm's `VisionTransformer` names: one fused qkv bias, a stored table, `norm` or `fc_norm` and `head`.

An image ViT from MAE loads as `vit_base_patch16_224` and the like. For video timm has no such model: the names are
those of `VisionTransformer(class_token=False)`, while `patch_embed.proj` stays a Conv3d over tubes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..names import join_rows, split_rows
from ..network import Network
from ..storage import Source, save_weights
from ..weights import WeightsError

FOLDER = False
HOLDS = "the encoder with its position table, and a classifier's end"
BIASES = ("attn.q_bias", "attn.k_bias", "attn.v_bias")
FUSED = "attn.qkv.bias"


def recognises(state: Mapping[str, Tensor]) -> bool:
    patch = state.get("patch_embed.proj.weight")
    return patch is not None and patch.ndim == 5 and "blocks.0.attn.qkv.bias" in state


def read(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = split_rows(source.state, FUSED, BIASES)
    for name in [name for name in state if name.endswith(BIASES[1])]:
        if state.pop(name).any():
            fused = name.replace(BIASES[1], FUSED)
            raise WeightsError(f"{source.path}: {fused} has a bias of the keys, and video networks here have none")
    return state, {}


def select(network: Network) -> dict[str, Tensor]:
    return {**network.encoder, **network.head, "pos_embed": network.table}


def loses(network: Network) -> str:
    return ""


def write(kept: Mapping[str, Tensor], network: Network, source: Source, target: Path) -> None:
    queries = {name: value for name, value in kept.items() if name.endswith(BIASES[0])}
    keys = {name.replace(*BIASES[:2]): torch.zeros_like(value) for name, value in queries.items()}
    save_weights(join_rows({**kept, **keys}, BIASES, FUSED), network, "timm", source, target)

"""Features of every clip of a list, from any number of networks in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_fast.config.run import RunConfig
from mvd_fast.data import build_loader
from mvd_fast.data.clips import Center
from mvd_fast.data.lists import read_dataset
from mvd_fast.data.loader import DataSetup

# Clip float [B, 3, T, H, W] (normalised) -> one feature per token, [B, N, C], time slowest.
Network = Callable[[Tensor], Tensor]


@dataclass
class ClipFeatures:
    """Of S clips: `index` int64 [S] (positions in the list); per network `pooled` float32 [S, C] (the mean token, as
    the fine-tuned classifier pools) and `similarity` float64 [T', T'] (see `slice_similarity`)."""

    index: np.ndarray
    pooled: dict[str, np.ndarray] = field(default_factory=dict)
    similarity: dict[str, np.ndarray] = field(default_factory=dict)


@torch.inference_mode()
def clip_features(
    networks: Mapping[str, Network], config: RunConfig, clips: str, device: torch.device, batch: int = 64
) -> ClipFeatures:
    """Runs the centre clip of every video of the list `clips` once through all networks.

    config: the run whose data settings and model shape are used. All clips are seen: the batch is lowered to a
    divisor of their number.
    """
    data = config.data.replaced(train=clips, clip=Center(sampling_rate=config.data.sampling_rate))
    batch = math.gcd(len(read_dataset(clips, data.root)), batch)
    setup = DataSetup(data, replace(config.request, masks=None, views=None), config.seed)
    loader = build_loader(setup, 0, 1, device, batch, 1)
    pooled: dict[str, list[Tensor]] = {name: [] for name in networks}
    similarity: dict[str, Tensor] = {name: torch.zeros(()) for name in networks}
    index = []
    batches = loader.batches(0)
    for _ in range(loader.steps_per_epoch):
        item = next(batches)
        index.append(item["index"])
        for name, network in networks.items():
            slices = network(item["video"]).float().unflatten(1, (config.model.grid[0], -1))  # [B, T', S, C]
            pooled[name].append(slices.mean((1, 2)))
            similarity[name] = similarity[name] + slice_similarity(slices) / loader.steps_per_epoch
    loader.close()
    return ClipFeatures(
        torch.cat(index).cpu().numpy(),
        {name: torch.cat(parts).cpu().numpy() for name, parts in pooled.items()},
        {name: matrix.cpu().numpy() for name, matrix in similarity.items()},
    )


def slice_similarity(slices: Tensor) -> Tensor:
    """Mean cosine similarity of two time slices' features at the same place: [B, T', S, C] -> float64 [T', T'].

    The paper's figure that sets image and video teachers apart (Wang et al. 2023, figure 1 and section 3.3).
    """
    unit = F.normalize(slices.double(), dim=-1)
    return torch.einsum("btsc,busc->tu", unit, unit) / (unit.shape[0] * unit.shape[2])

"""tube_mask for 1024 clips at once: against the NumPy loop of a data loader, and against plain PyTorch.

The loop is what the authors of MVD and VideoMAE do for every sample: shuffle one slice's zeros and ones, tile it over
time. Its masks are other masks, as NumPy's generator draws them; what can be compared is how many there are of what.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from mvd_kernels import TubeMask, tube_mask, use_impl

CLIPS, GRID, RATIO = 1024, (8, 14, 14), 0.9
POSITIONS = GRID[1] * GRID[2]
MASKED = int(RATIO * POSITIONS)


def numpy_mask(generator: np.random.RandomState) -> np.ndarray:
    """One sample's mask, float64 [N] of zeros and ones."""
    slice_p = np.hstack([np.zeros(POSITIONS - MASKED), np.ones(MASKED)])
    generator.shuffle(slice_p)
    return np.tile(slice_p, (GRID[0], 1)).flatten()


def numpy_masks() -> list[Tensor]:
    generator = np.random.RandomState(0)
    return [torch.from_numpy(np.stack([numpy_mask(generator) for _ in range(CLIPS)]))]


def numpy_masks_and_indices() -> list[Tensor]:
    generator = np.random.RandomState(0)
    masks = [numpy_mask(generator).astype(bool) for _ in range(CLIPS)]
    visible, masked = [np.flatnonzero(~mask) for mask in masks], [np.flatnonzero(mask) for mask in masks]
    return [torch.from_numpy(np.stack(parts)) for parts in (masks, visible, masked)]


def facts(results: Iterable[Tensor]) -> list[Tensor]:
    """What all masks have in common: the count in every slice, being tubes, and indices that say the same."""
    mask, *indices = results
    mask = mask.bool()
    mask_btp = mask.view(CLIPS, GRID[0], POSITIONS)
    fit = all(
        torch.equal(mask.gather(1, index), torch.full_like(index, value, dtype=torch.bool))
        for value, index in enumerate(indices)
    )
    return [mask_btp.sum(2), (mask_btp == mask_btp[:, :1]).all(), torch.tensor(fit)]


def test_tube_mask(compare):
    samples = torch.arange(CLIPS, device=compare.device)

    def plain() -> TubeMask:
        with use_impl("reference"):
            return tube_mask(0, 0, samples, GRID, RATIO)

    def ours() -> TubeMask:
        return tube_mask(0, 0, samples, GRID, RATIO)

    assert all(torch.equal(*pair) for pair in zip(ours(), plain(), strict=True))
    compare(
        f"tube_mask {CLIPS} clips",
        {
            "ours": ours,
            "NumPy loop": numpy_masks,
            "NumPy + indices": numpy_masks_and_indices,
            "plain PyTorch": plain,
        },
        bytes=CLIPS * GRID[0] * POSITIONS * (1 + 8),
        tolerance=0,
        goal=20.0,
        facts=facts,
    )

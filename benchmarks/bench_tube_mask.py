"""tube_mask for 1024 clips at once: against the NumPy loop of a data loader, and against plain PyTorch.

The loop is what the authors of MVD and VideoMAE do for every sample: shuffle one slice's zeros and ones, tile it over
time. Its masks are other masks, as NumPy's generator draws them; what can be compared is how many there are of what.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from harness import DEVICE, Case
from torch import Tensor

from mvd_kernels import TubeMask, tube_mask, use_impl
from mvd_kernels.shapes import GRID, MASK_RATIO, MASKED, TOKENS

CLIPS = 1024
POSITIONS = GRID[1] * GRID[2]


def numpy_mask(generator: np.random.RandomState) -> np.ndarray:
    """One sample's mask, float64 [N] of zeros and ones."""
    masked = MASKED // GRID[0]
    slice_p = np.hstack([np.zeros(POSITIONS - masked), np.ones(masked)])
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


@pytest.fixture(scope="module")
def case() -> Case:
    samples = torch.arange(CLIPS, device=DEVICE)

    def plain() -> TubeMask:
        with use_impl("reference"):
            return tube_mask(0, 0, samples, GRID, MASK_RATIO)

    def ours() -> TubeMask:
        return tube_mask(0, 0, samples, GRID, MASK_RATIO)

    assert all(torch.equal(*pair) for pair in zip(ours(), plain(), strict=True))
    return Case(
        f"tube_mask {CLIPS} clips",
        {
            "ours": ours,
            "NumPy loop": numpy_masks,
            "NumPy + indices": numpy_masks_and_indices,
            "plain PyTorch": plain,
        },
        bytes=CLIPS * TOKENS * (1 + 8),
        reference="NumPy + indices",
        goal=20.0,
        facts=facts,
    )


@pytest.mark.parametrize("side", ["ours", "NumPy loop", "NumPy + indices", "plain PyTorch"])
def test_tube_mask(compare, case, side):
    compare(case, side)

"""Seeded tube masks: a pure function of (seed, epoch, sample), bit-equal on every device.

Shapes: b sample, t time slice, p spatial position of a slice (P = H * W), n token (N = T * P, n = t * P + p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mvd_kernels import shapes
from mvd_kernels._checks import INDEX, Checks
from mvd_kernels._operator import Operator
from mvd_kernels._triton import launch, power_of_2, tl, triton

_CHECKS = Checks(samples=(INDEX, "B"))
_WORD = 0xFFFFFFFF
_SIGN = -(2**63)
_KEYS_PER_STEP = 32  # keys that the Triton kernel compares with all others at once


class TubeMask(NamedTuple):
    """Masks of a batch and the token indices they stand for, ascending."""

    mask: Tensor  # bool [B, N], True = masked
    visible: Tensor  # int64 [B, Nv]
    masked: Tensor  # int64 [B, Nm]


# ---- what it gives ----


def _outputs(
    seed: int, epoch: int, samples: Tensor, slices: int, positions: int, masked: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch = samples.shape[0]
    return (
        samples.new_empty(batch, slices * positions, dtype=torch.bool),
        samples.new_empty(batch, slices * (positions - masked)),
        samples.new_empty(batch, slices * masked),
    )


# ---- reference ----


def _philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox-4x32-10 (Salmon et al., SC 2011) of four 32-bit words, held in int64 tensors that broadcast."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap into negative int64; masking after the shift gives the unsigned halves.
        even, odd = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = (odd >> 32 & _WORD) ^ x1 ^ k0, odd & _WORD
        x2, x3 = (even >> 32 & _WORD) ^ x3 ^ k1, even & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return [x0, x1, x2, x3]


def _reference(seed, epoch, samples, slices, positions, masked) -> tuple[Tensor, Tensor, Tensor]:
    position_p = torch.arange(positions, device=samples.device)
    sample_b1 = samples[:, None]
    counter = (position_p, sample_b1 & _WORD, sample_b1 >> 32 & _WORD, torch.full_like(position_p, epoch))
    x0, x1, _, _ = _philox(counter, (seed & _WORD, seed >> 32 & _WORD))
    # Flipping the top bit turns unsigned order into signed order; a stable sort breaks ties by position.
    order_bp = ((x0 | x1 << 32) ^ _SIGN).sort(dim=1, stable=True).indices
    masked_bp, visible_bp = (part.sort(dim=1).values for part in order_bp.split((masked, positions - masked), dim=1))
    mask_bp = torch.zeros_like(order_bp, dtype=torch.bool).scatter_(1, masked_bp, True)
    start_t1 = torch.arange(slices, device=samples.device)[:, None] * positions
    return (
        mask_bp.repeat(1, slices),
        (start_t1 + visible_bp[:, None]).flatten(1),
        (start_t1 + masked_bp[:, None]).flatten(1),
    )


# ---- Triton: one program per sample ----


@triton.jit
def _key(seed, epoch, sample, position):
    """64-bit sort keys of `position` (int32), which is uint64 as the order is unsigned."""
    zero = position * 0
    low = zero + sample.to(tl.int32)
    high = zero + (sample >> 32).to(tl.int32)
    x0, x1, _, _ = tl.philox(seed, position, low, high, zero + epoch.to(tl.int32))
    return x0.to(tl.uint64) | (x1.to(tl.uint64) << 32)


@triton.jit(do_not_specialize=["seed", "epoch"])
def _tube_mask_kernel(
    samples_ptr,
    mask_ptr,
    visible_ptr,
    masked_ptr,
    seed,
    epoch,
    SLICES: tl.constexpr,
    POSITIONS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    sample = tl.load(samples_ptr + b)
    seed = seed.to(tl.int64)
    epoch = epoch.to(tl.int64)
    p = tl.arange(0, BLOCK)
    inside = p < POSITIONS
    key_p = _key(seed, epoch, sample, p)

    rank_p = tl.zeros([BLOCK], tl.int32)  # how many positions come before p
    for start in range(0, POSITIONS, STEP):
        q = start + tl.arange(0, STEP)
        key_q = _key(seed, epoch, sample, q)
        before = (key_q[None, :] < key_p[:, None]) | ((key_q[None, :] == key_p[:, None]) & (q[None, :] < p[:, None]))
        rank_p += tl.sum((before & (q[None, :] < POSITIONS)).to(tl.int32), axis=1)

    is_masked = inside & (rank_p < MASKED)
    is_visible = inside & (rank_p >= MASKED)
    # Place among its kind, in ascending order of position.
    masked_place = tl.cumsum(is_masked.to(tl.int32), 0) - 1
    visible_place = tl.cumsum(is_visible.to(tl.int32), 0) - 1
    VISIBLE: tl.constexpr = POSITIONS - MASKED
    for t in range(SLICES):
        token = (t * POSITIONS + p).to(tl.int64)
        tl.store(mask_ptr + b * SLICES * POSITIONS + token, is_masked, mask=inside)
        tl.store(visible_ptr + (b * SLICES + t) * VISIBLE + visible_place, token, mask=is_visible)
        tl.store(masked_ptr + (b * SLICES + t) * MASKED + masked_place, token, mask=is_masked)


def _launch(seed, epoch, samples, slices, positions, masked):
    outputs = _outputs(seed, epoch, samples, slices, positions, masked)
    if samples.numel():
        block = power_of_2(positions)
        sizes = {"SLICES": slices, "POSITIONS": positions, "MASKED": masked, "BLOCK": block, "STEP": _KEYS_PER_STEP}
        arguments = (samples.contiguous(), *outputs, seed, epoch)
        launch(_tube_mask_kernel, (samples.numel(),), *arguments, flops=0, moves=outputs, **sizes)
    return outputs


def offline_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    samples = torch.empty(32, dtype=torch.int64, device="meta")
    slices, positions = shapes.GRID[0], shapes.GRID[1] * shapes.GRID[2]
    clips, images = (slices, shapes.MASK_RATIO), (1, shapes.IMAGE_MASK_RATIO)
    for name, (slices, ratio) in {"224 px clips": clips, "224 px images": images}.items():
        yield name, partial(_launch, 0, 0, samples, slices, positions, int(ratio * positions))


# ---- declaration ----

_operator = Operator("tube_mask", _outputs, reference=_reference, cpp=True, triton=_launch, like="samples")


# ---- public ----


def masked_per_slice(grid: Sequence[int], ratio: float) -> int:
    """Positions masked in every time slice: `int(ratio * H * W)` of a token grid (T, H, W).

    Raises:
        ValueError: if the grid is not three positive integers or the ratio is not in [0, 1].
    """
    if len(grid) != 3 or any(size < 1 for size in grid):
        raise ValueError(f"grid is {tuple(grid)}; it must be three positive integers: tokens along time, height, width")
    if not 0 <= ratio <= 1 or math.isnan(ratio):
        raise ValueError(f"ratio is {ratio}; it must be between 0 (nothing masked) and 1 (everything masked)")
    return int(ratio * (grid[1] * grid[2]))


def tube_mask(
    seed: int,
    epoch: int,
    samples: Tensor,
    grid: tuple[int, int, int],
    ratio: float,
    device: torch.device | str | None = None,
) -> TubeMask:
    """Tube masks (VideoMAE, arXiv 2203.12602): one random 2-D mask per sample, the same in every time slice.

    The mask of a sample depends on (seed, epoch, sample) alone: not on the batch around it, the device or any random
    state. Position p of a slice has as key the 64-bit word x0 | x1 << 32 of Philox-4x32-10 (Salmon et al., SC 2011)
    under the 64-bit seed (low word first) and the counter (p, sample low word, sample high word, epoch); the
    `int(ratio * H * W)` positions with the smallest (key, p), unsigned, are masked. So the visible count is the same
    for every sample.

    Args:
        seed: of the run, 0 <= seed < 2**63.
        epoch: 0 <= epoch < 2**32; another epoch gives independent masks.
        samples: int64 [B], a number for each sample, e.g. its position in the data set.
        grid: tokens along time, height and width (T, H, W); N = T * H * W.
        ratio: share of masked positions, 0 to 1.
        device: where to compute; by default where `samples` is.

    Returns:
        mask: bool [B, N], True = masked; visible: int64 [B, Nv] and masked: int64 [B, Nm], token indices, ascending.

    Raises:
        ValueError: if an argument is outside what is said above.
    """
    masked = masked_per_slice(grid, ratio)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**63")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch is {epoch}; it must be at least 0 and below 2**32")
    _CHECKS(samples)
    if device is not None:
        samples = samples.to(device)
    slices, height, width = grid
    return TubeMask(*_operator(seed, epoch, samples, slices, height * width, masked))

"""Tubes, masks and the embedding of a subset of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mvd_fast.errors import UserError
from mvd_fast.models.layers import LN_EPS, DropPath, TubeletEmbed, make_blocks, run_blocks
from mvd_fast.models.positions import sincos_2d, sincos_3d
from mvd_fast.models.student import MaskedVideoStudent
from mvd_fast.models.tokens import paste_tubes, split_mask, take_tokens, tubes

SHAPE = {"image_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}


def random_index(batch: int, tokens: int, count: int) -> torch.Tensor:
    return torch.rand(batch, tokens).argsort(1)[:, :count].sort(1).values


def test_embedding_equals_the_convolution() -> None:
    embed = TubeletEmbed(24, 2, 8).double()
    video = torch.randn(3, 3, 4, 32, 48, dtype=torch.float64)
    pos = torch.randn(1, 48, 24, dtype=torch.float64)
    expected = embed.proj(video).flatten(2).transpose(1, 2) + pos
    torch.testing.assert_close(embed(video, pos), expected)
    index = random_index(3, expected.shape[1], 7)
    torch.testing.assert_close(embed(video, pos, index), take_tokens(expected, index))


def test_pasting_tubes_back_is_the_inverse() -> None:
    video = torch.randn(2, 3, 4, 32, 32)
    index = random_index(2, 32, 11)
    blank = paste_tubes(video, torch.zeros(()), index, 2, 8)
    assert torch.equal(tubes(blank, 2, 8, index), torch.zeros(2, 11, 3, 2, 8, 8))
    assert torch.equal(paste_tubes(blank, tubes(video, 2, 8, index), index, 2, 8), video)


def test_split_mask_is_ascending_and_complete() -> None:
    mask = torch.zeros(3, 10, dtype=torch.bool).scatter_(1, random_index(3, 10, 6), True)
    visible, masked = split_mask(mask)
    assert visible.shape == (3, 4) and masked.shape == (3, 6)
    assert (visible.diff(dim=1) > 0).all() and (masked.diff(dim=1) > 0).all()
    assert mask.gather(1, masked).all() and not mask.gather(1, visible).any()
    assert all(torch.equal(a, b) for a, b in zip(split_mask(mask, 4), (visible, masked), strict=True))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(2, 4), "must be bool"),
        (torch.tensor([[True, False], [True, True]]), r"same number visible, got \[1, 0\]"),
    ],
)
def test_bad_masks_are_refused(mask: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_mask(mask)


def test_bad_clips_are_refused() -> None:
    student = MaskedVideoStudent(**SHAPE, embed_dim=32, depth=1, num_heads=2, decoder_dim=32, decoder_depth=1,
                                 decoder_heads=2, image_target_dim=8, video_target_dim=8)  # fmt: skip
    with pytest.raises(ValueError, match=r"video must be \[B, 3, 4, 32, 32\], got \[1, 3, 4, 32, 40\]"):
        student(torch.zeros(1, 3, 4, 32, 40), torch.zeros(1, 32, dtype=torch.bool))


def test_drop_path_keeps_the_mean_and_is_off_in_eval() -> None:
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(4000, 2, 3)
    scale = layer(x)
    assert scale.shape == (4000,) and scale.dtype == torch.float32
    assert scale.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert scale.mean().item() == pytest.approx(1.0, abs=0.05)
    assert layer.eval()(x) is None


@pytest.mark.parametrize("recompute", [False, True])
def test_pending_additions_change_nothing(recompute: bool) -> None:
    """Blocks whose last addition is left to the next LayerNorm equal the plain formula, drop path included."""
    blocks = make_blocks(32, 3, 2, drop_path=0.5).double().train()
    x = torch.randn(6, 5, 32, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    actual = run_blocks(blocks, x, recompute)
    torch.manual_seed(0)
    expected = x
    for block in blocks:
        for norm, branch in ((block.norm1, block.attn), (block.norm2, block.mlp)):
            added = branch(F.layer_norm(expected, (32,), norm.weight, norm.bias, LN_EPS))
            scale = block.drop_path(expected)
            expected = expected + (added if scale is None else added * scale[:, None, None])
    torch.testing.assert_close(actual.sum(), expected)
    torch.manual_seed(0)
    torch.testing.assert_close(run_blocks(blocks, x, recompute, outputs=2).sum(), expected[:, 3:])
    gradient = torch.randn_like(expected)
    ours, plain = (torch.autograd.grad(y, x, gradient)[0] for y in (actual.sum(), expected))
    torch.testing.assert_close(ours, plain)


def test_empty_batch() -> None:
    student = MaskedVideoStudent(**SHAPE, embed_dim=32, depth=1, num_heads=2, decoder_dim=32, decoder_depth=1,
                                 decoder_heads=2, image_target_dim=8, video_target_dim=9)  # fmt: skip
    image, video = student(torch.zeros(0, 3, 4, 32, 32), torch.zeros(0, 32, dtype=torch.bool), num_visible=4)
    assert image.shape == (0, 28, 8) and video.shape == (0, 28, 9)


def test_widths_that_tables_cannot_have_are_refused() -> None:
    with pytest.raises(UserError, match="3-D sin-cos table needs a width that is a multiple of 16, got 120"):
        sincos_3d(120, 2, 2, 2)
    with pytest.raises(UserError, match="2-D sin-cos table needs a width that is a multiple of 4, got 5"):
        sincos_2d(5, 2, 2)

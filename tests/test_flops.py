"""Counted FLOP against torch's own counter and against the published table."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mvd_fast.config import OF_FINE_TUNING
from mvd_fast.config_file import load_config
from mvd_fast.models import ImageTeacher, MaskedAutoencoder, MaskedVideoStudent, VideoMAE, VideoTeacher
from mvd_fast.models.layers import block_flops
from mvd_kernels import use_impl

ENCODER = {"embed_dim": 48, "depth": 3, "num_heads": 3}
DECODER = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}
IMAGE = {"image_size": 64, "patch_size": 16}
CLIP = {**IMAGE, "num_frames": 8, "tubelet_size": 2}


def counted(call) -> int:
    """Matrix products of a call, multiply-adds as 2; in plain PyTorch, which the counter sees through."""
    with use_impl("reference"), FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def mask(slices: int) -> torch.Tensor:
    return (torch.arange(16) < 12).repeat(slices)[None]


def test_counts_equal_torchs() -> None:
    frames, clip = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 8, 64, 64)
    image, video = ImageTeacher(**IMAGE, **ENCODER), VideoTeacher(**CLIP, **ENCODER)
    assert image.flops() == counted(lambda: image(frames))
    assert video.flops() == counted(lambda: video(clip))
    mae, videomae = MaskedAutoencoder(**IMAGE, **ENCODER, **DECODER), VideoMAE(**CLIP, **ENCODER, **DECODER)
    assert mae.training_flops(4) == counted(lambda: mae(frames, mask(1)))
    assert videomae.training_flops(16) == counted(lambda: videomae(clip, mask(4)))
    student = MaskedVideoStudent(**CLIP, **ENCODER, **DECODER, image_target_dim=40, video_target_dim=24)
    assert student.flops(16) == counted(lambda: student(clip, mask(4)))
    assert student.flops(16, 5) == counted(lambda: student(clip, mask(4), num_predicted=5))


def test_vitb_recipe_costs_what_the_method_says() -> None:
    """GFLOP per clip of B <- B: image teacher 280, video teacher 357, student and decoders with backward 84 and 367;
    the published table rounds and leaves the patch embeddings out, and computes visible rows that are thrown away."""
    config = load_config("vitb_from_vitb")
    size = config.model.model_dump(exclude={"kind", *OF_FINE_TUNING})
    with torch.device("meta"):
        student = MaskedVideoStudent(**size, image_target_dim=768, video_target_dim=768)
        image, video = ImageTeacher(224, 16, 768, 12, 12), VideoTeacher(224, 16, 16, 2, 768, 12, 12)
    assert 8 * image.flops() == pytest.approx(280e9, rel=0.02)
    assert video.flops() == pytest.approx(357e9, rel=0.02)
    saved = 2 * (block_flops(1568, 768) - block_flops(1568, 768, 1568 - config.num_visible))
    assert 3 * (student.flops(config.num_visible) + saved) == pytest.approx(451e9, rel=0.02)

"""Weight files: what is read, what is refused, and how it is said."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mvd_fast.config.network import ClipConfig, DecoderConfig, ViTConfig
from mvd_fast.convert.weights import WeightsError, load_into, read_weights
from mvd_fast.models import ImageTeacher, MaskedAutoencoder, VideoMAE
from mvd_fast.targets import build_target, mae, videomae

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}
ENCODER = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = DecoderConfig(dim=32, depth=1, num_heads=2)
CLIP = ClipConfig(**ENCODER, num_frames=8, tubelet_size=2)


class Payload:
    """Stands for anything that a hostile or careless file may pickle."""


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"module": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_containers_and_prefixes(tmp_path: Path, wrap, prefix: str) -> None:
    torch.save(wrap({prefix + k: v for k, v in STATE.items()}), tmp_path / "w.pth")
    state = read_weights(tmp_path / "w.pth")
    assert state.keys() == STATE.keys() and torch.equal(state["weight"], STATE["weight"])


def test_namespace_beside_the_weights_is_accepted(tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == STATE.keys()


def test_what_would_need_unpickling_code_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": STATE, "extra": Payload()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"would run code when loaded: it needs .*test_weights\.Payload"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(STATE, path) if path.suffix == ".safetensors" else torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(WeightsError, match=str(path)):
        read_weights(path)


def test_files_without_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        read_weights(tmp_path / "w.pth")
    (tmp_path / "README.md").write_text("no weights")
    with pytest.raises(WeightsError, match=r"README\.md cannot be read as a PyTorch checkpoint"):
        read_weights(tmp_path / "README.md")
    with pytest.raises(WeightsError, match="does not exist"):
        read_weights(tmp_path / "none.pth")


def test_misfits_are_listed() -> None:
    model = nn.Linear(3, 2)
    wrong = {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        load_into(model, wrong, "some.pth")
    message = str(caught.value)
    assert "some.pth does not fit Linear" in message
    assert (
        "missing: bias" in message and "unexpected: scale" in message and "weight [2, 4] instead of [2, 3]" in message
    )


def test_teachers_take_pre_training_checkpoints(tmp_path: Path) -> None:
    """Stage 1 writes encoder and decoder; the teachers take the encoder, and regenerate positions."""
    autoencoder, video_mae = MaskedAutoencoder(ViTConfig(**ENCODER), DECODER), VideoMAE(CLIP, DECODER)
    state = autoencoder.state_dict() | {"pos_embed": torch.full_like(autoencoder.pos_embed, 7.0)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    save_file(video_mae.state_dict(), tmp_path / "videomae.safetensors")
    image = build_target(mae.Config(checkpoint=str(tmp_path / "mae.pth"), **ENCODER), CLIP, "fp32")
    path = str(tmp_path / "videomae.safetensors")
    video = build_target(videomae.Config(checkpoint=path, **ENCODER), CLIP, "fp32")
    x = torch.randn(2, 3, 8, 32, 32)
    autoencoder.eval()
    expected = [autoencoder.encode(x[:, :, 2 * slice]).sum()[:, 1:] for slice in range(4)]
    torch.testing.assert_close(image(x), torch.cat(expected, 1))
    assert torch.equal(video(x), video_mae.eval().encoder(x))
    assert not image.training and not any(p.requires_grad for p in [*image.parameters(), *video.parameters()])


def test_positions_of_another_size_are_regenerated() -> None:
    small, large = ImageTeacher(**ENCODER), ImageTeacher(**{**ENCODER, "image_size": 48})
    load_into(large, small.state_dict(), "small.pth")
    assert large.pos_embed.shape == (1, 37, 32) and torch.equal(large.cls_token, small.cls_token)

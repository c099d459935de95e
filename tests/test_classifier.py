"""The classifier of a config: how it is built, what it starts from, and how fast its layers learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_probe import save_run, student
from tiny_runs import CLIP, DECODER, ENCODER

from mvd_fast.config.network import ClipConfig, DecoderConfig
from mvd_fast.config.run import FineTuneOptimConfig
from mvd_fast.convert.encoder import load_encoder
from mvd_fast.convert.storage import read_metadata
from mvd_fast.convert.weights import WeightsError
from mvd_fast.models import VideoClassifier, VideoMAE
from mvd_fast.models.layers import run_blocks
from mvd_fast.tasks.classify import ClassifierConfig
from mvd_fast.training.optim import build_optimizer

MODEL = ClassifierConfig(**ENCODER, **CLIP, num_classes=5, drop_path=0.2, head_dropout=0.5)


def classifier(**changes) -> VideoClassifier:
    torch.manual_seed(7)
    model = MODEL.replaced(**changes)
    return VideoClassifier(model, model.num_classes, model.head_dropout)


def test_sizes_of_the_classifier() -> None:
    model = classifier()
    assert model.head.weight.shape == (5, 32) and model.dropout.p == 0.5
    assert [block.drop_path.rate for block in model.blocks] == [0.0, 0.2]
    assert model.head.weight.abs().max() < 1e-3  # init scale
    assert model.flops() > 0


def test_layers_learn_the_more_slowly_the_lower_they_are() -> None:
    model = classifier()
    optimizer = build_optimizer(model, FineTuneOptimConfig(epochs=1, warmup_epochs=0, layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    found = {name: scale[id(named[name])] for name in ("patch_embed.proj.weight", "blocks.0.norm1.bias", "head.bias")}
    assert found == {"patch_embed.proj.weight": 0.125, "blocks.0.norm1.bias": 0.25, "head.bias": 1.0}
    assert {id(p) for p in model.parameters()} == set(scale)


@pytest.mark.parametrize("other", ["run", "checkpoint file", "classifier"])
def test_starts_from_an_encoder(tmp_path: Path, other: str) -> None:
    """The encoder is the checkpoint's; fc_norm and head stay fresh, and so does nothing else."""
    source = VideoClassifier(ClipConfig(**ENCODER, **CLIP), 9) if other == "classifier" else student()
    run = save_run(tmp_path / "run", source, "classify" if other == "classifier" else "distill")
    model, before = classifier(), classifier().state_dict()
    load_encoder(model, run / "model.safetensors" if other == "checkpoint file" else run)
    theirs = source.state_dict()
    for name, value in model.state_dict().items():
        fresh = name.startswith(("fc_norm.", "head."))
        assert torch.equal(value, before[name] if fresh else theirs[name]), name
    video = torch.randn(1, 3, 8, 32, 32)
    if other == "classifier":
        torch.testing.assert_close(model.eval().features(video), source.eval().features(video))
    else:  # positions are the student's, too
        tokens = run_blocks(source.blocks, source.patch_embed(video, source.pos_embed)).sum()
        torch.testing.assert_close(model.eval().features(video), model.fc_norm(tokens.mean(1)))


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", student(), "distill")
    with pytest.raises(WeightsError, match=r"does not fit VideoClassifier: unexpected: blocks\.1"):
        load_encoder(classifier(depth=1), run)
    with pytest.raises(WeightsError, match=r"has 2 attention heads, model\.num_heads is 4"):
        load_encoder(classifier(num_heads=4), run)
    videomae = save_run(
        tmp_path / "videomae", VideoMAE(ClipConfig(**ENCODER, **CLIP), DecoderConfig(**DECODER)), "videomae"
    )
    with pytest.raises(WeightsError, match="positions that VideoClassifier adds are 3-D"):
        load_encoder(classifier(), videomae)
    state = {name: value.clone() for name, value in student().state_dict().items()}
    del state["blocks.1.mlp.fc2.weight"]
    save_file(state, run / "model.safetensors", read_metadata(run / "model.safetensors"))
    with pytest.raises(WeightsError, match=r"the encoder is not complete: blocks\.1\.mlp\.fc2\.weight"):
        load_encoder(classifier(), run)

"""Our networks and tasks against numbers computed with the authors' implementations (float32, CPU).

Tolerances: outputs and losses within 1e-5 relative, gradients within 1e-4 of the largest entry.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yardstick
from safetensors.torch import load_file

from mvd_fast.models import (
    ClipConfig,
    DecoderConfig,
    ImageTeacher,
    MaskedAutoencoder,
    MaskedVideoStudent,
    TargetDecoder,
    VideoClassifier,
    VideoMAE,
    VideoTeacher,
    ViTConfig,
)
from mvd_fast.tasks._pixels import PixelTask
from mvd_fast.tasks.distill import DistilledStudent, distillation
from mvd_fast.training.optim import is_decayed, layer_scale, parameter_groups

DATA = Path(__file__).parent / "data"
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
# student: teacher width, decoder width/depth/heads
DECODERS = {"small": (768, 384, 2, 6), "base": (768, 768, 2, 12), "large": (1024, 512, 4, 8), "huge": (1280, 640, 8, 8)}


def load(name: str) -> tuple[dict, dict]:
    return json.loads((DATA / f"{name}.json").read_text()), load_file(DATA / f"{name}.safetensors")


def sub(tensors: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}


def assert_rows_close(actual: torch.Tensor, expected: torch.Tensor, rel: float = 1e-5) -> None:
    """Largest error against the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rel * expected.abs().max()


def assert_grads(model: torch.nn.Module, expected: dict) -> None:
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, grad in grads.items():
        assert (grad - expected[name]).abs().max() <= 1e-4 * largest, name


@pytest.fixture
def mvd():
    facts, tensors = load("mvd_step")
    c = facts["config"]
    shape = {"image_size": 64, "patch_size": 16, "num_frames": 16, "tubelet_size": 2}
    s = c["student"]
    student = DistilledStudent(
        **shape,
        embed_dim=s["embed_dim"],
        depth=s["depth"],
        num_heads=s["num_heads"],
        decoder_dim=s["decoder_embed_dim"],
        decoder_depth=s["decoder_depth"],
        decoder_heads=s["decoder_num_heads"],
        image_target_dim=c["image_teacher"]["embed_dim"],
        video_target_dim=c["video_teacher"]["embed_dim"],
    )
    image_teacher = ImageTeacher(image_size=64, patch_size=16, **c["image_teacher"])
    video_teacher = VideoTeacher(**shape, **c["video_teacher"])
    student.load_state_dict(sub(tensors, "student"), strict=True)
    image_teacher.load_state_dict(sub(tensors, "image_teacher"), strict=True)
    video_teacher.load_state_dict(sub(tensors, "video_teacher"), strict=True)
    batch = {"video": tensors["video"].float(), "mask": tensors["mask"]}
    return facts, tensors, batch, student, image_teacher, video_teacher


def test_mvd_predictions_and_targets(mvd) -> None:
    _, tensors, batch, student, image_teacher, video_teacher = mvd
    pred_image, pred_video = student.predict(batch["video"], batch["mask"])
    assert_rows_close(pred_image, tensors["pred_image"])
    assert_rows_close(pred_video, tensors["pred_video"])
    found = distillation(student, image_teacher, video_teacher).with_targets(batch)
    assert_rows_close(found["target_image"], tensors["image_teacher_features"])
    assert_rows_close(found["target_video"], tensors["video_teacher_features"])


def test_fresh_position_tables_are_the_references(mvd) -> None:
    tensors = mvd[1]
    clip = ClipConfig(image_size=64, embed_dim=48, depth=1, num_heads=3)
    decoder = {"dim": 32, "depth": 1, "num_heads": 2}
    widths = {"image": 32, "video": 40}
    decoders = [TargetDecoder(target=name, target_dim=width, **decoder) for name, width in widths.items()]
    fresh = MaskedVideoStudent(clip, decoders)
    for name in ("pos_embed", "pos_embed_img", "pos_embed_vid"):
        assert_rows_close(getattr(fresh, name), tensors[f"student.{name}"], 1e-6)


@pytest.mark.parametrize(("kind", "normalize"), [("raw", False), ("norm", True)])
def test_mvd_losses_gradients_and_three_steps(mvd, kind: str, normalize: bool) -> None:
    facts, tensors, batch, student, image_teacher, video_teacher = mvd
    task = distillation(student, image_teacher, video_teacher, normalize_targets=normalize)
    optimizer = torch.optim.AdamW(parameter_groups(student.named_parameters(), 0.05), betas=(0.9, 0.95), eps=1e-8)
    for number, step in enumerate(facts[kind]["steps"]):
        out = task(batch)
        assert out["loss"].item() == pytest.approx(step["total"], rel=1e-5)
        assert out["loss_image"].item() == pytest.approx(step["image"], rel=1e-5)
        assert out["loss_video"].item() == pytest.approx(step["video"], rel=1e-5)
        optimizer.zero_grad()
        out["loss"].backward()
        if number == 0:
            assert_grads(student, sub(tensors, f"grad_{kind}"))
            norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.requires_grad])
            assert norm.item() == pytest.approx(facts[kind]["grad_norm_step0"], rel=1e-5)
        for group in optimizer.param_groups:
            group["lr"] = step["lr"]
        optimizer.step()
    for name, value in sub(tensors, f"after3_{kind}").items():
        # AdamW divides by the root of squared gradients: entries whose gradient is rounding noise may move by lr.
        close = (student.state_dict()[name] - value).abs() <= 1e-4 * value.abs().max()
        assert close.float().mean() > 0.999, name


@pytest.mark.parametrize(("kind", "normalize"), [("raw", False), ("norm", True)])
def test_the_benchmarks_yardstick_computes_the_same(mvd, kind: str, normalize: bool) -> None:
    facts, tensors, batch, student, image_teacher, video_teacher = mvd
    task = distillation(student, image_teacher, video_teacher, normalize_targets=normalize)
    out = yardstick.distillation_losses(task, batch)
    step = facts[kind]["steps"][0]
    expected = {"loss": step["total"], "loss_image": step["image"], "loss_video": step["video"]}
    assert {name: part.item() for name, part in out.items()} == pytest.approx(expected, rel=1e-5)
    out["loss"].backward()
    assert_grads(student, sub(tensors, f"grad_{kind}"))


def test_no_weight_decay_on_the_references_set(mvd) -> None:
    facts, _, _, student, *_ = mvd
    ours = sorted(n for n, p in student.named_parameters() if p.requires_grad and not is_decayed(n, p))
    assert ours == sorted(facts["no_weight_decay"])


def test_teachers_stay_frozen_and_in_eval(mvd) -> None:
    _, _, batch, student, image_teacher, video_teacher = mvd
    task = distillation(student, image_teacher, video_teacher).train()
    task(batch)["loss"].backward()
    assert student.training and not image_teacher.training and not video_teacher.training
    assert all(p.grad is None for p in [*image_teacher.parameters(), *video_teacher.parameters()])


def test_videomae() -> None:
    facts, tensors = load("videomae_step")
    c = facts["config"]
    d = c["decoder"]
    decoder = DecoderConfig(dim=d["embed_dim"], depth=d["depth"], num_heads=d["num_heads"])
    model = VideoMAE(ClipConfig(image_size=64, **c["encoder"]), decoder)
    model.load_state_dict(sub(tensors, "model"), strict=True)
    batch = {"video": tensors["video"].float(), "mask": tensors["mask"]}
    assert_rows_close(model(**batch), tensors["pred"])
    loss = PixelTask(model, "video")(batch)["loss"]
    assert loss.item() == pytest.approx(facts["loss"], rel=1e-5)
    loss.backward()
    assert_grads(model, sub(tensors, "grad"))


def test_mae() -> None:
    facts, tensors = load("mae_step")
    c = facts["config"]
    encoder = ViTConfig(image_size=64, embed_dim=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"])
    sizes = {"dim": "decoder_embed_dim", "depth": "decoder_depth", "num_heads": "decoder_num_heads"}
    model = MaskedAutoencoder(encoder, DecoderConfig(**{name: c[theirs] for name, theirs in sizes.items()}))
    model.load_state_dict(sub(tensors, "model"), strict=True)
    mask = tensors["mask"]
    batch = {"image": tensors["image"].float(), "mask": mask}
    expected = tensors["pred"][mask].unflatten(0, (len(mask), -1))
    assert_rows_close(model(batch["image"], mask), expected)
    loss = PixelTask(model, "image")(batch)["loss"]
    assert loss.item() == pytest.approx(facts["loss"], rel=1e-5)
    loss.backward()
    assert_grads(model, sub(tensors, "grad"))


def test_classifier() -> None:
    facts, tensors = load("finetune")
    model = VideoClassifier(ClipConfig(image_size=64, embed_dim=48, depth=3, num_heads=3), num_classes=11)
    model.load_state_dict(sub(tensors, "model"), strict=True)
    logits = model(tensors["video"].float())
    assert_rows_close(logits, tensors["logits"])
    loss = F.cross_entropy(logits, tensors["labels"], label_smoothing=facts["label_smoothing"])
    assert loss.item() == pytest.approx(facts["loss"], rel=1e-5)
    loss.backward()
    assert_grads(model, sub(tensors, "grad"))
    scale = layer_scale(depth=3, decay=facts["layer_decay"])
    assert {n: scale(n) for n, _ in model.named_parameters()} == pytest.approx(facts["lr_scale"])


def _network(name: str):
    kind, size = name.rsplit("_", 1)
    dim, depth, heads = SIZES[size]
    clip = {"image_size": 224, "patch_size": 16, "num_frames": 16, "tubelet_size": 2}
    if kind == "image_teacher":
        image, patch = (196, 14) if size == "huge" else (224, 16)
        return ImageTeacher(image_size=image, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads)
    if kind == "video_teacher":
        return VideoTeacher(**clip, embed_dim=dim, depth=depth, num_heads=heads)
    if kind == "classifier":
        return VideoClassifier(ClipConfig(**clip, embed_dim=dim, depth=depth, num_heads=heads), num_classes=400)
    target, decoder_dim, decoder_depth, decoder_heads = DECODERS[size]
    return MaskedVideoStudent(
        **clip, embed_dim=dim, depth=depth, num_heads=heads, decoder_dim=decoder_dim, decoder_depth=decoder_depth,
        decoder_heads=decoder_heads, image_target_dim=target, video_target_dim=target,
    )  # fmt: skip


@pytest.mark.parametrize("name", json.loads((DATA / "checkpoint_keys.json").read_text()))
def test_names_and_shapes_of_every_size(name: str) -> None:
    facts = json.loads((DATA / "checkpoint_keys.json").read_text())[name]
    with torch.device("meta"):
        model = _network(name)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == facts["shapes"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == facts["trainable"]

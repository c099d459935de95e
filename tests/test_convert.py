"""`mvd-fast convert`: recognition, names, outputs against transformers and timm, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mvd_fast import cli
from mvd_fast.convert import convert as conversion
from mvd_fast.convert import layouts
from mvd_fast.convert.convert import convert
from mvd_fast.convert.network import check, recognise
from mvd_fast.convert.storage import Source
from mvd_fast.convert.tables import identify, make_table, resize
from mvd_fast.convert.weights import read_weights
from mvd_fast.models import ClipConfig, DecoderConfig, ImageTeacher, MaskedVideoStudent, VideoClassifier, VideoMAE
from mvd_fast.models.videomae import VideoEncoder

DATA = Path(__file__).parent / "data"
KEYS = json.loads((DATA / "checkpoint_keys.json").read_text())
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
DECODERS = {"small": (384, 2), "base": (768, 2), "large": (512, 4), "huge": (640, 8)}

SHAPE = {"image_size": 32, "patch_size": 8, "num_frames": 8, "tubelet_size": 2}
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
DECODER = DecoderConfig(dim=32, depth=1, num_heads=2)
DECODERS_OF_STUDENT = tiny_runs.two_decoders(40, 56, dim=32, depth=1, num_heads=2)


def jittered(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with no parameter at zero or one; tables stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def student(**changes) -> MaskedVideoStudent:
    return jittered(MaskedVideoStudent(**{**SHAPE, **VIT, **DECODERS_OF_STUDENT, **changes}))


def videomae(**changes) -> VideoMAE:
    return jittered(VideoMAE(ClipConfig(**{**SHAPE, **VIT, **changes}), DECODER))


def classifier(positions: str = "3d", **changes) -> VideoClassifier:
    model = jittered(VideoClassifier(ClipConfig(**{**SHAPE, **VIT, **changes}), num_classes=5, head_scale=1.0))
    if positions == "1d":
        model.positions.copy_(make_table("1d", 48, (4, 4, 4), False))
    return model


def image_vit() -> ImageTeacher:
    return jittered(ImageTeacher(image_size=32, patch_size=8, **VIT))


def clip(size: int = 32, frames: int = 8) -> Tensor:
    return torch.randn(2, 3, frames, size, size, generator=torch.Generator().manual_seed(7))


def saved(model: nn.Module | dict, path: Path) -> Path:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"model": state}, path)
    return path


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def golden(name: str) -> tuple[dict, dict[str, Tensor]]:
    facts, tensors = json.loads((DATA / f"{name}.json").read_text()), load_file(DATA / f"{name}.safetensors")
    return facts, tensors


def sub(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


# ---- what it is ----


def recognised(state: dict[str, Tensor], **facts):
    _, ours, implied = conversion._read(Source(Path("x.pth"), state))
    return check(recognise(ours, {**implied, **facts}, "x.pth"))


@pytest.mark.parametrize("name", KEYS)
def test_every_size_of_the_reference_is_recognised_from_shapes_alone(name: str) -> None:
    kind, size = name.rsplit("_", 1)
    shapes = {key: torch.empty(shape, device="meta") for key, shape in KEYS[name]["shapes"].items()}
    network, faults = recognised(shapes, **({"positions": "3d"} if kind == "classifier" else {}))
    assert faults.lines() == [] and len(network.state) == len(shapes)
    dim, depth, heads = SIZES[size]
    s = network.sizes
    assert (s.embed_dim, s.depth, s.num_heads) == (dim, depth, heads)
    image = (196, 14, 1, 1) if size == "huge" else (224, 16, 1, 1)
    expected = image if kind == "image_teacher" else (224, 16, 16, 2)
    assert (s.image_size, s.patch_size, s.num_frames, s.tubelet_size) == expected
    kinds = {"student": "student", "classifier": "classifier", "image_teacher": "mae", "video_teacher": "encoder"}
    assert network.kind == kinds[kind]
    assert network.positions == {"video_teacher": "1d", "image_teacher": "2d"}.get(kind, "3d")
    assert s.num_classes == (400 if kind == "classifier" else 0)
    if kind == "student":
        teacher = 768 if size == "small" else dim
        found = [(decoder.target, decoder.dim, decoder.depth, decoder.target_dim) for decoder in s.decoders]
        assert found == [(name, *DECODERS[size], teacher) for name in ("image", "video")]
    assert f"ViT-{size[0].upper()}" in network.describe()


def test_pre_training_networks_with_decoders_are_recognised() -> None:
    facts, tensors = golden("mae_step")
    network, faults = recognised(sub(tensors, "model"), num_heads=4)
    assert (network.kind, network.positions, faults.lines()) == ("mae", "2d", [])
    assert (network.sizes.decoder_dim, network.sizes.decoder_depth, network.sizes.image_size) == (32, 2, 64)
    facts, tensors = golden("videomae_step")
    network, faults = recognised(sub(tensors, "model"), num_heads=3)
    assert (network.kind, network.positions, faults.lines()) == ("videomae", "1d", [])
    assert network.sizes.decoder_dim == facts["config"]["decoder"]["embed_dim"]


@pytest.mark.parametrize("grid", [(4, 4, 4), (1, 8, 8), (2, 6, 6), (16, 2, 2)])
def test_the_table_tells_the_grid(grid) -> None:
    """4 x 4 x 4, 1 x 8 x 8 and 16 x 2 x 2 have equal numbers of tokens."""
    assert identify(make_table("3d", 48, grid, False), False, slices=8) == ("3d", grid)
    assert identify(torch.randn(1, 1 + 36, 48), True, slices=8) == ("learned", (1, 6, 6))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "backbone.", "encoder.", "module._orig_mod.encoder."])
@pytest.mark.parametrize("container", ["model", "module"])
def test_containers_and_prefixes(tmp_path: Path, prefix: str, container: str) -> None:
    state = student().state_dict()
    torch.save({container: {prefix + name: value for name, value in state.items()}}, tmp_path / "s.pth")
    convert(tmp_path / "s.pth", tmp_path / "out.safetensors", "mvd", heads=3)
    assert_same(load_file(tmp_path / "out.safetensors"), state)


# ---- there and back, bit for bit ----


@pytest.mark.parametrize(
    ("model", "options", "way"),
    [
        (student, {}, ["mvd", "mvd.pth"]),
        (student, {}, ["timm", "mvd"]),
        (student, {}, ["hf", "timm", "hf", "mvd.pth"]),
        (videomae, {}, ["videomae.pth", "videomae"]),
        (videomae, {}, ["hf", "videomae"]),
        (videomae, {}, ["mvd", "timm", "videomae"]),
        (classifier, {"positions": "3d"}, ["hf", "timm", "mvd"]),
        (lambda: classifier("1d"), {"positions": "1d"}, ["timm", "hf", "videomae"]),
        (image_vit, {}, ["timm", "mvd.pth"]),
    ],
)
def test_round_trips_are_bit_exact(tmp_path: Path, model, options, way) -> None:
    """What comes back is the source less its decoders, where a layout on the way has none."""
    source = model().state_dict()
    path = saved(source, tmp_path / "source.pth")
    for number, step in enumerate(way):
        layout, _, ending = step.partition(".")
        target = tmp_path / (str(number) if layout == "hf" else f"{number}.{ending or 'safetensors'}")
        convert(path, target, layout, heads=3, **(options if number == 0 or "." in way[number - 1] else {}))
        path = target
    back = read_weights(path)
    kept = ("decoder", "down", "mask_token", "pos_embed_", "encoder_to_decoder") if {"timm", "hf"} & set(way) else ()
    assert_same(back, {name: value for name, value in source.items() if not name.startswith(kept or "-")})


def test_files_say_what_they_hold(tmp_path: Path) -> None:
    source = saved(student(), tmp_path / "student.pth")
    convert(source, tmp_path / "out.safetensors", "mvd", heads=3)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {
        "architecture": "student",
        "positions": "3d",
        "num_heads": "3",
        "source": "student.pth",
        "layout": "mvd",
    }
    assert expected.items() <= metadata.items() and metadata["mvd_fast"]
    # The number of heads comes from there now.
    assert "3 heads" in convert(tmp_path / "out.safetensors", tmp_path / "again.safetensors", "timm")[0]


# ---- Hugging Face ----


@pytest.fixture
def transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    from transformers import dynamic_module_utils

    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return transformers


def frames_first(video: Tensor) -> Tensor:
    return video.transpose(1, 2)


@torch.inference_mode()
def test_a_student_in_hugging_face_with_its_own_positions(tmp_path: Path, transformers) -> None:
    model = student()
    report = convert(saved(model, tmp_path / "s.pth"), tmp_path / "hf", "hf", heads=3)
    assert any("left out" in line and "decoder_img.* (17)" in line for line in report)
    theirs, info = transformers.AutoModel.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(theirs.eval()(frames_first(clip())).last_hidden_state, model.encode(clip()))


@torch.inference_mode()
def test_their_own_class_reports_the_table_and_the_cards_lines_put_it_right(tmp_path: Path, transformers) -> None:
    model = student()
    convert(saved(model, tmp_path / "s.pth"), tmp_path / "hf", "hf", heads=3)
    theirs, info = transformers.VideoMAEModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"embeddings.position_embeddings"} and not info["missing_keys"]
    outputs = theirs.eval()(frames_first(clip())).last_hidden_state
    assert (outputs - model.encode(clip())).abs().max() > 0.1
    table = load_file(tmp_path / "hf/model.safetensors")["embeddings.position_embeddings"]
    theirs.embeddings.position_embeddings = table
    assert_close(theirs(frames_first(clip())).last_hidden_state, model.encode(clip()))


@torch.inference_mode()
def test_a_videomae_encoder_in_hugging_face(tmp_path: Path, transformers) -> None:
    """Golden weights: 1-D positions and the final norm need none but their own class."""
    _, tensors = golden("videomae_step")
    model = VideoMAE(
        ClipConfig(image_size=64, embed_dim=48, depth=2, num_heads=3), DecoderConfig(dim=32, depth=2, num_heads=2)
    ).eval()
    model.load_state_dict(sub(tensors, "model"))
    convert(saved(model, tmp_path / "v.pth"), tmp_path / "hf", "hf", heads=3, image_size=64)
    assert not (tmp_path / "hf/modeling_mvd.py").exists()
    theirs, info = transformers.VideoMAEModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    video = tensors["video"].float()
    assert_close(theirs.eval()(frames_first(video)).last_hidden_state, model.encoder(video, normed=True))


@torch.inference_mode()
def test_classifiers_in_hugging_face(tmp_path: Path, transformers) -> None:
    """Golden weights and logits, and a VideoMAE classifier."""
    _, tensors = golden("finetune")
    path = saved(sub(tensors, "model"), tmp_path / "c.pth")
    convert(path, tmp_path / "hf", "hf", heads=3, positions="3d", image_size=64)
    load = transformers.AutoModelForVideoClassification.from_pretrained
    theirs = load(tmp_path / "hf", trust_remote_code=True).eval()
    assert_close(theirs(frames_first(tensors["video"].float())).logits, tensors["logits"])
    assert theirs.config.num_labels == 11 and theirs.fc_norm.eps == 1e-6

    model = classifier("1d")
    path = saved(model, tmp_path / "v.pth")
    convert(path, tmp_path / "hf_1d", "hf", heads=3, positions="1d", image_size=32, frames=8)
    theirs = load(tmp_path / "hf_1d", trust_remote_code=True).eval()
    assert_close(theirs(frames_first(clip())).logits, model(clip()))
    assert theirs.fc_norm.eps == 1e-6
    stock = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "hf_1d").eval()
    assert (stock(frames_first(clip())).logits - model(clip())).abs().max() < 1e-3


def hf_config(transformers, **changes):
    return transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=192, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=128, layer_norm_eps=1e-6, **changes,
    )  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("binary", [False, True])
def test_from_hugging_face(tmp_path: Path, transformers, binary: bool) -> None:
    theirs = jittered(transformers.VideoMAEModel(hf_config(transformers, use_mean_pooling=False)))
    theirs.save_pretrained(tmp_path / "hf")
    if binary:
        torch.save(load_file(tmp_path / "hf/model.safetensors"), tmp_path / "hf/pytorch_model.bin")
        (tmp_path / "hf/model.safetensors").unlink()
    expected = theirs(frames_first(clip())).last_hidden_state
    convert(tmp_path / "hf", tmp_path / "v.safetensors", "videomae")
    ours = VideoEncoder(ClipConfig(**SHAPE, **VIT))
    state = {k.removeprefix("encoder."): v for k, v in load_file(tmp_path / "v.safetensors").items()}
    ours.load_state_dict(state, strict=True)
    assert_close(ours.eval()(clip(), normed=True), expected)
    # In MVD's layout the table is stored, so that a student's encoder computes the same.
    convert(tmp_path / "hf", tmp_path / "m.pth", "mvd")
    model = student()
    missing, unexpected = model.load_state_dict(read_weights(tmp_path / "m.pth"), strict=False)
    assert not unexpected and all("decoder" in n or "_img" in n or "_vid" in n for n in missing)
    assert_close(model.encode(clip()), expected)
    # and back
    convert(tmp_path / "v.safetensors", tmp_path / "back", "hf")
    back = load_file(tmp_path / "back/model.safetensors")
    assert_same(back, theirs_saved(theirs, tmp_path / "again"))


def theirs_saved(theirs, path: Path) -> dict[str, Tensor]:
    theirs.save_pretrained(path)
    return load_file(path / "model.safetensors")


@torch.inference_mode()
def test_a_pre_training_network_from_hugging_face(tmp_path: Path, transformers) -> None:
    """With its decoder, whose last norm has an eps of 1e-5 there: made equal here."""
    theirs = jittered(transformers.VideoMAEForPreTraining(hf_config(transformers, use_mean_pooling=False)))
    theirs.decoder.norm.eps = 1e-6
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "v.safetensors", "videomae")
    ours = VideoMAE(ClipConfig(**SHAPE, **VIT), DECODER).eval()
    ours.load_state_dict(load_file(tmp_path / "v.safetensors"), strict=True)
    mask = torch.zeros(2, 4, 16, dtype=torch.bool)
    mask[:, :, :10] = True
    assert_close(ours(clip(), mask.flatten(1)), theirs(frames_first(clip()), mask.flatten(1)).logits)


@torch.inference_mode()
def test_a_classifier_from_hugging_face(tmp_path: Path, transformers) -> None:
    theirs = jittered(transformers.VideoMAEForVideoClassification(hf_config(transformers, num_labels=5)))
    theirs.save_pretrained(tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "c.safetensors", "videomae")
    assert any("eps of fc_norm is 1e-05 in the source" in line for line in report)
    ours = classifier("1d")
    ours.load_state_dict(load_file(tmp_path / "c.safetensors"), strict=True)
    ours.fc_norm.eps = 1e-5
    assert_close(ours(clip()), theirs(frames_first(clip())).logits)
    # Back again no class of ours is needed, as the eps is theirs.
    convert(tmp_path / "c.safetensors", tmp_path / "back", "hf")
    assert not (tmp_path / "back/modeling_mvd.py").exists()
    assert_same(load_file(tmp_path / "back/model.safetensors"), theirs_saved(theirs, tmp_path / "again"))


def test_the_folder_has_a_processor_and_a_card(tmp_path: Path, transformers) -> None:
    convert(saved(student(), tmp_path / "s.pth"), tmp_path / "mvd-tiny", "hf", heads=3)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "mvd-tiny")
    frames = [torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8) for _ in range(8)]
    pixels = processor(frames, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 8, 3, 32, 32)
    assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406])
    card = (tmp_path / "mvd-tiny/README.md").read_text()
    for part in ("# mvd-tiny", "s.pth", "64 (tubes of 2 x 8 x 8)", "3 heads", "wang2023masked", "licence"):
        assert part in card
    assert "{" not in card.split("```bibtex")[0]


# ---- timm ----


class TubeEmbed(nn.Module):
    """A patch embedding for timm's VisionTransformer whose convolution is MVD's."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True, **_) -> None:
        super().__init__()
        self.num_patches, self.grid_size, self.patch_size = 64, (4, 16), (8, 8)
        self.proj = nn.Conv3d(in_chans, embed_dim, (2, 8, 8), (2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def timm_vit(**changes) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(32, 8, embed_dim=48, depth=2, num_heads=3, **changes).eval()


@torch.inference_mode()
def test_an_image_vit_in_timm(tmp_path: Path) -> None:
    _, tensors = golden("mae_step")
    report = convert(saved(sub(tensors, "model"), tmp_path / "mae.pth"), tmp_path / "t.pth", "timm", heads=4)
    assert any("left out" in line and "decoder_blocks.* (24)" in line for line in report)
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(64, 16, embed_dim=48, depth=2, num_heads=4, num_classes=0).eval()
    theirs.load_state_dict(read_weights(tmp_path / "t.pth"), strict=True)
    ours = ImageTeacher(image_size=64, embed_dim=48, depth=2, num_heads=4).eval()
    ours.load_state_dict({k: v for k, v in sub(tensors, "model").items() if k in ours.state_dict()})
    image = tensors["image"].float()
    assert_close(theirs.forward_features(image), ours.norm(*ours.encode(image))[1])


@torch.inference_mode()
def test_a_fine_tuned_image_vit_in_timm(tmp_path: Path) -> None:
    """MAE's fine-tuning pools over the patches: `fc_norm` instead of `norm`."""
    theirs = jittered(timm_vit(num_classes=7, global_pool="avg"))
    path = saved(theirs, tmp_path / "mae_finetuned.pth")
    assert "7 classes" in convert(path, tmp_path / "t.pth", "timm", heads=3)[0]
    assert_same(read_weights(tmp_path / "t.pth"), theirs.state_dict())


@torch.inference_mode()
def test_video_networks_in_timm(tmp_path: Path) -> None:
    model = student()
    convert(saved(model, tmp_path / "s.pth"), tmp_path / "t.safetensors", "timm", heads=3)
    shape = {"class_token": False, "embed_layer": TubeEmbed, "num_classes": 0}
    theirs = timm_vit(global_pool="", **shape)
    theirs.load_state_dict(load_file(tmp_path / "t.safetensors"), strict=True)
    assert_close(theirs.forward_features(clip()), model.encode(clip()))
    for positions in ("3d", "1d"):
        model = classifier(positions)
        target = tmp_path / f"{positions}.safetensors"
        convert(saved(model, tmp_path / "c.pth"), target, "timm", heads=3, positions=positions, image_size=32, frames=8)
        theirs = timm_vit(global_pool="avg", **{**shape, "num_classes": 5})
        theirs.load_state_dict(load_file(target), strict=True)
        assert_close(theirs(clip()), model(clip()))


@torch.inference_mode()
def test_from_timm(tmp_path: Path) -> None:
    """An image ViT as MVD's image teacher, and a video ViT, whose key biases must be zero."""
    theirs = jittered(timm_vit(num_classes=0, global_pool=""))
    path = saved(theirs, tmp_path / "t.pth")
    with pytest.raises(ValueError, match="lost in mvd: its learned positions"):
        convert(path, tmp_path / "m.pth", "mvd", heads=3)
    convert(path, tmp_path / "m.pth", "mvd", heads=3, partial=True)
    ours = ImageTeacher(image_size=32, patch_size=8, **VIT).eval()
    state = read_weights(tmp_path / "m.pth")
    ours.load_state_dict(state)
    ours.pos_embed.copy_(state["pos_embed"])  # it is in the file; the teacher insists on its own
    image = clip()[:, :, 0]
    assert_close(ours.norm(*ours.encode(image))[1], theirs.forward_features(image))

    model = classifier()
    convert(
        saved(model, tmp_path / "c.pth"), tmp_path / "v.pth", "timm", heads=3, positions="3d", image_size=32, frames=8
    )
    state = read_weights(tmp_path / "v.pth")
    convert(tmp_path / "v.pth", tmp_path / "back.safetensors", "mvd", heads=3)
    assert_same(load_file(tmp_path / "back.safetensors"), model.state_dict())
    state["blocks.1.attn.qkv.bias"][50] = 1.0
    with pytest.raises(ValueError, match=r"v\.pth: blocks\.1\.attn\.qkv\.bias has a bias of the keys"):
        convert(saved(state, tmp_path / "v.pth"), tmp_path / "no.safetensors", "mvd", heads=3)


# ---- another size ----


@torch.inference_mode()
def test_fixed_tables_are_regenerated(tmp_path: Path) -> None:
    path = saved(student(), tmp_path / "s.pth")
    report = convert(path, tmp_path / "l.safetensors", "mvd", heads=3, image_size=48, frames=16)
    assert any("regenerated from 4 x 4 x 4 to 8 x 6 x 6 tokens: pos_embed, pos_embed_img" in line for line in report)
    larger = student(image_size=48, num_frames=16)
    larger.load_state_dict(load_file(tmp_path / "l.safetensors"), strict=True)
    fresh = MaskedVideoStudent(**{**SHAPE, **VIT, **DECODERS_OF_STUDENT, "image_size": 48, "num_frames": 16})
    for name in ("pos_embed", "pos_embed_img", "pos_embed_vid"):
        assert torch.equal(getattr(larger, name), getattr(fresh, name))
    assert larger.encode(clip(48, 16)).shape == (2, 288, 48)


def test_learned_tables_are_interpolated(tmp_path: Path) -> None:
    state = image_vit().state_dict()
    state["pos_embed"] = torch.randn(1, 17, 48)
    report = convert(saved(state, tmp_path / "m.pth"), tmp_path / "l.pth", "timm", heads=3, image_size=64)
    assert any("interpolated (bicubic in space, linear in time) from 1 x 4 x 4 to 1 x 8 x 8" in line for line in report)
    table = read_weights(tmp_path / "l.pth")["pos_embed"]
    timm = pytest.importorskip("timm")
    torch.testing.assert_close(table, timm.layers.resample_abs_pos_embed(state["pos_embed"], [8, 8]))


def test_interpolation_keeps_lines_straight_and_axes_apart() -> None:
    """A table that is linear in time and in x stays so away from the borders."""
    t, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    old = torch.stack([t, x], -1)[:, None].expand(6, 8, 8, 2).reshape(1, -1, 2)
    new = resize(old, (6, 8, 8), (12, 16, 16), False).view(12, 16, 16, 2)
    at = (torch.arange(16) + 0.5) / 2 - 0.5  # centres of the new cells in units of the old ones
    torch.testing.assert_close(new[6, 6, 4:12, 1], at[4:12])
    torch.testing.assert_close(new[1:11, 6, 6, 0], at[1:11])
    assert torch.equal(resize(old, (6, 8, 8), (6, 8, 8), False), old)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"image_size": 36}, "--image-size 36 does not divide into patches of 8"), ({"frames": 7}, "--frames 7 does not")],
)
def test_sizes_that_do_not_fit(tmp_path: Path, options, said) -> None:
    path = saved(student(), tmp_path / "s.pth")
    with pytest.raises(ValueError, match=said):
        convert(path, tmp_path / "x.pth", "mvd", heads=3, **options)
    assert not (tmp_path / "x.pth").exists()


# ---- runs and checkpoints ----


def run_folder(folder: Path, model: nn.Module) -> Path:
    """What a killed run leaves: one checkpoint with a manifest, whose weights say what they are."""
    checkpoint = folder / "checkpoints/step-00000042"
    checkpoint.mkdir(parents=True)
    weights = checkpoint / "model.safetensors"
    said = tiny_runs.said("distill", {**SHAPE, **VIT}, mean=[0.5] * 3, std=[0.25] * 3)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, weights, said)
    facts = {"bytes": weights.stat().st_size, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {weights.name: facts}}))
    return checkpoint


def test_runs_and_checkpoints_of_ours(tmp_path: Path) -> None:
    model = student()
    checkpoint = run_folder(tmp_path / "run", model)
    for number, source in enumerate((tmp_path / "run", checkpoint, checkpoint / "model.safetensors")):
        convert(source, tmp_path / f"{number}.safetensors", "mvd")  # heads: the file says so
        assert_same(load_file(tmp_path / f"{number}.safetensors"), model.state_dict())
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf/preprocessor_config.json").read_text())["image_std"] == [0.25] * 3
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "run")  # the run has finished
    assert "3 heads" in convert(tmp_path / "run", tmp_path / "f.pth", "timm")[0]


def test_damaged_checkpoints_and_other_folders(tmp_path: Path) -> None:
    checkpoint = run_folder(tmp_path / "run", student())
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors does not match its checksum"):
        convert(tmp_path / "run", tmp_path / "x.pth", "mvd")
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or not as long"):
        convert(checkpoint, tmp_path / "x.pth", "mvd")
    (tmp_path / "global_step3").mkdir()
    with pytest.raises(ValueError, match=r"global_step3 is no folder of weights.*zero_to_fp32\.py"):
        convert(tmp_path / "global_step3", tmp_path / "x.pth", "mvd")


# ---- what is refused ----


def test_faults_are_listed_and_an_error_unless_asked_for(tmp_path: Path) -> None:
    state = student().state_dict()
    del state["blocks.1.attn.q_bias"]
    state["extra.weight"] = torch.ones(2)
    state["down_img.bias"] = torch.ones(3)
    path = saved(state, tmp_path / "s.pth")
    with pytest.raises(ValueError) as caught:
        convert(path, tmp_path / "x.safetensors", "mvd", heads=3)
    faults = (
        "missing: blocks.1.attn.q_bias",
        "unexpected: extra.weight",
        "reshaped: down_img.bias [3] instead of [32]",
    )
    assert all(part in str(caught.value) for part in (str(path), *faults, "--partial"))
    assert not (tmp_path / "x.safetensors").exists()
    report = convert(path, tmp_path / "x.safetensors", "mvd", heads=3, partial=True)
    assert set(faults) <= set(report)
    kept = load_file(tmp_path / "x.safetensors")
    assert kept.keys() == state.keys() - {"extra.weight", "down_img.bias"}


@pytest.mark.parametrize(
    ("model", "options", "to", "said"),
    [
        (student, {}, "mvd", "s.pth: heads cannot be read from shapes, and width 48 is none of 384, .*: add --heads N"),
        (student, {"heads": 5}, "mvd", "s.pth: width 48 is not a multiple of 5 heads"),
        (student, {"heads": 3, "positions": "1d"}, "mvd", "s.pth: positions are said to be 1d, but pos_embed is 3d"),
        (classifier, {"heads": 3}, "hf", "s.pth does not say which positions its video classifier adds"),
        (student, {"heads": 3}, "videomae", "lost in videomae: its 3d positions"),
        (classifier, {"heads": 3, "positions": "1d"}, "mvd", "lost in mvd: its 1d positions"),
        (image_vit, {"heads": 3}, "hf", "the hf layout holds video networks"),
        (image_vit, {"heads": 3}, "videomae", "the videomae layout holds video networks"),
        (lambda: nn.Linear(2, 2), {}, "mvd", "s.pth has the names of no network .*; it begins with bias, weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted(tmp_path: Path, model, options, to: str, said: str) -> None:
    target = tmp_path / ("x" if to == "hf" else "x.pth")
    with pytest.raises(ValueError, match=said):
        convert(saved(model(), tmp_path / "s.pth"), target, to, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"s.pth"}


def test_nothing_is_overwritten_unless_forced(tmp_path: Path) -> None:
    path = saved(student(), tmp_path / "s.pth")
    for to, target in (("mvd", tmp_path / "x.pth"), ("hf", tmp_path / "x")):
        convert(path, target, to, heads=3)
        with pytest.raises(ValueError, match=f"DST {target} exists .*--force replaces it"):
            convert(path, target, to, heads=3)
        convert(path, target, to, heads=3, force=True)
    (tmp_path / "x/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"not replaced, as it holds other things, too: thesis\.tex"):
        convert(path, tmp_path / "x", "hf", heads=3, force=True)
    assert (tmp_path / "x/thesis.tex").exists()
    with pytest.raises(ValueError, match=r"exists \(a folder\); and cannot be replaced"):
        (tmp_path / "y.pth").mkdir()
        convert(path, tmp_path / "y.pth", "mvd", heads=3, force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"s.pth", "x.pth", "x", "y.pth"}


@pytest.mark.parametrize("to", ["mvd", "hf"])
def test_nothing_is_half_written(tmp_path: Path, monkeypatch, to: str) -> None:
    """The disk fills up while a target is replaced: the old one stays as it was."""
    path, target = saved(student(), tmp_path / "s.pth"), tmp_path / ("x" if to == "hf" else "x.safetensors")
    convert(path, target, to, heads=3)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(state, file, metadata=None):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(layouts.load("hf"), "save_file", full)
    monkeypatch.setattr("mvd_fast.convert.storage.save_file", full)
    with pytest.raises(OSError, match="No space"):
        convert(path, target, to, heads=3, force=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    path = saved(student(), tmp_path / "s.pth")
    convert(path, tmp_path / "x", "hf", heads=3)
    before = (tmp_path / "x/README.md").read_bytes()
    replace = os.replace

    def fail_with_new(source, target):
        if str(source).endswith(".new"):
            raise OSError("Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_with_new)
    with pytest.raises(OSError, match="Input/output"):
        convert(path, tmp_path / "x", "hf", heads=3, force=True)
    assert (tmp_path / "x/README.md").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"s.pth", "x"}


@pytest.mark.parametrize(("name", "to"), [("no/such/x.pth", "mvd"), ("no/such/x", "hf")])
def test_folders_above_the_target_are_made(tmp_path: Path, name: str, to: str) -> None:
    assert not (tmp_path / "no").exists()
    assert convert(saved(student(), tmp_path / "s.pth"), tmp_path / name, to, heads=3)[-1] == f"wrote {tmp_path / name}"
    assert [path.name for path in (tmp_path / "no/such").iterdir()] == [Path(name).name]


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("x", "mvd", "must end in one of .safetensors"),
        ("x.pth", "hf", "must be a folder's name"),
        ("s.pth/x.pth", "mvd", "the folder .*s.pth cannot be made: File exists; name another place"),
        ("s.pth/deep/x", "hf", "the folder .*s.pth/deep cannot be made: Not a directory; name another place"),
    ],
)
def test_targets_that_do_not_go(tmp_path: Path, name: str, to: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        convert(saved(student(), tmp_path / "s.pth"), tmp_path / name, to, heads=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "vit"}, "config.json: model_type is 'vit', and only 'videomae' can be read"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_attention_heads": "3"}, "num_attention_heads is '3' instead of an integer"),
    ],
)
def test_folders_of_other_models(tmp_path: Path, change, said: str) -> None:
    convert(saved(student(), tmp_path / "s.pth"), tmp_path / "hf", "hf", heads=3)
    config = tmp_path / "hf/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "hf", tmp_path / "x.pth", "mvd")


# ---- the command ----


def test_the_command_needs_neither_transformers_nor_timm(tmp_path: Path) -> None:
    """In a process of its own; errors are one line, and help imports nothing heavy."""
    saved(student(), tmp_path / "s.pth")
    code = f"""
import sys
from mvd_fast import cli
try:
    cli.main(["convert", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
sys.modules.update(transformers=None, timm=None, deepspeed=None)
common = ["convert", "{tmp_path}/s.pth", "{tmp_path}/hf", "--to", "hf"]
print(cli.main(common), cli.main([*common, "--heads", "3"]), cli.main([*common, "--heads", "3"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 0 2"
    assert "add --heads" in done.stderr and "--force replaces it" in done.stderr and "Traceback" not in done.stderr
    wrote = [line for line in done.stdout.splitlines() if line.startswith(("read ", "positions: ", "wrote "))]
    assert len(wrote) == 3 and (tmp_path / "hf/README.md").is_file()


def test_a_layout_is_one_file(capsys) -> None:
    assert layouts.names() == ["hf", "mvd", "timm", "videomae"]
    with pytest.raises(SystemExit):
        cli.main(["convert", "a", "b", "--to", "onnx"])
    assert "choose from hf, mvd, timm, videomae" in capsys.readouterr().err.replace("'", "")

"""Frozen features of any checkpoint, the probes on them, and the two commands."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import CLIP, DECODER, ENCODER
from video_files import write_video

from mvd_fast import cli
from mvd_fast.convert.convert import convert
from mvd_fast.data.datasets.video import VideoDataset
from mvd_fast.data.lists import Entry
from mvd_fast.errors import UserError
from mvd_fast.evaluation import evaluate
from mvd_fast.evaluation.attentive import attentive_scores
from mvd_fast.evaluation.backbone import Preprocessing, load_backbone
from mvd_fast.evaluation.frozen import UniformViews, frozen_features
from mvd_fast.evaluation.probe import AttentiveSettings, knn_scores, top_k
from mvd_fast.models import ClipConfig, DecoderConfig, ImageTeacher, MaskedVideoStudent, VideoClassifier, VideoMAE
from mvd_fast.models.detector import ActionDetector

CPU = torch.device("cpu")
HEADS = {"num_heads": ENCODER["num_heads"]}


def save_run(folder: Path, model: torch.nn.Module, task: str, metadata: dict[str, str] | None = None) -> Path:
    """A run folder as the trainer leaves it."""
    folder.mkdir()
    said = tiny_runs.said(
        task, {**ENCODER, **(CLIP if task != "mae" else {})}, mean=[0.4] * 3, std=[0.3] * 3, sampling_rate=2
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {**said, **(metadata or {})})
    return folder


def student() -> MaskedVideoStudent:
    torch.manual_seed(0)
    return MaskedVideoStudent(**ENCODER, **CLIP, **tiny_runs.two_decoders(16, 16)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's run, and lists of 24 training and 8 test clips of two classes that differ in brightness."""
    folder = tmp_path_factory.mktemp("probe")
    save_run(folder / "run", student(), "distill")
    for split, count in (("train", 24), ("test", 8)):
        lines = []
        for number in range(count):
            # The same pattern, differently long: what tells the classes apart is the seed's colours.
            path = write_video(folder / f"{split}{number}_vp9.webm", 20 + number % 3, 40, 32, seed=number % 2)
            lines.append(f"{path.name} {3 + 4 * (number % 2)}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


# ---- networks ----


@torch.no_grad()
def expected_tokens(kind: str, model: torch.nn.Module, video: torch.Tensor) -> torch.Tensor:
    if kind == "distill":
        return model.encode(video)
    if kind == "videomae":
        return model.encoder(video, normed=True)
    if kind == "detect":
        return model.norm(*model.encode_tubes(video, model.pos_embed))[1]
    frames = video[:, :, ::2].transpose(1, 2)
    each = [model.norm(*model.encode(frame))[1][:, 1:] for frame in frames.unbind(1)]
    return torch.cat(each, 1)


@pytest.mark.parametrize("kind", ["distill", "videomae", "mae", "detect"])
def test_tokens_equal_the_trained_networks(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = {
        "distill": student,
        "videomae": lambda: VideoMAE(ClipConfig(**ENCODER, **CLIP), DecoderConfig(**DECODER)),
        "mae": lambda: ImageTeacher(**ENCODER),
        "detect": lambda: ActionDetector(ClipConfig(**ENCODER, **CLIP), 5),
    }[kind]().eval()
    for value in model.parameters():
        value.data += 0.01 * torch.randn_like(value) * value.requires_grad
    backbone, clips, _ = load_backbone(save_run(tmp_path / kind, model, kind), frames=8 if kind == "mae" else None)
    assert (clips.num_frames, clips.image_size, clips.sampling_rate, clips.mean) == (8, 32, 2, (0.4, 0.4, 0.4))
    video = torch.randn(2, 3, 8, 32, 32)
    torch.testing.assert_close(backbone.tokens(video), expected_tokens(kind, model, video))


def test_a_classifiers_features_are_what_its_head_sees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VideoClassifier(ClipConfig(**ENCODER, **CLIP), 5).eval()
    model.fc_norm.weight.data.uniform_(0.5, 2)
    backbone, _, description = load_backbone(save_run(tmp_path / "run", model, "classify"))
    video = torch.randn(2, 3, 8, 32, 32)
    torch.testing.assert_close(backbone.pool(backbone.tokens(video)), model.features(video).detach())
    assert "5 classes" in description


@torch.no_grad()
def test_a_detectors_encoder_keeps_its_final_norm_wherever_it_goes(tmp_path: Path) -> None:
    """From its run, from its file alone, which says nothing but names, and after `convert` to every layout."""
    torch.manual_seed(0)
    model = ActionDetector(ClipConfig(**ENCODER, **CLIP), 5).eval()
    model.norm.weight.data.uniform_(0.5, 2)
    run = save_run(tmp_path / "run", model, "detect")
    alone = shutil.copy(run / "model.safetensors", tmp_path / "alone.safetensors")
    video = torch.randn(2, 3, 8, 32, 32)
    expected = expected_tokens("detect", model, video)
    sources = [run, Path(alone)]
    for layout, name in (("mvd", "m.safetensors"), ("timm", "t.pth"), ("hf", "h")):
        (line, *_, last) = convert(run, tmp_path / name, layout)
        assert "action detector" in line and last.startswith("wrote")
        sources.append(tmp_path / name)
    for source in sources:
        backbone, *_ = load_backbone(source, heads=2)
        torch.testing.assert_close(backbone.tokens(video), expected)
        torch.testing.assert_close(backbone.pool(backbone.tokens(video)), expected.mean(1))
    whole = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(whole[name], value) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match=r"is an action detector, .*; test it with `mvd-fast ava-evaluate`"):
        evaluate.main([str(run), "--data", str(tmp_path / "list.txt")])


# ---- features of files ----


def test_every_file_once_in_order_and_bad_ones_named(folder: Path) -> None:
    names = ["test0_vp9.webm", "missing.webm", "test1_vp9.webm", "test2_vp9.webm"]
    entries = [Entry(str(folder / name), None) for name in names]
    backbone, clips, _ = load_backbone(folder / "run")
    both = [frozen_features(backbone, clips, entries, CPU, batch=batch, keep_tokens=True) for batch in (2, 3)]
    for found in both:
        assert [Path(entry.path).name for entry in found.entries] == [names[0], *names[2:]]
        assert list(found.bad) == [str(folder / "missing.webm")]
        assert found.tokens.dtype == torch.float16 and found.tokens.shape == (3, 64, 32)
        torch.testing.assert_close(found.tokens.float().mean(1), found.pooled, atol=2e-3, rtol=0)
    torch.testing.assert_close(both[0].pooled, both[1].pooled)
    alone = frozen_features(backbone, clips, entries[2:3], CPU)
    torch.testing.assert_close(alone.pooled[0], both[0].pooled[1])
    with pytest.raises(ValueError, match=r"none of 1 files can be used, for instance .*missing\.webm"):
        frozen_features(backbone, clips, entries[1:2], CPU)


def test_views_reach_from_the_first_frame_to_the_last_start() -> None:
    class Facts:
        frames = 40

    clips = Preprocessing(8, 2, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    kind = clips.dataset(UniformViews, views=3)
    key = [type("Key", (), {"epoch": view}) for view in range(3)]
    assert [int(kind.frames(Facts, k)[0]) for k in key] == [0, 12, 24]
    single = clips.dataset(UniformViews, views=1)
    centre = clips.dataset(VideoDataset)
    np.testing.assert_array_equal(single.frames(Facts, key[0]), centre.frames(Facts, key[0]))


def test_features_of_several_views_are_their_mean(folder: Path) -> None:
    backbone, clips, _ = load_backbone(folder / "run")
    entries = [Entry(str(folder / "test1_vp9.webm"), 0)]
    found = frozen_features(backbone, clips, entries, CPU, views=3, keep_tokens=True)
    assert found.tokens.shape == (1, 3 * 64, 32)
    torch.testing.assert_close(found.tokens.float().mean(1), found.pooled, atol=2e-3, rtol=0)


# ---- probes ----


def test_knn_by_hand() -> None:
    """Four unit vectors; the two nearest to (1, 0) vote e^(1/T) and e^(cos 0.2 / T)."""
    angles = np.array([0.0, 0.2, 1.0, 2.0])
    train = 3 * np.stack([np.cos(angles), np.sin(angles)], 1)  # the length must not matter
    scores = knn_scores(train, np.array([4, 9, 4, 9]), np.array([[2.0, 0.0]]), neighbours=2, temperature=0.5)
    votes = np.exp(np.cos([0.0, 0.2]) / 0.5)
    np.testing.assert_allclose(scores, [votes / votes.sum()])


def test_top_k_by_hand() -> None:
    scores = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.35, 0.25]])
    labels, truth = np.array([2, 5, 7]), np.array([2, 5, 7])
    assert [top_k(scores, labels, truth, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_attentive_probe_finds_the_token_that_matters() -> None:
    """The class is the sign of one token out of eight, marked by a channel of its own; the mean hides it in noise."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, 16, generator=rng)
    y = torch.arange(400) % 2
    place = torch.randint(8, (400,), generator=rng)
    x[torch.arange(400), place, 0] = 8.0
    x[torch.arange(400), place, 1] = 2.0 * (2 * y - 1)
    settings = AttentiveSettings(epochs=12, batch=50, lr=1e-2)

    def scores(seed: int) -> np.ndarray:
        return attentive_scores(x[:300], y[:300].numpy(), x[300:], 2, seed, settings)

    first = scores(0)
    assert (first.argmax(1) == y[300:].numpy()).mean() > 0.95
    np.testing.assert_array_equal(first, scores(0))
    assert not np.array_equal(first, scores(1))


# ---- commands ----


def test_probe_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "probe.json"
    lists = ["--train", str(folder / "train.txt"), "--test", str(folder / "test.txt")]
    options = ["--kind", "linear,knn,attentive", "--neighbours", "5", "--seeds", "0,1", "--epochs", "10"]
    assert cli.main(["probe", str(folder / "run"), *lists, *options, "--out", str(out), "--device", "cpu"]) == 0
    report = json.loads(out.read_text())
    assert report["train"]["clips"] == 24 and report["test"]["clips"] == 8 and report["classes"] == 2
    assert {kind: report["probes"][kind]["top1"] for kind in ("linear", "knn")} == {"linear": 1.0, "knn": 1.0}
    assert len(report["probes"]["attentive"]["top1_each"]) == 2 and report["probes"]["knn"]["top5"] is None
    assert "100.00" in capsys.readouterr().out


def test_features_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "too" / "x.safetensors"
    broken = tmp_path / "broken.webm"
    broken.write_bytes(b"no video")
    inputs = [str(folder / "test.txt"), str(broken)]
    status = cli.main(["features", *inputs, "--checkpoint", str(folder / "run"), "--out", str(out), "--tokens"])
    assert status == 1 and f"left out: {broken}" in capsys.readouterr().err
    tensors = load_file(out)
    assert tensors["pooled"].shape == (8, 32) and tensors["tokens"].shape == (8, 64, 32)
    assert tensors["labels"].tolist() == [3, 7] * 4
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["names"])[0].endswith("test0_vp9.webm") and "MVD student" in metadata["network"]
    assert json.loads(metadata["preprocessing"])["sampling_rate"] == 2
    assert list(json.loads(metadata["left_out"])) == [str(broken)]


def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(folder: Path, tmp_path: Path, capsys) -> None:
    """A file where the folder should be; no clip is decoded for nothing (nothing is said of the broken one)."""
    (tmp_path / "file").touch()
    (tmp_path / "broken.webm").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text("broken.webm 0\nother.webm 1\n")
    lists = ["--train", str(tmp_path / "list.txt"), "--test", str(tmp_path / "list.txt")]
    listed, out = str(tmp_path / "list.txt"), str(tmp_path / "file" / "x.safetensors")
    assert cli.main(["features", listed, "--checkpoint", str(folder / "run"), "--out", out]) == 2
    assert cli.main(["probe", str(folder / "run"), *lists, "--kind", "linear", "--out", out]) == 2
    said = f"mvd-fast: error: the folder {tmp_path / 'file'} cannot be made: File exists; name another place\n"
    assert capsys.readouterr().err == 2 * said


@pytest.mark.parametrize(
    ("train", "test", "options", "sentence"),
    [
        ("a.webm 0\na.webm\n", "a.webm 0\n", [], r"train\.txt, line 2: no label; write `path label`"),
        ("a.webm 0\n", "a.webm 0\n", [], r"train\.txt has usable clips of one class only"),
        ("a.webm 0\na.webm 1\n", "a.webm 2\n", [], r"test\.txt has 1 classes that .*train\.txt has no .*: 2"),
        ("a.webm 0\na.webm 1\n", "a.webm 1\n", [], r"has 2 usable clips, fewer than the 20 neighbours"),
        ("a.webm 0\na.webm 1\n", "a.webm 1\n", ["--kind", "nearest"], r"unknown probe 'nearest'; there are: linear"),
        ("a.webm 0\na.webm 1\n", "a.webm 1\n", ["--seeds", "a"], r"--seeds a must be whole numbers"),
    ],
)
def test_lists_that_no_probe_can_use(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    train: str,
    test: str,
    options: list,
    sentence: str,
) -> None:
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "test.txt").write_text(test)
    lists = ["--train", str(tmp_path / "train.txt"), "--test", str(tmp_path / "test.txt")]
    assert cli.main(["probe", str(folder / "run"), *lists, *options]) == 2
    assert re.search(sentence, capsys.readouterr().err)

"""AVA: the detector, its data, and training to detections on the two-digit set."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from video_files import assert_same, data_setup, loader_of, take, write_video

from mvd_fast.cli import main
from mvd_fast.config.load import load_config
from mvd_fast.convert.encoder import load_encoder
from mvd_fast.convert.weights import WeightsError
from mvd_fast.data import media
from mvd_fast.data.ava_files import AvaError, KeyFrame
from mvd_fast.data.datasets import ava
from mvd_fast.data.loader import DataSetup
from mvd_fast.data.sampling import SampleKey, key_clip
from mvd_fast.models import ClipConfig, ImageTeacher, MaskedVideoStudent
from mvd_fast.models.detector import ActionDetector
from mvd_fast.tasks.detect import Detect
from mvd_fast.tools.demo.ava_digits import AvaDigitSet, write_ava_digits

SIZES = {**tiny_runs.ENCODER, **tiny_runs.CLIP}


def detector(**changes) -> ActionDetector:
    torch.manual_seed(0)
    return ActionDetector(ClipConfig(**{**SIZES, **changes}), num_classes=5, head_scale=1.0).eval()


# ---- the network and what it minimises ----


def slow_roi_max(features: torch.Tensor, box: list[float]) -> torch.Tensor:
    """The largest of 7 x 7 bilinear samples of [D, H, W] at the centres of a box's cells: [D]."""
    _, height, width = features.shape
    x1, y1, x2, y2 = box
    cells = (torch.arange(7) + 0.5) / 7
    x, y = ((low + cells * (high - low)) * size - 0.5 for low, high, size in ((x1, x2, width), (y1, y2, height)))
    x, y = x.clamp(0, width - 1) / (width - 1) * 2 - 1, y.clamp(0, height - 1) / (height - 1) * 2 - 1
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
    return F.grid_sample(features[None], points, align_corners=True)[0].flatten(1).amax(1)


def test_a_box_is_the_largest_of_its_bilinear_samples() -> None:
    model, video = detector(), torch.randn(2, 3, 8, 32, 32)
    boxes = [[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0], [0.4, 0.4, 0.45, 0.5]]
    with torch.no_grad():
        features = model.token_map(video)
        expected = model.head(torch.stack([slow_roi_max(features[c], box) for c, box in zip((1, 0, 1), boxes)]))  # noqa: B905
        found = model(video, torch.tensor(boxes), torch.tensor([1, 0, 1]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_encoder_is_the_students(tmp_path: Path) -> None:
    torch.manual_seed(1)
    student = MaskedVideoStudent(**SIZES, **tiny_runs.two_decoders(8, 8)).eval()
    student.norm.weight.data.uniform_(0.5, 2)
    save_file(student.state_dict(), tmp_path / "model.safetensors", tiny_runs.said("distill", SIZES))
    model, video = detector(), torch.randn(2, 3, 8, 32, 32)
    load_encoder(model, tmp_path)
    with torch.no_grad():
        expected = student.encode(video).unflatten(1, (4, 4, 4)).mean(1).permute(0, 3, 1, 2)
        torch.testing.assert_close(model.token_map(video), expected)
    larger = detector(image_size=64)
    load_encoder(larger, tmp_path)
    torch.testing.assert_close(larger.pos_embed, detector(image_size=64).pos_embed)
    assert torch.equal(larger.blocks[1].mlp.fc1.weight, student.blocks[1].mlp.fc1.weight)
    with pytest.raises(WeightsError, match="does not fit ActionDetector"):
        load_encoder(detector(depth=1), tmp_path)


def test_image_checkpoints_are_refused(tmp_path: Path) -> None:
    said = tiny_runs.said("mae", tiny_runs.ENCODER)
    save_file(ImageTeacher(**tiny_runs.ENCODER).state_dict(), tmp_path / "model.safetensors", said)
    with pytest.raises(WeightsError, match="starts from a video checkpoint"):
        load_encoder(detector(), tmp_path)


def test_the_loss_is_the_mean_over_boxes_and_actions() -> None:
    model = detector()
    batch = {
        "video": torch.randn(2, 3, 8, 32, 32),
        "boxes": torch.tensor([[0.1, 0.1, 0.6, 0.6], [0.2, 0.3, 0.9, 0.8], [0.5, 0.0, 1.0, 1.0]]),
        "box_clip": torch.tensor([0, 0, 1]),
        "labels": torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]),
    }
    loss = Detect(model)(batch)["loss"]
    chances = model(batch["video"], batch["boxes"], batch["box_clip"]).sigmoid()
    expected = -torch.where(batch["labels"] == 1, chances, 1 - chances).log().mean()
    torch.testing.assert_close(loss, expected)
    nobody = {"boxes": torch.zeros(0, 4), "box_clip": torch.zeros(0, dtype=torch.int64), "labels": torch.zeros(0, 5)}
    empty = Detect(model)(batch | nobody)["loss"]
    empty.backward()
    assert empty == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# ---- data ----

CUT = {"kind": "random_resized", "area": (0.5, 1.0)}


def test_frames_around_a_key_frame() -> None:
    assert key_clip(200, 100, 16, 4).tolist() == list(range(68, 132, 4))
    assert key_clip(20, 3, 4, 4).tolist() == [0, 0, 3, 7] and key_clip(20, 19, 4, 2).tolist() == [15, 17, 19, 19]


def setup_of(folder: Path, **data) -> DataSetup:
    data = {"sampling_rate": 1, "crop": "whole", **data}
    return data_setup(folder / "train.csv", kind="ava", classes=18, size=64, **data)


def dataset_of(folder: Path, **data) -> ava.AvaDataset:
    setup = setup_of(folder, **data)
    return ava.build(setup.data, setup.request, False)


@pytest.fixture(scope="module")
def lamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Black videos with one white rectangle each, the only person; 100 x 60 pixels, 24 frames."""
    folder = tmp_path_factory.mktemp("lamps")
    lines = []
    for number, (x1, y1, x2, y2) in enumerate(((20, 10, 40, 50), (50, 20, 90, 40), (36, 24, 60, 44), (44, 4, 56, 30))):
        picture = np.zeros((60, 100, 3), dtype=np.uint8)
        picture[y1:y2, x1:x2] = 255
        with av.open(str(folder / f"lamp{number}.webm"), "w") as container:
            stream = container.add_stream("libvpx-vp9", rate=24, options={"cpu-used": "8", "crf": "4", "b:v": "0"})
            stream.width, stream.height, stream.pix_fmt = 100, 60, "yuv420p"
            for _ in range(24):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f"lamp{number},0000,{x1 / 100},{y1 / 60},{x2 / 100},{y2 / 60},{number + 1},0\n")
    (folder / "train.csv").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("options", [{"crop": "whole"}, {"crop": "center"}, {"crop": CUT, "flip": 0.5}])
def test_boxes_follow_their_pixels(lamps: Path, options: dict) -> None:
    config = setup_of(lamps, box_jitter=(0.0, 0.0), mean=(0, 0, 0), std=(1, 1, 1), **options)
    seen = 0
    with closing(loader_of(config, micro=2)) as loader:
        for batch in itertools.islice(loader.batches(0), 8):
            assert batch["boxes"].dtype == batch["labels"].dtype == torch.float32
            for box, clip, label in zip(batch["boxes"], batch["box_clip"], batch["labels"], strict=True):
                assert label.nonzero().flatten().tolist() == [batch["index"][clip]]
                lit = batch["video"][clip].mean((0, 1)) > 0.5
                rows, columns = lit.any(1).nonzero(), lit.any(0).nonzero()
                shown = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert [float(side) * 64 for side in box] == pytest.approx([int(side) for side in shown], abs=1.6)
                seen += 1
    assert seen >= 10 and (options["crop"] != "whole" or seen == 16)


def test_jitter_is_a_function_of_the_sample_and_has_the_recipes_bounds(lamps: Path) -> None:
    dataset = dataset_of(lamps, box_jitter=(0.2, 0.1))
    own = np.array([0.2, 10 / 60, 0.4, 50 / 60])
    sides = np.array([0.2, 40 / 60, 0.2, 40 / 60]) * (-1, -1, 1, 1)
    moved = np.stack([dataset.boxes(SampleKey(0, epoch, 0), 100, 60)["boxes"][0] for epoch in range(300)])
    assert np.array_equal(moved[7], dataset.boxes(SampleKey(0, 7, 0), 100, 60)["boxes"][0])
    outward = (moved - own) / sides / (0.2, 0.1, 0.2, 0.1)
    assert (outward.min(0) > -0.501).all() and (outward.min(0) < -0.45).all()
    assert (outward.max(0) < 1.001).all() and (outward.max(0) > 0.95).all()


def test_scenes_are_people_with_all_their_actions(tmp_path: Path) -> None:
    box, other = "0.1,0.1,0.5,0.9", "0.6,0.1,0.9,0.9"
    rows = [f"v,0902,{box},3,0", f"v,0902,{other},4,1", f"v,0902,{box},12,0", f"v,0903,{box},1,0", f"w,0902,{box},1,0"]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "out.csv").write_text("v,0903\n")
    (tmp_path / "v").mkdir()
    for name in ("v/0902.webm", "w.mkv"):
        (tmp_path / name).write_bytes(b"")
    dataset = dataset_of(tmp_path, excluded=str(tmp_path / "out.csv"))
    assert [scene.frame for scene in dataset.scenes] == [KeyFrame("v", 902), KeyFrame("w", 902)]
    assert dataset.paths() == [str(tmp_path / "v" / "0902.webm"), str(tmp_path / "w.mkv")]
    assert [row.nonzero()[0].tolist() for row in dataset.scenes[0].labels] == [[2, 11], [3]]
    joined = dataset.collate([dataset.boxes(SampleKey(0, 0, number), 10, 10) for number in (1, 0)])
    assert joined["box_clip"].tolist() == [0, 1, 1] and joined["labels"].shape == (3, 18)
    with pytest.raises(AvaError, match=r"has action 19, but model\.num_classes is 18"):
        (tmp_path / "train.csv").write_text(f"v,0902,{box},19,0")
        dataset_of(tmp_path)
    with pytest.raises(AvaError, match=r"does not exist; set data\.root"):
        (tmp_path / "train.csv").write_text(f"v,0902,{box},1,0")
        dataset_of(tmp_path, root=str(tmp_path / "nowhere"))


def test_the_key_frame_of_a_whole_video_and_of_a_clip(tmp_path: Path) -> None:
    write_video(tmp_path / "film_vp9.webm", 60)  # 24 frames a second, from second 900
    (tmp_path / "train.csv").write_text("film_vp9,0901,0,0,1,1,1,0\nfilm_vp9,0903,0,0,1,1,1,0\n")
    dataset = dataset_of(tmp_path, first_second=900)
    facts = media.probe_video(dataset.scenes[0].path)
    assert dataset.frames(facts, SampleKey(0, 0, 0)).tolist() == list(range(20, 28))
    with pytest.raises(media.BadFile, match=r"no key frame at second 903: it lasts 2\.5 s from second 900"):
        dataset.frames(facts, SampleKey(0, 0, 1))


# ---- configs ----


def test_recipes() -> None:
    for name, width in (("finetune/ava_vitb", 768), ("finetune/ava_vitl", 1024)):
        config = load_config(name)
        optim, model = config.optim, config.model
        assert (optim.base_lr, config.batch.size, optim.layer_decay, optim.epochs) == (2.5e-4, 128, 0.75, 30)
        assert (model.embed_dim, model.drop_path, model.num_classes, optim.betas) == (width, 0.2, 80, (0.9, 0.999))
        assert (model.num_frames, config.data.sampling_rate, config.data.flip) == (16, 4, 0.5)


# ---- the two-digit set, from training to detections ----


@pytest.fixture(scope="module")
def digit_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ava")
    write_ava_digits(folder, AvaDigitSet(train=22, val=2, test=8, seed=0))
    return folder


def _config(folder: Path, run_dir: Path) -> Path:
    base = load_config("demo/ava").model_dump(mode="json")
    base |= {"run_dir": str(run_dir), "batch": {"size": 4}, "log": {"every": 1, "tensorboard": False}}
    base["checkpoint"] = {"every_steps": 2}
    base["model"] |= {"drop_path": 0.2, "depth": 2, "embed_dim": 32, "num_heads": 2}
    base["data"] |= {"train": str(folder / "train.csv"), "root": str(folder / "videos"), "flip": 0.5, "threads": 1}
    base["data"]["excluded"] = str(folder / "train_excluded.csv")
    base["optim"] |= {"epochs": 2, "base_lr": 0.1}
    return tiny_runs.write_config(run_dir / "asked.json", base)


@pytest.fixture(scope="module")
def trained(digit_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained")
    status, output = tiny_runs.run(_config(digit_set, run_dir))
    assert status == 0, output
    return run_dir


def test_batches_are_the_same_after_resuming(digit_set: Path) -> None:
    config = setup_of(digit_set, root=str(digit_set / "videos"), flip=0.5, crop="random_resized")
    whole = take(config, 4, micro=2)
    assert_same(take(config, 2, 2, micro=2), whole[2:])
    assert {"video", "boxes", "labels", "box_clip", "index"} <= whole[0].keys()


def test_a_killed_run_is_bit_equal(digit_set: Path, trained: Path, tmp_path: Path) -> None:
    config_file = _config(digit_set, tmp_path)
    process = tiny_runs.start(config_file)
    log, deadline = tmp_path / "log.jsonl", time.monotonic() + tiny_runs.TIMEOUT
    while not log.exists() or '"step": 5,' not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    tiny_runs.finish(process)
    status, output = tiny_runs.run(config_file)
    assert status == 0, output
    assert tiny_runs.losses(tmp_path) == tiny_runs.losses(trained) and len(tiny_runs.losses(trained)) == 10
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_detections_of_a_trained_run(digit_set: Path, trained: Path, capsys: pytest.CaptureFixture) -> None:
    truth = ["--annotations", str(digit_set / "test.csv"), "--label-map", str(digit_set / "actions.pbtxt")]
    truth += ["--excluded", str(digit_set / "test_excluded.csv")]
    data = ["--root", str(digit_set / "videos"), "--proposals", str(digit_set / "test_proposals.csv")]
    assert main(["ava-evaluate", str(trained), *truth, *data]) == 0
    report = json.loads((trained / "ava_detections.json").read_text())
    assert report["key_frames"] == 7 and 0 < report["map"] < 1
    rows = [row.split(",") for row in (trained / "ava_detections.csv").read_text().splitlines()]
    assert len({row[0] for row in rows}) == 7 and all(0 <= float(row[7]) <= 1 for row in rows)
    capsys.readouterr()
    assert main(["ava-map", str(trained / "ava_detections.csv"), *truth]) == 0
    assert f"{100 * report['map']:.2f} %" in capsys.readouterr().out
    again = trained / "made" / "again.csv"
    checkpoint = next((trained / "checkpoints").glob("step-*10"))
    again_on_two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mvd_fast.cli"]
    options = ["ava-evaluate", str(checkpoint), *truth, *data, "--batch", "3", "--out", str(again)]
    done = subprocess.run(
        [sys.executable, *again_on_two, *options],
        env=tiny_runs.environment(), capture_output=True, text=True, timeout=tiny_runs.TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("frame mAP") == 1, done.stderr
    second = [row.split(",") for row in again.read_text().splitlines()]
    assert [row[:2] for row in rows] == [row[:2] for row in second]
    assert [float(row[7]) for row in rows] == pytest.approx([float(row[7]) for row in second], abs=1e-4)


def test_bad_requests_are_one_sentence(digit_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    truth = ["--annotations", str(digit_set / "test.csv"), "--label-map", str(digit_set / "actions.pbtxt")]
    for folder in (str(tmp_path), "/"):
        assert main(["ava-evaluate", folder, *truth, "--out", str(tmp_path / "found.csv")]) == 2
        assert "is no folder of a run" in capsys.readouterr().err
    assert main(["ava-map", str(tmp_path / "none.csv"), *truth]) == 2
    assert "none.csv cannot be read" in capsys.readouterr().err

"""The demo: its video set, its probes, and the whole of it at the quick size."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import teacher_8bit
import tiny_runs
import torch

from mvd_fast.config.load import load_config
from mvd_fast.evaluation.features import clip_features, slice_similarity
from mvd_fast.evaluation.probe import linear_probe
from mvd_fast.tools.demo import digits
from mvd_fast.tools.demo import run as demo_run
from mvd_fast.training import checkpoint

SET = digits.DigitSet(train=32, test=16, seed=3)
DEMO_TIMEOUT = 1000  # seconds; it takes about 80 on two quiet cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits.write_digit_set(folder, SET)
    return folder


def _labels(folder: Path, split: str) -> np.ndarray:
    return np.array([int(line.split()[1]) for line in (folder / f"{split}.txt").read_text().splitlines()])


def test_every_clip_is_written_and_labelled(folder: Path) -> None:
    assert digits.is_written(folder, SET) and not digits.is_written(folder, digits.DigitSet(32, 16, 4))
    assert len(list(folder.rglob("*.webm"))) == 48
    _, motion = digits.digit_and_motion(_labels(folder, "train"))
    assert np.bincount(motion).tolist() == [4] * 8
    with av.open(str(folder / "train" / "00000.webm")) as container:
        assert container.streams.video[0].codec_context.name == "vp9"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.shape(frames) == (digits.FRAMES, digits.SIZE, digits.SIZE, 3)


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "fp32")])
def test_teachers_are_bf16_where_that_is_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, precision: str
) -> None:
    monkeypatch.setattr(demo_run, "has_fast_bf16", lambda: fast)
    targets = demo_run.Demo(tmp_path, "quick", 0).config("student").targets
    assert [target.precision for target in targets] == [precision, precision]


def test_the_set_is_a_function_of_its_seed(folder: Path, tmp_path: Path) -> None:
    digits.write_digit_set(tmp_path, SET)
    for split in ("train", "test"):
        assert (tmp_path / f"{split}.txt").read_text() == (folder / f"{split}.txt").read_text()
    for path in ("train/00000.webm", "train/00031.webm", "test/00015.webm"):
        frames = [
            [frame.to_ndarray() for frame in av.open(str(base / path)).decode(video=0)] for base in (folder, tmp_path)
        ]
        assert np.array_equal(*frames)
    other = tmp_path / "other"
    digits.write_digit_set(other, digits.DigitSet(32, 16, 4))
    by_workers = tmp_path / "by_workers"
    digits.write_digit_set(by_workers, digits.DigitSet(130, 16, 3))
    assert len(list((by_workers / "train").iterdir())) == 130
    assert (other / "train.txt").read_text() != (folder / "train.txt").read_text()


def test_opposite_motions_are_each_other_reversed_in_time() -> None:
    """Zooming in and out: the same sizes in the opposite order, so no single frame tells them apart."""
    image = np.zeros((2, 8, 8), np.float32)
    image[:, 1:7, 2:6] = 1
    zoom_in, zoom_out = (digits.MOTIONS.index(name) for name in ("zoom in", "zoom out"))
    shown = digits.render(image, np.array([zoom_in, zoom_out]), seed=(0,), noise=0.0)
    bright = (shown > 150).sum((2, 3))
    assert (np.diff(bright[0]) >= 0).mean() > 0.9 and (np.diff(bright[1]) <= 0).mean() > 0.9


def test_features_see_every_clip_once(folder: Path) -> None:
    config = load_config("demo/student", [f"data.train={folder / 'train.txt'}"])
    tokens = config.model.grid

    def network(video: torch.Tensor) -> torch.Tensor:
        return video.mean((1, 2, 3, 4))[:, None, None].expand(-1, int(np.prod(tokens)), 3)

    found = clip_features({"mean": network}, config, str(folder / "test.txt"), torch.device("cpu"))
    assert sorted(found.index) == list(range(SET.test))
    assert found.pooled["mean"].shape == (SET.test, 3)
    np.testing.assert_allclose(found.similarity["mean"], np.ones((tokens[0], tokens[0])), atol=1e-6)


def test_similarity_of_time_slices() -> None:
    slices = torch.zeros(1, 3, 2, 4)  # [B, T', S, C]
    slices[0, 0, :, 0] = slices[0, 1, :, 1] = 2.0
    slices[0, 2] = -slices[0, 0]
    expected = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    torch.testing.assert_close(slice_similarity(slices), expected.double())


def test_probe_reads_what_is_linear_and_nothing_from_noise() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(600) % 3
    signal = np.eye(3)[y] * 40 + rng.normal(size=(600, 3)) + 100  # far from standardised
    noise = rng.normal(size=(600, 3))
    assert linear_probe(signal[:400], y[:400], signal[400:], y[400:]).accuracy > 0.99
    blind = linear_probe(noise[:400], y[:400], noise[400:], y[400:])
    assert blind.accuracy < 0.5 and blind.confusion.sum() == 200


def test_the_quick_demo_from_nothing_to_the_report(tmp_path: Path) -> None:
    """Interrupted in its first training it saves; called again it goes on, each phase by the real launcher; a third
    call skips all phases; another seed is sent elsewhere."""
    out = tmp_path / "demo"
    command = [str(Path(sys.executable).with_name("mvd-fast")), "demo", "--size", "quick", "--out", str(out)]
    environment = {**tiny_runs.environment(), "OMP_NUM_THREADS": "2"}

    def demo(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options], env=environment, capture_output=True, text=True, timeout=DEMO_TIMEOUT
        )

    interrupted = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = out / "image_teacher" / "log.jsonl"
    while not (log.exists() and log.read_text()):
        assert interrupted.poll() is None, interrupted.communicate()
        time.sleep(0.05)
    interrupted.terminate()
    _, errors = interrupted.communicate(timeout=DEMO_TIMEOUT)
    assert interrupted.returncode == 143 and "was interrupted" in errors
    saved = checkpoint.newest_valid(out / "image_teacher")
    assert saved is not None and not (out / "image_teacher" / "model.safetensors").exists()

    first = demo()
    assert first.returncode == 0, first.stdout + first.stderr
    results = json.loads((out / "results.json").read_text())
    for network in ("untrained student", "image teacher", "video teacher", "student"):
        assert all(0 <= results["probes"][network][label] <= 1 for label in ("digit", "motion"))
        similarity = np.array(results["similarity"][network])
        np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-4)
    assert [phase["name"] for phase in results["phases"]] == [
        "data",
        "image teacher",
        "video teacher",
        "student",
        "probes",
    ]
    for run in ("image_teacher", "video_teacher", "student"):
        records = [json.loads(line) for line in (out / run / "log.jsonl").read_text().splitlines()]
        assert records[-1]["loss"] < records[0]["loss"], run
    page = (out / "report.html").read_text()
    assert "<svg" in page and "student" in page

    in_8_bits = teacher_8bit.cosines(out)
    assert len(in_8_bits) == 2 * 4 * 4  # teachers, blocks, linear layers in a block
    for layer, cosines in in_8_bits.items():
        assert cosines.min() >= 0.999, layer

    start = time.monotonic()
    again = demo()
    assert again.returncode == 0 and again.stderr.count("skipped") == 5, again.stderr
    assert time.monotonic() - start < 60
    other = demo("--seed", "1")
    assert other.returncode == 2 and "seed 0, not quick and 1" in other.stderr


def test_what_builds_on_a_phase_that_ran_again_is_done_anew(tmp_path: Path) -> None:
    with demo_run.Demo(tmp_path, "quick", 0)._phase("data"):
        pass
    with demo_run.Demo(tmp_path, "quick", 0)._phase("probes"):
        pass
    later = demo_run.Demo(tmp_path, "quick", 0)
    assert later._is_done("data") and later._is_done("probes")
    with later._phase("data"):
        pass
    assert not later._is_done("probes")

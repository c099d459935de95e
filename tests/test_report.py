"""The report: numbers computed from what was measured, self-contained, tolerant of missing pieces, written whole."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mvd_fast.tools.report import facts, plots, write_report
from mvd_fast.tools.report.inputs import Inputs

MOTIONS = ["rotate cw", "rotate ccw", "zoom in", "zoom out", "orbit cw", "orbit ccw", "shake x", "shake y"]
VOID = {"meta", "link", "img", "br", "hr", "input"}
PROBES = {
    "chance": {"digit": 0.1, "motion": 0.125},
    "untrained student": {"digit": 0.2, "motion": 0.5},
    "image teacher": {"digit": 0.45, "motion": 0.6},
    "video teacher": {"digit": 0.3, "motion": 0.74},
    "student": {"digit": 0.4, "motion": 0.75},
}


def similarity(mean: float) -> list[list[float]]:
    return np.where(np.eye(4, dtype=bool), 1.0, mean).tolist()


def results() -> dict:
    def phase(name: str, seconds: float, run: str | None = None) -> dict:
        trained = {"steps": 60, "batch": 32, "clips_per_second": 123.0, "parameters": 700_000} if run else {}
        return {"name": name, "seconds": seconds, "run": run, **trained}

    return {
        "size": "quick",
        "seed": 7,
        "machine": {"cpu": "Some <fast> CPU", "cores": 2},
        "versions": {"torch": "2.14.1"},
        "data": {"clips": 4096, "test_clips": 1000, "bytes": 31_200_000, "codec": "VP9", "frame": 16, "frames": 4,
                 "motions": MOTIONS},
        "phases": [phase("data", 40.0), phase("image teacher", 100.0, "image_teacher"),
                   phase("video teacher", 200.5, "video_teacher"), phase("student", 300.0, "student"),
                   phase("probes", 20.0)],
        "probes": PROBES,
        "confusion": {"student": {"motion": np.eye(8).tolist(), "digit": (5 * np.eye(10)).tolist()}},
        "similarity": {name: similarity(mean) for name, mean in (("image teacher", 0.91), ("video teacher", 0.42))},
    }  # fmt: skip


def records(with_teachers: bool) -> list[dict]:
    spent = {"data": 0.1, "forward": 0.4, "backward": 1.0, "optimizer": 0.2}
    extra = {"loss_image": 0.3, "loss_video": 0.2} if with_teachers else {}
    if with_teachers:
        spent |= {"image_teacher": 0.3, "video_teacher": 0.4}
    return [
        {"step": step, "loss": 1.0 / step, "lr": 1e-3, "clips_per_second": 160.0, "data_wait_share": 0.05,
         "seconds": 4.0, "phase_seconds": spent, "model_flop_utilisation": 0.3, "peak_flops": 3.4e11, "bad_files": 2,
         **extra}
        for step in range(20, 61, 20)
    ]  # fmt: skip


def pictures() -> dict[str, np.ndarray]:
    frames = np.random.default_rng(0).integers(0, 255, (2, 4, 16, 16, 3), dtype=np.uint8)
    mask = np.tile(np.array([True, True, True, False]), (2, 2))
    return {"frames": frames, "mask": mask, "tubelet": np.array(2), "patch": np.array(8), "reconstruction": frames,
            "digit": np.array([3, 8]), "motion": np.array([1, 6])}  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished demonstration's folder."""
    return fill(tmp_path)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """The page of a finished demonstration, for the tests that only read it."""
    return page(fill(tmp_path_factory.mktemp("demo")))


def fill(out: Path) -> Path:
    (out / "results.json").write_text(json.dumps(results()))
    for run in ("image_teacher", "video_teacher", "student"):
        (out / run).mkdir()
        lines = [json.dumps(record) for record in records(run == "student")]
        (out / run / "log.jsonl").write_text("\n".join(lines))
    np.savez(out / "pictures.npz", **pictures())
    return out


def change(out: Path, **values: object) -> None:
    (out / "results.json").write_text(json.dumps({**results(), **values}))


def page(out: Path) -> str:
    """The report with plain spaces."""
    return write_report(out).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")


class Balance(HTMLParser):
    """Every element is closed in order; collects ids and the addresses of everything that could be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.images_without_text = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [found[name] for name in ("src", "href", "xlink:href", "srcset", "data") if name in found]
        self.images_without_text += tag == "img" and not found.get("alt")
        self.images_without_text += tag == "svg" and not found.get("aria-label")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def walk(text: str) -> Balance:
    parser = Balance()
    parser.feed(text)
    parser.close()
    return parser


# ---- the whole page ----


def test_page_holds_the_computed_numbers(text):
    assert "beats an untrained network of the same shape on both labels" in text
    assert "digit +20.0 ± 2.0 points, motion +25.0 ± 2.1 points" in text
    assert "11 min 00 s" in text  # 660.5 s, all phases together
    assert "40.0 %" in text and "± 1.5" in text  # the student's digit, sqrt(.4 x .6 / 1000)
    assert "4,096 clips" in text and "31.2 MB" in text
    assert "Mean off the diagonal: 0.91" in text and "Mean off the diagonal: 0.42" in text
    assert "mvd-fast demo --size quick --seed 7" in text and "make demo SIZE=quick" in text
    assert "Digit 3, rotate ccw" in text
    assert "75 % of the patches" in " ".join(text.split())
    assert "Some &lt;fast&gt; CPU" in text
    assert "2 unreadable files" in text


def test_page_is_well_formed_and_self_contained(text):
    found = walk(text)
    assert not found.open
    assert len(found.ids) == len(set(found.ids))
    assert all(re.match(r"#|data:", address) for address in found.addresses)
    assert {address for address in found.addresses if address[0] == "#"} <= {f"#{name}" for name in found.ids}
    assert not re.search(r"https?://|@import|<script", text)
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", text))
    assert found.images_without_text == 0


def test_charts_follow_the_theme(text):
    assert not [name for name, stand_in in plots.THEME.items() if stand_in in text]
    assert all(f"--{name}:" in text for name in plots.THEME)
    assert "prefers-color-scheme: dark" in text and "@media print" in text


# ---- missing pieces ----


def test_nothing_but_results(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    text = page(tmp_path)
    assert not walk(text).open
    for words in ("No probe accuracies", "No log of this run", "No similarity matrices", "No pictures", "No phases"):
        assert words in text
    assert "What the student learned is not known yet" in text


@pytest.mark.parametrize("key", ["probes", "phases", "data"])
def test_one_piece_of_the_results_missing(out, key):
    change(out, **{key: None})
    assert not walk(page(out)).open


def test_unfinished_parts(out):
    """A network that was not probed, a run without a log, a log cut short, a broken picture file."""
    given = results()
    given["phases"][1] |= {"seconds": None}
    change(out, phases=given["phases"], probes={**PROBES, "video teacher": None, "student": {"motion": 0.6}})
    (out / "image_teacher" / "log.jsonl").unlink()
    with open(out / "student" / "log.jsonl", "a") as file:
        file.write('\n{"step": 80, "lo')
    (out / "pictures.npz").write_bytes(b"PK\x03\x04 cut short")
    text = page(out)
    assert not walk(text).open
    assert text.count("No log of this run") == 1
    assert "No pictures" in text and "not measured" in text


@pytest.mark.parametrize("content", [None, '{"size": ', "[1]"])
def test_results_missing_or_broken(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json.*mvd-fast demo"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_failed_write_leaves_the_old_page(out, text, monkeypatch):
    assert page(out) == text  # the same inputs give the same page
    before = (out / "report.html").read_bytes()
    change(out, seed=8)

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(out)
    assert (out / "report.html").read_bytes() == before


# ---- what the numbers say ----


@pytest.mark.parametrize(
    ("digit", "motion", "words"),
    [
        (0.40, 0.75, "beats an untrained network of the same shape on both labels:"),
        (0.21, 0.75, "of the same shape on the motion, but is not measurably better than it on the digit:"),
        (0.10, 0.75, "beats an untrained network of the same shape on the motion, but is worse than it on the digit:"),
        (0.21, 0.49, "is not measurably better than an untrained network of the same shape on both labels:"),
        (0.10, 0.51, "of the same shape on the motion, but is worse than it on the digit:"),
        (0.10, 0.30, "is worse than an untrained network of the same shape on both labels:"),
    ],
)  # fmt: skip
def test_outcome_says_what_was_measured(digit, motion, words):
    given = {**results(), "probes": {**PROBES, "student": {"digit": digit, "motion": motion}}}
    sentence = facts.outcome(facts.gains(facts.accuracies(given)))
    assert words in sentence
    assert facts.signed(100 * (digit - 0.2)) in sentence


@pytest.mark.parametrize(
    ("image", "video", "words"),
    [(0.9, 0.4, "show it:"), (0.50, 0.51, "do not show it:"), (0.4, 0.9, "show the opposite:")],
)
def test_similarity_sentence(image, video, words):
    given = {"similarity": {"image teacher": similarity(image), "video teacher": similarity(video)}}
    sentence = facts.similarity_sentence(facts.similarities(given))
    assert words in sentence and f"{image:.2f}" in sentence and f"{video:.2f}" in sentence


def test_step_parts_are_milliseconds_per_clip():
    parts = facts.step_parts(records(with_teachers=True))  # 640 clips in 4 s per record
    expected = {"data": 0.1, "teachers": 0.7, "forward": 0.4, "backward": 1.0, "optimizer": 0.2, "other": 1.6}
    assert parts == pytest.approx({name: 1000 * seconds / 640 for name, seconds in expected.items()})


def test_phase_numbers_come_from_the_log():
    log = [{**record, "clips_per_second": rate} for record, rate in zip(records(False), (1.0, 90.0, 80.0), strict=True)]
    log[0] |= {"seconds": 36.0, "data_wait_share": 0.25}
    phase = facts.phases(Inputs(results(), {"student": log}))[3]
    assert phase.clips_per_second == 80.0
    assert phase.data_wait == pytest.approx((36 * 0.25 + 8 * 0.05) / 44)
    assert phase.bad_files == 2


# ---- pictures and curves ----


def test_masked_tubes_are_grey_and_the_rest_is_untouched():
    frames = pictures()["frames"][0]
    mask = np.zeros((2, 2, 2), dtype=bool)
    mask[1, 0, 1] = True  # frames 2-3, upper right
    seen = plots.masked_frames(frames, mask.reshape(-1), tubelet=2, patch=8)
    assert (seen[2:, :8, 8:] == plots.MASKED).all()
    seen[2:, :8, 8:] = frames[2:, :8, 8:]
    assert (seen == frames).all()


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="7 tokens for a clip of 2 x 2 x 2 tubes"):
        plots.masked_frames(pictures()["frames"][0], np.zeros(7, dtype=bool), tubelet=2, patch=8)


def test_smoothing_is_a_running_mean():
    values = np.random.default_rng(1).normal(size=100)
    smoothed = plots.smooth(values)
    assert smoothed[50] == pytest.approx(values[48:53].mean())
    assert smoothed[0] == pytest.approx(values[:3].mean()) and smoothed[-1] == pytest.approx(values[-3:].mean())
    assert plots.smooth(values[:3]) == pytest.approx(values[:3])

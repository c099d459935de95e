"""The progress line: what it shows, in how many columns."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mvd_fast.training import progress
from mvd_fast.training.progress import ProgressLine, fitted, time_left

NOTES = ["loss 0.3123", "1234 clips/s", "data wait 12%", "loss_image 0.1512", "loss_video 0.1611"]
PARTS = ["1238/93600", "eta 3d 07:46", *NOTES]


@pytest.mark.parametrize("title", ["tiny", "vitb_from_vitb", "finetune/ssv2_vitb_under_a_very_long_name"])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_the_line_fits_and_shows_what_matters_most(title: str, width: int) -> None:
    line = fitted(title, 0.5, PARTS, width)
    assert len(line) <= width
    shown = [part for part in PARTS if part in line]
    assert shown == PARTS[: len(shown)] and len(shown) >= 2
    assert line.startswith(title[:11])
    if width >= 80:
        assert {"loss 0.3123", "1234 clips/s", "data wait 12%"} <= set(shown)


def test_the_bar_is_filled_to_the_share() -> None:
    assert fitted("a", 0.25, ["1/4"], 80) == "a ━━━━━━────────────────── 1/4"
    assert fitted("a", 1.0, ["4/4"], 14) == "a ━━━━━━━━ 4/4"
    assert fitted("a", 1.0, ["4/4"], 13) == "a 4/4"


def test_time_left() -> None:
    assert [time_left(seconds) for seconds in (None, 0, 61, 3600 * 25 + 61)] == [
        "-:--:--",
        "0:00:00",
        "0:01:01",
        "1d 01:01",
    ]


@pytest.mark.parametrize("width", [40, 80, 132])
def test_on_a_terminal_no_line_is_wider_than_it(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    monkeypatch.setattr(progress, "Console", lambda **options: console)
    with ProgressLine("vitb_from_vitb", total=93600, done=1237, enabled=True) as line:
        line.advance(NOTES)
    lines = re.sub(r"\x1b\[\??\w+|\r", "\n", written.getvalue()).splitlines()
    assert any("1238/93600" in line for line in lines) and max(map(len, lines)) <= width


def test_without_a_terminal_progress_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("run", total=2, done=0, enabled=True) as line:
        line.advance()
        line.advance(["loss 0.5", "3 clips/s"])
    assert "run 2/2 eta 0:00:00 loss 0.5 3 clips/s\n" in capsys.readouterr().err
    with ProgressLine("run", total=1, done=0, enabled=False) as line:
        line.advance(["loss 0.5"])
    assert capsys.readouterr().err == ""

"""Files with any name go through checking, training, testing and printing."""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from test_lists import ODD_NAMES
from video_files import data_setup, loader_of, write_video

from mvd_fast.data.check import check_list
from mvd_fast.data.index import load_index
from mvd_fast.data.lists import ListError, read_dataset
from mvd_fast.data.quarantine import quarantine_path, read_quarantine
from mvd_fast.names import printable

NAMES = [os.fsdecode(name.replace(b".mp4", b"_vp9.webm")) for name in ODD_NAMES]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder with every odd name twice: a video, and under `broken ...` what is none."""
    folder = tmp_path_factory.mktemp("odd")
    video = write_video(folder / "plain_vp9.webm", 12).read_bytes()
    for name in NAMES:
        (folder / name).write_bytes(video)
        (folder / f"broken {name}").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def listed(clips) -> Path:
    """The same as a list, with every path in quotes."""
    paths = [*NAMES, *(f"broken {name}" for name in NAMES)]
    text = "".join('"' + path.replace('"', '""') + f'",{label % 3}\n' for label, path in enumerate(paths))
    (clips / "list.csv").write_bytes(text.encode(errors="surrogateescape"))
    return clips / "list.csv"


@pytest.fixture(params=["folder", "list"])
def dataset(request, clips, listed) -> str:
    return str(clips if request.param == "folder" else listed)


def broken(paths) -> set[str]:
    return {os.path.basename(path) for path in paths if os.path.basename(path).startswith("broken ")}


def test_check_index_and_quarantine_keep_every_name(dataset):
    report = check_list(dataset)
    assert broken(report.bad) == {f"broken {name}" for name in NAMES} and len(report.bad) == len(NAMES)
    assert read_quarantine(dataset) == report.bad
    assert set(load_index(report.index)) == {entry.path for entry in read_dataset(dataset, extensions=(".webm",))}
    assert check_list(dataset).scanned == 0  # every name was found again
    lines = Path(quarantine_path(dataset)).read_text(encoding="ascii").split("\n")
    assert [json.loads(line)["path"] for line in lines if line] == list(report.bad)


def test_training_shows_every_file_and_leaves_out_the_quarantine(dataset, caplog):
    check_list(dataset)
    with closing(loader_of(data_setup(dataset))) as loader, caplog.at_level(logging.WARNING):
        batches = list(itertools.islice(loader.batches(0), 2 * loader.steps_per_epoch))
        shown = {os.path.basename(name) for batch in batches for name in loader.names(batch["index"])}
    assert not loader.bad_files and loader.replaced
    assert {*NAMES} <= shown and not broken(shown)
    assert not caplog.records


def test_warnings_of_bad_files_are_one_line_each(dataset, caplog):
    if os.path.exists(quarantine_path(dataset)):
        os.unlink(quarantine_path(dataset))
    with closing(loader_of(data_setup(dataset, max_bad_share=1.0))) as loader:
        with caplog.at_level(logging.WARNING):
            list(itertools.islice(loader.batches(0), loader.steps_per_epoch))
        found = broken(loader.bad_files)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(found) > len(NAMES) // 2
    assert all(message.isprintable() for message in messages)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "utf-16"])
def test_the_command_prints_on_any_terminal(dataset, encoding):
    """Standard output in another encoding, as of a terminal that is not UTF-8."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "mvd_fast.cli", "data", "check", dataset]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=600)
    out = done.stdout.decode(encoding)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    rows = [line for line in out.splitlines() if "broken " in line and "not a readable video" in line]
    assert len(rows) == len(NAMES)
    for name in NAMES:
        shown = printable(name).encode(encoding, "backslashreplace").decode(encoding)
        assert any(f"broken {shown}:" in row for row in rows)


def test_a_posix_locale_without_utf8_reads_the_same_bytes(listed):
    """File names are bytes there too: as many usable files, and the same names in the quarantine."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "mvd_fast.cli", "data", "check", str(listed)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=600)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert f"{2 * len(NAMES)} files".encode() in done.stdout and f"{len(NAMES)} unusable".encode() in done.stdout


def test_an_error_about_an_odd_name_is_one_line(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9\n.txt")
    command = [sys.executable, "-m", "mvd_fast.cli", "data", "check", os.fsencode(path)]
    done = subprocess.run(command, capture_output=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.decode().strip().splitlines() == [
        f"mvd-fast: error: {printable(path)} does not exist; give a text file with one `path label` a line, or a "
        "folder with one folder per class"
    ]


def test_a_config_says_which_name_is_not_utf8(tmp_path):
    command = [sys.executable, "-m", "mvd_fast.cli", "config", "show", "vitl", "--set", b"data.train=caf\xe9.txt"]
    done = subprocess.run(command, capture_output=True, timeout=600)
    assert done.returncode == 2
    assert r"data.train: 'caf\xe9.txt' is not UTF-8; rename it" in done.stderr.decode()


# ---- the quarantine ----


def test_a_quarantine_of_the_earlier_form_is_not_passed_over(tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("a_vp9.webm 0\nb_vp9.webm 1\n")
    write_video(tmp_path / "a_vp9.webm", 4)
    old = tmp_path / "list.txt.quarantine.txt"
    old.write_text(f"# comment\n{tmp_path}/b_vp9.webm\tbroken\n")
    with pytest.raises(ListError, match=r"quarantine\.txt is of a form .* run `mvd-fast data check .*list\.txt` again"):
        loader_of(data_setup(listed))
    check_list(str(listed))
    assert not old.exists() and list(read_quarantine(str(listed))) == [str(tmp_path / "b_vp9.webm")]


@pytest.mark.parametrize(
    "line", ["a.mp4\tbroken", '{"path": "a.mp4"}', '{"path": null, "reason": "is empty"}', "[]", "3"]
)
def test_a_faulty_line_of_a_quarantine_is_named(tmp_path, line):
    Path(quarantine_path(str(tmp_path / "list.txt"))).write_text('{"path": "b", "reason": "is empty"}\n\n' + line)
    with pytest.raises(ListError, match=r"list\.txt\.quarantine\.jsonl, line 3: it must be a JSON object such as"):
        read_quarantine(str(tmp_path / "list.txt"))

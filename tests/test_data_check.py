"""`mvd-fast data check`: what it reports, what it keeps, what it does again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import dying_worker
import pytest
from PIL import Image
from rich.console import Console
from video_files import write_broken, write_video

from mvd_fast.data import check, containers, index
from mvd_fast.data.check import advise, check_list, main
from mvd_fast.data.index import FileFacts, load_index, save_index
from mvd_fast.data.lists import ListError, write_beside
from mvd_fast.data.quarantine import read_quarantine


@pytest.fixture
def dataset(tmp_path) -> tuple[Path, dict[str, str]]:
    words = write_broken(tmp_path)
    write_video(tmp_path / "short_vp9.webm", 3)
    names = ["whole_vp9.webm", "whole_h264.mp4", "whole_mjpeg.mkv", "short_vp9.webm", *words]
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{name} 0\n" for name in names))
    return listed, words


def quiet(listed: Path, **options):
    return check_list(str(listed), console=Console(quiet=True), **options)


def by_name(files: dict[str, str]) -> dict[str, str]:
    return {Path(path).name: reason for path, reason in files.items()}


def test_every_unusable_file_is_named_with_its_reason(dataset):
    listed, words = dataset
    report = quiet(listed, decode=True)
    bad = by_name(report.bad)
    assert bad.keys() == words.keys()
    for name, word in words.items():
        if name.startswith("holes"):
            assert "frames can be decoded" in bad[name] or "is damaged" in bad[name]
        else:
            assert word in bad[name]
    assert by_name(read_quarantine(str(listed))) == bad
    assert report.files == report.scanned == len(words) + 4
    assert report.codecs == {"vp9": 2, "h264": 1, "mjpeg": 1}


def test_without_decoding_only_containers_are_judged(dataset):
    listed, words = dataset
    assert by_name(quiet(listed).bad).keys() == {name for name in words if not name.startswith("holes")}


def test_facts_of_a_video(dataset):
    listed, _ = dataset
    facts = load_index(quiet(listed).index)[str(listed.parent / "whole_vp9.webm")]
    assert (facts.frames, facts.fps, facts.width, facts.height) == (24, 24.0, 64, 48)
    assert (facts.codec, facts.pixel_format, facts.key_every) == ("vp9", "yuv420p", 12.0)


def test_short_videos_are_set_aside_when_asked(dataset):
    listed, _ = dataset
    assert "short_vp9.webm" not in by_name(quiet(listed).bad)
    assert by_name(quiet(listed, min_frames=4).bad)["short_vp9.webm"] == (
        "is too short: 3 frames, at least 4 were asked for"
    )


def test_a_second_scan_looks_only_at_what_changed(dataset, monkeypatch):
    listed, _ = dataset
    quiet(listed)
    seen = []
    scan = index.scan_file
    monkeypatch.setattr(index, "scan_file", lambda path, decode: (seen.append(Path(path).name), scan(path, decode))[1])
    assert quiet(listed).scanned == len(seen) == 1  # the missing file has no stamp to trust
    assert seen.pop() == "missing.mp4"

    write_video(listed.parent / "new_vp9.webm", 5)
    listed.write_text(listed.read_text() + "new_vp9.webm 1\n")
    repaired = listed.parent / "empty.webm"
    repaired.write_bytes((listed.parent / "whole_vp9.webm").read_bytes())
    report = quiet(listed)
    assert sorted(seen) == ["empty.webm", "missing.mp4", "new_vp9.webm"]
    assert "empty.webm" not in by_name(report.bad) and "empty.webm" not in by_name(read_quarantine(str(listed)))
    assert quiet(listed, decode=True).scanned == report.files  # looks deeper than the index does


def test_what_could_not_be_read_is_looked_at_again(tmp_path, monkeypatch):
    """Permissions that are mended and mounts that come back change neither size nor time."""
    listed = tmp_path / "list.txt"
    listed.write_text(f"{write_video(tmp_path / 'whole_vp9.webm').name} 0\n")

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(containers.np, "fromfile", refused)
        assert by_name(quiet(listed).bad) == {"whole_vp9.webm": "cannot be read: Permission denied"}
    report = quiet(listed)
    assert (report.scanned, report.bad) == (1, {})


@pytest.mark.parametrize("name", ["pipe.mp4", "pipe.jpg"])
def test_a_pipe_is_no_file(tmp_path, name):
    """Nobody may ever write to it, and reading would wait."""
    os.mkfifo(tmp_path / name)
    end = os.open(tmp_path / name, os.O_RDWR | os.O_NONBLOCK)
    os.write(end, b"x")
    assert index.scan_file(str(tmp_path / name)).error == "is not a regular file"
    os.close(end)


def test_an_interrupted_scan_keeps_what_it_saw(dataset, monkeypatch):
    listed, _ = dataset
    scan = index.scan_file

    def interrupted(path, decode):
        if path.endswith("short_vp9.webm"):
            raise KeyboardInterrupt
        return scan(path, decode)

    monkeypatch.setattr(index, "scan_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(listed)
    assert len(load_index(f"{listed}.index.json")) == 3


def test_processes_find_the_same(dataset, monkeypatch):
    listed, _ = dataset
    alone = quiet(listed)
    os.unlink(alone.index)
    monkeypatch.setattr(index, "INLINE_BELOW", 0)
    report = quiet(listed, processes=2)
    assert report.scanned == report.files and report.bad == alone.bad


def test_a_file_that_ends_its_process_is_named_and_the_others_are_scanned(dataset, monkeypatch):
    listed, words = dataset
    monkeypatch.setattr(index, "INLINE_BELOW", 1)
    monkeypatch.setattr(index, "AHEAD", 1)
    monkeypatch.setattr(index, "scan_file", dying_worker.scan_file)
    bad = by_name(quiet(listed, processes=2).bad)
    assert bad["short_vp9.webm"].startswith("ends the process that reads it")
    assert bad.keys() == {"short_vp9.webm", *(name for name in words if not name.startswith("holes"))}


def test_the_quarantine_goes_when_nothing_is_bad(tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("a_vp9.webm 0\n")
    assert by_name(quiet(listed).bad) == {"a_vp9.webm": "cannot be read: No such file or directory"}
    assert Path(f"{listed}.quarantine.jsonl").exists()
    write_video(tmp_path / "a_vp9.webm", 4)
    assert not quiet(listed).bad
    assert not Path(f"{listed}.quarantine.jsonl").exists()


def test_image_folders_are_scanned_too(tmp_path):
    (tmp_path / "set" / "ant").mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(tmp_path / "set" / "ant" / "a.jpg")
    (tmp_path / "set" / "ant" / "b.png").write_bytes(b"nothing")
    report = quiet(tmp_path / "set")
    assert report.files == 2 and list(by_name(report.bad)) == ["b.png"]
    assert report.index == str(tmp_path / "set.index.json")


def test_a_damaged_index_is_rebuilt(dataset):
    listed, _ = dataset
    report = quiet(listed)
    Path(report.index).write_text('{"version": 1, "files": {"a": {"size"')
    assert quiet(listed).scanned == report.files


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "list.index.json"
    save_index(str(target), {"a": FileFacts(1, 2)})
    before = target.read_text()

    def fails(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ValueError, match="disk full"):
        save_index(str(target), {"b": FileFacts(1, 2)})
    assert target.read_text() == before
    assert os.listdir(tmp_path) == ["list.index.json"]
    with pytest.raises(ValueError, match="cannot be written"):
        write_beside(str(tmp_path / "none" / "x"), "text")


def test_advice_names_what_is_slow_and_how_to_re_encode():
    common = {"frames": 300, "fps": 30, "pixel_format": "yuv420p", "is_video": True}
    fast = FileFacts(1, 1, width=320, height=240, codec="vp9", key_every=30, by_dali=True, **common)
    slow = FileFacts(1, 1, width=1280, height=720, codec="h264", key_every=250, **common)
    assert advise([fast]) == []
    advice = advise([fast, slow])
    codec, keys, size, for_cpu, for_gpu = advice
    assert codec.startswith("1 of 2 videos (h264 yuv420p)")
    assert "every 250 frames" in keys
    assert "median 720" in size
    assert "libvpx-vp9" in for_cpu and "libx264" in for_gpu and f"-g {check.LONG_GOP}" in for_cpu


def test_the_command_prints_and_returns_whether_all_is_well(dataset, capsys):
    listed, words = dataset
    assert main([str(listed), "--decode"]) == 1
    printed = capsys.readouterr().out
    for name in words:
        assert name in printed
    assert "8 unusable" in printed and "quarantine.jsonl" in printed
    good = listed.parent / "good.txt"
    good.write_text("whole_vp9.webm 0\n")
    assert main([str(good)]) == 0
    assert json.loads(Path(f"{good}.index.json").read_text())["version"] == index.VERSION


def test_a_missing_list_is_one_sentence(tmp_path):
    with pytest.raises(ListError, match="does not exist"):
        main([str(tmp_path / "none.txt")])

"""List files and folders."""

from __future__ import annotations

import os

import pytest

from mvd_fast.data.lists import Entry, ListError, parse_line, read_dataset


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a/b.mp4 3", ("a/b.mp4", 3)),
        ("a/b.mp4", ("a/b.mp4", None)),
        ("a/b.mp4\t3", ("a/b.mp4", 3)),
        ("a b.mp4\t3", ("a b.mp4", 3)),
        ("a/b.mp4,3", ("a/b.mp4", 3)),
        ("a b.mp4, 3", ("a b.mp4", 3)),
        ("a b c.mp4 3", ("a b c.mp4", 3)),
        ("a b c.mp4", ("a b c.mp4", None)),
        ('"a b.mp4" 3', ("a b.mp4", 3)),
        ("'a b.mp4',3", ("a b.mp4", 3)),
        ('"a, 5.mp4"', ("a, 5.mp4", None)),
        ('"a b.mp4"\t3', ("a b.mp4", 3)),
        ("a,b.mp4 -1", ("a,b.mp4", -1)),
        ("a,b.mp4", ("a,b.mp4", None)),
        ("  a.mp4   7  ", ("a.mp4", 7)),
        ("", None),
        ("   ", None),
        ("# a.mp4 3", None),
    ],
)
def test_parse_line(line, expected):
    assert parse_line(line) == expected


def test_list_paths_start_from_its_folder_or_the_root(tmp_path):
    listed = tmp_path / "train.txt"
    listed.write_text("# header\n\na.mp4 1\nsub dir/b.mp4 2\n/abs/c.mp4 3\n", encoding="utf-8-sig")
    assert read_dataset(str(listed)) == [
        Entry(str(tmp_path / "a.mp4"), 1),
        Entry(str(tmp_path / "sub dir/b.mp4"), 2),
        Entry("/abs/c.mp4", 3),
    ]
    assert read_dataset(str(listed), root="/data")[0] == Entry("/data/a.mp4", 1)


def test_folder_of_class_folders(tmp_path):
    for name in ("cat/2.jpg", "cat/1.JPG", "cat/notes.txt", "ant/deep/x.jpg", ".hidden/y.jpg", "loose.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [(os.path.relpath(e.path, tmp_path), e.label) for e in read_dataset(str(tmp_path), extensions=(".jpg",))]
    assert found == [("ant/deep/x.jpg", 0), ("cat/1.JPG", 1), ("cat/2.jpg", 1)]


def test_folder_without_classes_has_no_labels(tmp_path):
    (tmp_path / "b.mp4").touch()
    (tmp_path / "a.mp4").touch()
    assert [(os.path.basename(e.path), e.label) for e in read_dataset(str(tmp_path))] == [
        ("a.mp4", None),
        ("b.mp4", None),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a.mp4 1\n"b.mp4 2\n', ["line 2", "never closed"]),
        ('"a.mp4" dog\n', ["line 1", "'dog'", "integer"]),
        ("a.mp4 1\n\nb.mp4\n", ["line 3", "no label"]),
        ("# nothing\n", ["lists no files"]),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, words):
    listed = tmp_path / "train.txt"
    listed.write_text(text)
    with pytest.raises(ListError) as caught:
        read_dataset(str(listed), need_labels=True)
    for word in [*words, str(listed)]:
        assert word in str(caught.value)


def test_missing_list_and_wrong_encoding(tmp_path):
    with pytest.raises(ListError, match="does not exist; give a text file"):
        read_dataset(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes("café.mp4 1\n".encode("latin-1"))
    with pytest.raises(ListError, match="UTF-8"):
        read_dataset(str(tmp_path / "latin.txt"))
    with pytest.raises(ListError, match=r"lists no files ending in \.jpg"):
        (tmp_path / "empty").mkdir()
        read_dataset(str(tmp_path / "empty"), extensions=(".jpg",))

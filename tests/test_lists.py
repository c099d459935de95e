"""List files and folders."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from mvd_fast.data.lists import Entry, ListError, class_folders, parse_line, read_dataset
from mvd_fast.errors import UserError
from mvd_fast.names import printable, split_lines

ODD_NAMES = [  # what file systems allow and lists must hold
    b"caf\xe9.mp4",  # Latin-1
    "café.mp4".encode(),
    b"\xff\xfe.mp4",
    b"tab\there.mp4",
    b"line\nend.mp4",
    b"return\r.mp4",
    b"both\r\nends.mp4",
    "u\u2028\u2029sep.mp4".encode(),
    "next\u0085line.mp4".encode(),
    b"form\x0c\x1c\x1dfeed.mp4",
    "no\u00a0break 3.mp4".encode(),
    b"\xc2\xa0begins.mp4",
    b" begins and ends .mp4",
    b'"quoted".mp4',
    b"'single'.mp4",
    b"#1 goal.mp4",
    b"# comment.mp4",
    b"a.mp4 300 3.mp4",
    b"colour \x1b[31m.mp4",
    b"-dash,comma;.mp4",
]


def nothing(path: str) -> bool:
    """No file exists."""
    return False


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a/b.mp4 3", ("a/b.mp4", 3)),
        ("a/b.mp4", ("a/b.mp4", None)),
        ("a/b.mp4\t3", ("a/b.mp4", 3)),
        ("a b.mp4\t3", ("a b.mp4", 3)),
        ("a/b.mp4,3", ("a/b.mp4", 3)),
        ("a b.mp4, 3", ("a b.mp4", 3)),
        ("a b.mp4 , 3", ("a b.mp4", 3)),
        ("a b.mp4,3,", ("a b.mp4", 3)),
        ("a b.mp4,", ("a b.mp4", None)),
        ("a b c.mp4 3", ("a b c.mp4", 3)),
        ("a b c.mp4", ("a b c.mp4", None)),
        ('"a b.mp4" 3', ("a b.mp4", 3)),
        ("'a b.mp4',3", ("a b.mp4", 3)),
        ('"a, 5.mp4"', ("a, 5.mp4", None)),
        ('"a b.mp4"\t3', ("a b.mp4", 3)),
        ('"a ""b"".mp4",3', ('a "b".mp4', 3)),
        ('"clip 12" 3', ("clip 12", 3)),
        ("a,b.mp4 -1", ("a,b.mp4", -1)),
        ("a,b.mp4", ("a,b.mp4", None)),
        ("  a.mp4   7  ", ("a.mp4", 7)),
        ("A.MP4 7", ("A.MP4", 7)),
        ("a.mp4 12.mp4 7", ("a.mp4 12.mp4", 7)),
        ("", None),
        ("   ", None),
        ("# a.mp4 3", None),
        ("#\ta.mp4 3", None),
        ("#", None),
        # path frames label
        ("a b.mp4 300 3", ("a b.mp4", 3)),
        ("a b.mp4\t300\t3", ("a b.mp4", 3)),
        ("a b.mp4,300,3", ("a b.mp4", 3)),
        ('"a b.mp4",300,3', ("a b.mp4", 3)),
        ("a.mp4 0 -1", ("a.mp4", -1)),
        ("clip 300 3", ("clip", 3)),  # no file is there to say otherwise
        # names of classes
        ("a b.mp4,ApplyLipstick", ("a b.mp4", "ApplyLipstick")),
        ("a b.mp4 ApplyLipstick", ("a b.mp4", "ApplyLipstick")),
        ("a b.mp4\tplaying guitar", ("a b.mp4", "playing guitar")),
        ("a b.mp4 playing guitar", ("a b.mp4", "playing guitar")),
        ('a b.mp4 300 "ApplyLipstick"', ("a b.mp4", "ApplyLipstick")),
        ("a b.mp4,300,ApplyLipstick", ("a b.mp4", "ApplyLipstick")),
        ('"a b.mp4","300","playing guitar"', ("a b.mp4", "playing guitar")),
        ('"a b.mp4","300","3"', ("a b.mp4", 3)),
        ("a.mp4 'playing guitar'", ("a.mp4", "playing guitar")),
        ("a.mp4 don't jump", ("a.mp4", "don't jump")),
        ('a.mp4,"lifting, then dropping"', ("a.mp4", "lifting, then dropping")),
        ('a.mp4 "2 point shot"', ("a.mp4", "2 point shot")),
        ("a.mp4,2 point shot", ("a.mp4", "2 point shot")),
        ("a.mp4 lifting, then dropping", ("a.mp4", "lifting, then dropping")),
        ("a.jpg été", ("a.jpg", "été")),
        # only blanks and tabs separate, only 0 to 9 are digits
        ("a.mp4\u00a03", ("a.mp4\u00a03", None)),
    ],
)
def test_parse_line(line, expected):
    assert parse_line(line, nothing) == (Entry(*expected) if expected else None)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('"b.mp4 2', 'the quote " is never closed'),
        ('"a.mp4"2', "the closing quote is followed by '2'"),
        ("a.mp4 1 4 6", "'1 4 6' is more than a label"),
        ("a.mp4,1.0", "the label '1.0' is neither a whole number nor the name of a class"),
        ("a.mp4 class 3", "'class 3' may be a class's name or have a number beside it; put the name in quotes"),
        ("a.mp4 9 ball", "'9 ball' may be a class's name or have a number beside it"),
        ('a.mp4,"jump', "the label '\"jump' cannot be read: unexpected end"),
        ("a.mp4,jump,train", "'jump,train' is more than a label"),
        ('a.mp4 "jump" 3', "is more than a label"),
        ("#1 goal.mp4 0", "there is no file '#1 goal.mp4'; a comment begins with `# `"),
        ("a.mp4 \u0663", "is neither a whole number nor the name of a class"),  # a digit, but not of ours
        (",3", "there is no path before the label"),
    ],
)
def test_what_could_mean_two_things_is_refused(line, sentence):
    with pytest.raises(UserError) as caught:
        parse_line(line, nothing)
    assert sentence in str(caught.value)


def test_without_a_known_ending_the_files_that_exist_decide(tmp_path):
    for name in ("clip 12", "old", "old 7", "comma, 5", "frames"):
        (tmp_path / name).touch()
    listed = tmp_path / "list.txt"
    listed.write_text("clip 12 3\nclip 12\ncomma, 5,1\nframes 300 2\nframes jump\nfolder/gone 300 4\n")
    found = [(os.path.relpath(entry.path, tmp_path), entry.label) for entry in read_dataset(str(listed))]
    assert found == [
        ("clip 12", 3), ("clip 12", None), ("comma, 5", 1), ("frames", 2), ("frames", "jump"), ("folder/gone", 4)
    ]  # fmt: skip
    listed.write_text("clip 12 3\nold 7 1\n")
    with pytest.raises(
        ListError, match="line 2: it may name 'old' and 'old 7', and both exist; put the path in quotes"
    ):
        read_dataset(str(listed))
    listed.write_text('"old 7" 1\n"old",2\n')
    assert [entry.label for entry in read_dataset(str(listed))] == [1, 2]


def test_list_paths_start_from_its_folder_or_the_root(tmp_path):
    listed = tmp_path / "train.txt"
    listed.write_text("# header\n\na.mp4 1\nsub dir/b.mp4 2\n/abs/c.mp4 3\n", encoding="utf-8-sig")
    assert read_dataset(str(listed)) == [
        Entry(str(tmp_path / "a.mp4"), 1),
        Entry(str(tmp_path / "sub dir/b.mp4"), 2),
        Entry("/abs/c.mp4", 3),
    ]
    assert read_dataset(str(listed), root="/data")[0] == Entry("/data/a.mp4", 1)


# ---- names ----


@pytest.mark.parametrize("name", ODD_NAMES, ids=repr)
def test_a_list_as_csv_writers_write_it_holds_any_name(tmp_path, name):
    (tmp_path / os.fsdecode(name)).touch()
    listed = tmp_path / "list.csv"
    with open(listed, "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow([os.fsdecode(name), 7])
        writer.writerow([os.fsdecode(name), "jump"])
    assert [(os.path.basename(os.fsencode(path)), label) for path, label in read_dataset(str(listed))] == [
        (name, 7), (name, "jump")
    ]  # fmt: skip


def is_plain(name: bytes) -> bool:
    """Whether a list can hold it without quotes."""
    return name.strip() == name and name[0] not in b"\"'#" and not set(name) & set(b"\r\n")


@pytest.mark.parametrize("name", list(filter(is_plain, ODD_NAMES)), ids=repr)
def test_a_plain_line_holds_any_name_without_line_ends(tmp_path, name):
    (tmp_path / os.fsdecode(name)).touch()
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"first.mp4 0\n" + name + b" 7\r\n" + name + b"\rlast.mp4 2")
    found = [(os.path.basename(os.fsencode(path)), label) for path, label in read_dataset(str(listed))]
    assert found == [(b"first.mp4", 0), (name, 7), (name, None), (b"last.mp4", 2)]


def test_a_name_that_begins_with_a_hash_is_a_file(tmp_path):
    (tmp_path / "#1 goal.mp4").touch()
    listed = tmp_path / "list.txt"
    listed.write_text("# comment.mp4 1\n#\n#1 goal.mp4 0\n")
    assert read_dataset(str(listed)) == [Entry(str(tmp_path / "#1 goal.mp4"), 0)]
    listed.write_text("#1 gaol.mp4 0\n")
    with pytest.raises(ListError, match=r"line 1: there is no file '#1 gaol\.mp4'; a comment begins"):
        read_dataset(str(listed))


def test_folders_hold_any_name(tmp_path):
    for name in ODD_NAMES:
        (tmp_path / os.fsdecode(name)).touch()
    assert {os.path.basename(os.fsencode(entry.path)) for entry in read_dataset(str(tmp_path))} == set(ODD_NAMES)


def test_a_list_in_another_encoding_than_the_disk_is_refused(tmp_path):
    (tmp_path / "café.mp4").touch()
    listed = tmp_path / "latin.txt"
    listed.write_bytes("café.mp4 1\nplain.mp4 1\n".encode("latin-1"))
    with pytest.raises(ListError, match=r"latin\.txt is not UTF-8, and no file has the bytes .*/caf\\xe9\.mp4; save"):
        read_dataset(str(listed))
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).touch()
    assert os.path.exists(read_dataset(str(listed))[0].path)
    listed.write_text("a.mp4 1\n", encoding="utf-16")
    with pytest.raises(ListError, match="is UTF-16 text; save it as UTF-8"):
        read_dataset(str(listed))


@pytest.mark.parametrize("name", ODD_NAMES, ids=repr)
def test_printable_names_are_one_line_of_plain_characters(name):
    shown = printable(os.fsdecode(name))
    assert shown.isprintable() and shown.encode("utf-8")
    assert printable(shown) == shown


def test_printable_keeps_what_prints():
    assert printable("a b/café 日本.mp4") == "a b/café 日本.mp4"
    assert printable(os.fsdecode(b"caf\xe9\t\n\x1b.mp4")) == r"caf\xe9\t\n\x1b.mp4"
    assert printable("a\u2028\u0085") == r"a\u2028\u0085"


def test_lines_end_where_lines_end():
    assert split_lines("a\r\nb\rc\nd\u2028\u0085\x0b\x0c\x1c") == ["a", "b", "c", "d\u2028\u0085\x0b\x0c\x1c"]
    assert split_lines("") == []


# ---- folders ----


def test_folder_of_class_folders(tmp_path):
    for name in ("cat/2.jpg", "cat/1.JPG", "cat/notes.txt", "ant/deep/x.jpg", ".hidden/y.jpg", "loose.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [(os.path.relpath(e.path, tmp_path), e.label) for e in read_dataset(str(tmp_path), extensions=(".jpg",))]
    assert found == [("ant/deep/x.jpg", "ant"), ("cat/1.JPG", "cat"), ("cat/2.jpg", "cat")]


def test_folder_without_classes_has_no_labels(tmp_path):
    (tmp_path / "b.mp4").touch()
    (tmp_path / "a.mp4").touch()
    assert [(os.path.basename(e.path), e.label) for e in read_dataset(str(tmp_path))] == [
        ("a.mp4", None),
        ("b.mp4", None),
    ]
    with pytest.raises(ListError, match="has no labels; give `path label` lines"):
        read_dataset(str(tmp_path), need_labels=True)


@pytest.mark.parametrize("target", [".", "..", "../..", "../ant"])
def test_a_folder_that_links_to_its_parent_is_visited_once(tmp_path, target):
    root = tmp_path / "root"
    for name in ("ant/a.mp4", "bee/deep/b.mp4"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    (root / "bee" / "deep" / "link").symlink_to(target)
    if target == "../ant":  # not a parent: two classes that link to each other
        (root / "bee" / "deep" / "link").unlink()
        (root / "bee" / "deep" / "link").symlink_to("../../ant")
        (root / "ant" / "link").symlink_to("../bee")
    found = [os.path.relpath(entry.path, root) for entry in read_dataset(str(root))]
    expected = ["ant/a.mp4", "bee/deep/b.mp4"]
    if target == "../ant":
        expected = ["ant/a.mp4", "ant/link/deep/b.mp4", "bee/deep/b.mp4", "bee/deep/link/a.mp4"]
    assert found == expected


@pytest.mark.parametrize("target", [".", "..", "../../.."])
@pytest.mark.parametrize("place", ["link", "ant/link"])
def test_a_link_to_what_a_set_lies_in_is_no_class_and_brings_no_files(tmp_path, place, target):
    root = tmp_path / "outer" / "root"
    for name in ("ant/a.mp4", "bee/b.mp4"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    (tmp_path / "outer" / "c.mp4").touch()
    (root / place).symlink_to(target)
    (tmp_path / "way").symlink_to(root)
    for folder in (root, tmp_path / "way"):
        assert class_folders(str(folder)) == ["ant", "bee"]
        found = [(os.path.relpath(entry.path, folder), entry.label) for entry in read_dataset(str(folder))]
        assert found == [("ant/a.mp4", "ant"), ("bee/b.mp4", "bee")]


def test_links_to_other_folders_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.mp4").touch()
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "more").symlink_to("../../elsewhere")
    found = [os.path.relpath(entry.path, tmp_path / "set") for entry in read_dataset(str(tmp_path / "set"))]
    assert found == ["ant/more/x.mp4", "bee/more/x.mp4"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "ant" / "closed").mkdir(parents=True)
    (tmp_path / "ant" / "a.mp4").touch()
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ListError, match="closed cannot be listed: Permission denied"):
        read_dataset(str(tmp_path))


# ---- errors ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a.mp4 1\n"b.mp4 2\n', ["line 2", "never closed"]),
        ('"a.mp4" 1 dog\n', ["line 1", "'1 dog'", "put the name in quotes"]),
        ("a.mp4 1\n\nb.mp4\n", ["line 3", "no label"]),
        ('"a\nb.mp4" 1\n\nc.mp4\n', ["line 4", "no label"]),
        ("# nothing\n", ["lists no files"]),
        ("path,label\na.mp4,1\n", ["line 1", "'path,label' seems to be a header"]),
        ("video_path frames label\na.mp4,1\n", ["line 1", "seems to be a header"]),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, words):
    listed = tmp_path / "train.txt"
    listed.write_text(text)
    with pytest.raises(ListError) as caught:
        read_dataset(str(listed), need_labels=True)
    for word in [*words, str(listed)]:
        assert word in str(caught.value)


def test_missing_lists_and_what_is_none(tmp_path):
    with pytest.raises(ListError, match="does not exist; give a text file"):
        read_dataset(str(tmp_path / "none.txt"))
    with pytest.raises(ListError, match=r"^/dev/null is neither a file nor a folder; give a text file"):
        read_dataset("/dev/null")
    (tmp_path / "holiday.MP4").write_bytes(b"\0\0\0 ftypisom")
    with pytest.raises(
        ListError, match=r"holiday\.MP4 is a single video or image where a list belongs; write its name"
    ):
        read_dataset(str(tmp_path / "holiday.MP4"))
    (tmp_path / "holiday").write_bytes(b"\0\0\0 ftypisom")
    with pytest.raises(ListError, match=r"is no text file$"):
        read_dataset(str(tmp_path / "holiday"))
    with pytest.raises(ListError, match=r"lists no files ending in \.jpg"):
        (tmp_path / "empty").mkdir()
        read_dataset(str(tmp_path / "empty"), extensions=(".jpg",))

"""Names of classes and their numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mvd_fast.data.index import FileFacts
from mvd_fast.data.labels import MADE, read_class_names, read_labelled, together, with_numbers, write_classes
from mvd_fast.data.lists import Entry, ListError
from mvd_fast.data.overview import MOST_CLASSES, overview

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three class folders of one, two and three files."""
    for number, name in enumerate(CLASSES):
        (tmp_path / "set" / name).mkdir(parents=True)
        for clip in range(number + 1):
            (tmp_path / "set" / name / f"{clip}.mp4").touch()
    return tmp_path / "set"


def labels(found) -> list[int]:
    return [entry.label for entry in found.entries]


def listed(tmp_path: Path, *lines: str, name: str = "list.txt") -> str:
    (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    return str(tmp_path / name)


# ---- numbers for names ----


def test_class_folders_are_numbered_in_alphabetical_order(folder):
    found = read_labelled(str(folder))
    assert found.classes == CLASSES and labels(found) == [0, 1, 1, 2, 2, 2]


def test_names_in_a_list_are_numbered_in_alphabetical_order_or_as_classes_txt_says(tmp_path):
    path = listed(tmp_path, "a.mp4,cat", "b.mp4,ant", "c.mp4,bee walks", "d.mp4,cat")
    found = read_labelled(path)
    assert found.classes == ("ant", "bee walks", "cat") and labels(found) == [2, 0, 1, 2]
    write_classes(found)
    assert (tmp_path / "classes.txt").read_text() == MADE + "ant\nbee walks\ncat\n"
    (tmp_path / "classes.txt").write_text("cat\r\nant\r\nbee walks\r\nnot there\r\n")
    found = read_labelled(path)
    assert found.classes == ("cat", "ant", "bee walks", "not there") and labels(found) == [0, 1, 2, 0]
    write_classes(found)
    assert (tmp_path / "classes.txt").read_text().startswith("cat")  # what is there is kept


def test_lists_in_one_folder_share_their_classes(tmp_path):
    write_classes(read_labelled(listed(tmp_path, "a.mp4 cat", "b.mp4 ant", "c.mp4 bee", name="train.txt")))
    assert labels(read_labelled(listed(tmp_path, "x.mp4 cat", "y.mp4 bee", name="val.txt"))) == [2, 1]
    with pytest.raises(ListError, match=r"1 classes that .*classes\.txt lacks: bees, did you mean 'bee'\? add them at"):
        read_labelled(listed(tmp_path, "x.mp4 cat", "y.mp4 bees", name="val.txt"))


def test_a_file_made_from_names_says_nothing_of_numbers(tmp_path):
    """Whoever numbered another list may have had another order."""
    write_classes(read_labelled(listed(tmp_path, "a.mp4 cat", "b.mp4 ant", "c.mp4 bee", name="named.txt")))
    numbers = listed(tmp_path, "a.mp4 0", "b.mp4 7")
    assert read_labelled(numbers).classes == ()
    file = tmp_path / "classes.txt"
    assert read_class_names(str(file)) == CLASSES
    file.write_text(file.read_text().removeprefix(MADE))
    with pytest.raises(ListError, match=r"has label 7, but .*classes\.txt has 3 names"):
        read_labelled(numbers)


def test_numbers_get_their_names_from_classes_txt(tmp_path):
    path = listed(tmp_path, "a.mp4 1", "b.mp4 3")
    assert read_labelled(path).classes == ()
    listed(tmp_path, *CLASSES, name="classes.txt")
    with pytest.raises(ListError, match=r"b\.mp4 has label 3, but .*classes\.txt has 3 names, for labels from 0 to 2"):
        read_labelled(path)
    found = read_labelled(listed(tmp_path, "a.mp4 1", "b.mp4 2"))
    assert found.classes == CLASSES and labels(found) == [1, 2]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["ant", "", "cat"], "line 2: it is empty"),
        (["ant", "bee", "ant"], "line 3: 'ant' stands in line 1, too"),
    ],
)
def test_faulty_files_of_classes(tmp_path, lines, sentence):
    path = listed(tmp_path, *lines, name="classes.txt")
    with pytest.raises(ListError, match=sentence):
        read_class_names(path)


def test_class_names_hold_what_names_hold(tmp_path):
    names = ["caf\udce9", "next\u0085line", "sep\u2028", "form\x0cfeed", "no\u00a0break\u00a0"]
    (tmp_path / "classes.txt").write_bytes("".join(f"{name}\r\n" for name in names).encode(errors="surrogateescape"))
    assert read_class_names(str(tmp_path / "classes.txt")) == tuple(names)
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{name}.mp4,{name}\n" for name in names), errors="surrogateescape")
    for name in names:
        (tmp_path / f"{name}.mp4").touch()
    assert labels(read_labelled(str(path))) == [0, 1, 2, 3, 4]
    (tmp_path / "classes.txt").unlink()
    write_classes(found := read_labelled(str(path)))
    assert read_labelled(str(path)) == found and set(found.classes) == set(names)


def test_a_class_of_a_list_is_one_line(tmp_path):
    with pytest.raises(ListError, match=r"the class 'two\\nlines' has a line end"):
        read_labelled(listed(tmp_path, 'a.mp4,"one"', '"b.mp4","two', 'lines"'))


def test_numbers_and_names_do_not_mix(tmp_path):
    with pytest.raises(ListError, match=r"a\.mp4 has 3, .*b\.mp4 has 'cat'; write one or the other"):
        read_labelled(listed(tmp_path, "a.mp4 3", "b.mp4 cat"))


def test_a_folder_that_cannot_be_written_to_keeps_the_order(tmp_path, monkeypatch, caplog):
    found = read_labelled(listed(tmp_path, "a.mp4 cat", "b.mp4 ant"))
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    write_classes(found)
    assert "alphabetical" in caplog.text and "Read-only" in caplog.text and not (tmp_path / "classes.txt").exists()


# ---- as somebody else numbers them ----


def test_other_numbers_are_matched_by_name(folder):
    found = read_labelled(str(folder)).numbered_as(("dog", "cat", "bee", "ant"), "runs/x", "")
    assert labels(found) == [3, 2, 2, 1, 1, 1] and found.classes == ("dog", "cat", "bee", "ant")
    assert found.note == f"{folder} numbers its classes otherwise than runs/x: matched by name"
    assert read_labelled(str(folder)).numbered_as(CLASSES, "runs/x", "").note == ""


def test_classes_without_files_need_not_be_known(folder):
    (folder / "aardvark").mkdir()
    assert labels(read_labelled(str(folder)).numbered_as(CLASSES, "runs/x", "")) == [0, 1, 1, 2, 2, 2]


def test_names_that_are_not_known_are_refused(folder):
    with pytest.raises(
        ListError, match=r"1 of 3 classes that runs/x does not know: bee, did you mean 'bees'\? it knows"
    ):
        read_labelled(str(folder)).numbered_as(("ant", "bees", "cat"), "runs/x", "")
    with pytest.raises(
        ListError, match=r"has names of classes \(ant, bee, cat\), but runs/x has numbers only; do this"
    ):
        read_labelled(str(folder)).numbered_as((), "runs/x", "do this")


def test_bare_numbers_stay_and_it_is_said(tmp_path):
    found = read_labelled(listed(tmp_path, "a.mp4 2"))
    assert found.numbered_as((), "runs/x", "") == found
    known = found.numbered_as(CLASSES, "runs/x", "")
    assert labels(known) == [2]
    assert known.note.endswith("list.txt has numbers as labels, taken as those of runs/x: 0 is ant, 2 is cat")


@pytest.mark.parametrize(
    ("lines", "count", "sentence"),
    [
        (["a.mp4 0", "b.mp4 2"], 2, "b.mp4 has label 2, but model.num_classes is 2: labels go from 0 to 1; set it to"),
        (["a.mp4 1", "b.mp4 2"], 2, "labels go from 0 to 1; these seem to count from 1: take 1 from each"),
        (["a.mp4 -1", "b.mp4 1"], 2, "a.mp4 has label -1"),
        (
            ["a.mp4 ant", "b.mp4 bee"],
            3,
            "list.txt has 2 classes (ant, bee), but model.num_classes is 3",
        ),
    ],
)
def test_labels_must_fit_the_number_of_classes(tmp_path, lines, count, sentence):
    with pytest.raises(ListError) as caught:
        read_labelled(listed(tmp_path, *lines)).require_below(count)
    assert sentence in str(caught.value)


def test_several_sources_are_numbered_together(folder, tmp_path):
    other = tmp_path / "other"
    for name in ("bee", "dog"):
        (other / name).mkdir(parents=True)
        (other / name / "x.mp4").touch()
    found = together([read_labelled(str(folder)), read_labelled(str(other))])
    assert found.classes == ("ant", "bee", "cat", "dog") and labels(found) == [0, 1, 1, 2, 2, 2, 1, 3]
    with pytest.raises(ListError, match="they cannot be joined; label both alike"):
        together([read_labelled(str(folder)), read_labelled(listed(tmp_path, "a.mp4 1"))])


# ---- what data check says ----


def facts_of(**changes) -> FileFacts:
    return FileFacts(
        1, 1, **{"frames": 30, "fps": 10.0, "width": 64, "height": 48, "codec": "vp9"} | {"is_video": True, **changes}
    )


def looked_at(source: str, entries: list[Entry], *unusable: str, **sizes: FileFacts):
    files = {entry.path: sizes.get(entry.path, facts_of()) for entry in entries if entry.path not in unusable}
    return overview(source, entries, files, (".mp4",))


def test_classes_lengths_and_sizes_are_told(folder):
    entries = [Entry("a", "ant"), Entry("b", "bee"), Entry("c", "bee"), Entry("d", "cat")]
    long = facts_of(frames=100, fps=25.0, width=320, height=240)
    found = looked_at(str(folder), entries, c=long)
    assert found.facts == [
        "labels 0 to 2, 3 classes; 1 to 2 usable files each, median 1",
        "  0 ant: 1",
        "  1 bee: 2",
        "  2 cat: 1",
        "lengths: 30 to 100 frames, median 30; 3.0 to 4.0 s, median 3.0",
        "sizes: 64x48 (3), 320x240 (1)",
    ]
    assert found.warnings == []


def test_empty_classes_are_warned_of(folder):
    (folder / "dog").mkdir()
    found = looked_at(str(folder), [Entry("a", "ant"), Entry("b", "bee"), Entry("d", "cat")], "b")
    assert found.warnings == ["2 of 4 classes have no usable file: 1 bee, 3 dog"]
    assert "  1 bee: 0" in found.facts and "  3 dog: 0" in found.facts


def test_numbers_that_look_wrong_are_warned_of(tmp_path):
    source = listed(tmp_path, "not read")
    found = looked_at(source, [Entry("a", 1), Entry("b", 2), Entry("c", 4)])
    assert found.warnings == [
        "labels go from 1 to 4, and here they count from 0: take 1 from each, else class 0 stays empty",
        "1 of 5 classes have no usable file: 3",
    ]
    assert (
        "1 files have a label below 0: for pre-training only"
        in looked_at(source, [Entry("a", -1), Entry("b", 0)]).warnings
    )
    assert looked_at(source, [Entry("a", 0), Entry("b", 1)]).warnings == []
    found = looked_at(source, [Entry("a", 0), Entry("b", 10**12)])  # a time, perhaps
    assert found.warnings == ["label 1000000000000 is higher than any number of classes: it seems to be no label"]


def test_lists_for_pre_training_only(tmp_path):
    source = listed(tmp_path, "not read")
    assert looked_at(source, [Entry("a", None)]).facts[0] == "no labels: for pre-training"
    assert looked_at(source, [Entry("a", None), Entry("b", 0)]).warnings == [
        "1 of 2 lines have no label: for pre-training only"
    ]
    (mixed,) = looked_at(source, [Entry("a", "ant"), Entry("b", 0)]).warnings
    assert mixed.startswith("for pre-training only: ") and "write one or the other" in mixed


def test_files_that_stand_twice_and_files_beside_class_folders(folder, tmp_path):
    (folder / "loose.mp4").touch()
    (folder / "notes.txt").touch()
    entries = [Entry("a", "ant"), Entry("b", "bee"), Entry("d", "cat")]
    assert looked_at(str(folder), entries).warnings == [
        "1 files lie beside the class folders and are left out: loose.mp4"
    ]
    found = looked_at(listed(tmp_path, ""), [Entry("a", 0), Entry("b", 0), Entry("a", 1), Entry("b", 0)])
    assert found.warnings == ["2 files stand more than once: a, b", "1 of them with different labels: a"]


def test_of_many_classes_the_ends_are_shown(tmp_path):
    entries = [Entry(f"{label} {clip}", label) for label in range(MOST_CLASSES + 1) for clip in range(label + 1)]
    found = looked_at(listed(tmp_path, ""), entries)
    rows = [line for line in found.facts if line.startswith("  ")]
    assert rows[0] == "  0: 1" and rows[4] == "  4: 5" and rows[5] == f"  ... {MOST_CLASSES - 9} more ..."
    assert rows[-1] == f"  {MOST_CLASSES}: {MOST_CLASSES + 1}" and len(rows) == 11


def test_an_unlabelled_source_of_entries_has_no_numbers(tmp_path):
    with pytest.raises(ListError, match="no label"):
        read_labelled(listed(tmp_path, "a.mp4 1", "b.mp4"))
    assert with_numbers(listed(tmp_path, ""), [Entry("a", 5)]).entries == (Entry("a", 5),)

"""Which files a dataset has: list files and folders of class folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mvd_fast.errors import UserError

QUOTES = "\"'"


class Entry(NamedTuple):
    """One file of a dataset."""

    path: str
    label: int | None


class ListError(UserError):
    """A list that cannot be read; the message names the file and the line."""


def read_dataset(
    train: str, root: str = "", extensions: tuple[str, ...] = (), need_labels: bool = False
) -> list[Entry]:
    """Every file of a list or folder, in a fixed order.

    `train`: a text file with one `path label` a line (see `parse_line`), or a folder with one folder per class.
    `root`: where relative paths of a list start; empty: the list's folder.
    `extensions`: lower-case endings that count inside a folder; empty: all.
    Raises ListError with one sentence for whatever is missing or malformed.
    """
    if os.path.isdir(train):
        entries = _read_folder(train, extensions)
    elif os.path.isfile(train):
        entries = _read_list(train, root, need_labels)
    else:
        raise ListError(
            f"data.train names {train!r}, which does not exist; "
            "give a text file with one `path label` a line, or a folder with one folder per class"
        )
    if not entries:
        wanted = f" ending in {', '.join(extensions)}" if os.path.isdir(train) and extensions else ""
        raise ListError(f"{train} lists no files{wanted}")
    return entries


def parse_line(line: str) -> tuple[str, int | None] | None:
    """(path, label) of one line of a list; None for blank lines and comments. The label may be missing.

    Accepted: `path label`, `"path with spaces" label`, path and label separated by a tab or a comma, and unquoted
    paths with spaces when the last field is the label. Raises UserError for a quote that is never closed or a quoted
    path that something other than an integer follows.
    """
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    if line[0] in QUOTES:
        return _parse_quoted(line)
    for separator in ("\t", ",", None):
        fields = line.rsplit(separator, 1)
        if len(fields) == 2 and _is_integer(fields[1]):
            return fields[0].strip().strip(QUOTES), int(fields[1])
    return line, None


def side_file(train: str, ending: str) -> str:
    """Path of a file kept beside a list or folder: `train.txt` -> `train.txt.<ending>`."""
    return f"{os.path.abspath(train)}.{ending}"


def _parse_quoted(line: str) -> tuple[str, int | None]:
    path, closed, rest = line[1:].partition(line[0])
    if not closed:
        raise UserError(f"the quote {line[0]} is never closed")
    rest = rest.strip().lstrip(",").strip()
    if rest and not _is_integer(rest):
        raise UserError(f"the label {rest!r} is not an integer")
    return path, int(rest) if rest else None


def _is_integer(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def _read_list(path: str, root: str, need_labels: bool) -> list[Entry]:
    base = os.path.abspath(root or os.path.dirname(path) or ".")
    return list(_parse_lines(path, base, need_labels))


def _parse_lines(path: str, base: str, need_labels: bool) -> Iterator[Entry]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ListError(f"{path} is not UTF-8 text (byte {error.start}); save the list as UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            parsed = parse_line(line)
        except UserError as error:
            raise ListError(f"{path}, line {number}: {error}") from error
        if parsed is None:
            continue
        if need_labels and parsed[1] is None:
            raise ListError(f"{path}, line {number}: no label; write `path label` with an integer label")
        yield Entry(os.path.join(base, parsed[0]), parsed[1])


def class_folders(folder: str) -> list[str]:
    """Names of the class folders in a folder, in the order of their labels."""
    return sorted(item.name for item in os.scandir(folder) if item.is_dir() and not item.name.startswith("."))


def _read_folder(folder: str, extensions: tuple[str, ...]) -> list[Entry]:
    """Class folders in alphabetical order are labels 0, 1, ...; a folder without class folders has no labels."""
    folder = os.path.abspath(folder)
    classes = class_folders(folder)
    if not classes:
        return [Entry(path, None) for path in _files_below(folder, extensions)]
    return [
        Entry(path, label)
        for label, name in enumerate(classes)
        for path in _files_below(os.path.join(folder, name), extensions)
    ]


def _files_below(folder: str, extensions: tuple[str, ...]) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if not name.startswith(".") and (not extensions or name.lower().endswith(extensions)):
                yield os.path.join(parent, name)

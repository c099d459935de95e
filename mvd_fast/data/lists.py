"""Which files a dataset has: list files and folders of class folders."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mvd_fast.errors import UserError
from mvd_fast.files import write_text
from mvd_fast.names import has_odd_bytes, printable, read_text, split_lines

QUOTES = "\"'"
BLANKS = " \t"
LONGEST = 2 * 4096  # of a quoted path that goes on over line ends; systems allow 4096 bytes
LOOKED_FOR = 20  # files with odd names, to see whether a list has the disk's encoding
HEADER = frozenset(
    """path file filename file_name filepath video video_path video_name image image_path name frames num_frames
    total_frames label labels class classes class_name label_name target""".split()  # noqa: SIM905
)


class Entry(NamedTuple):
    """One file of a dataset. label: a class's number, or its name (a folder's, or the one in a list)."""

    path: str
    label: int | str | None


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
        found = "is neither a file nor a folder" if os.path.exists(train) else "does not exist"
        raise ListError(
            f"{printable(train)} {found}; give a text file with one `path label` a line, or a folder with one "
            "folder per class"
        )
    if not entries:
        wanted = f" ending in {', '.join(extensions)}" if os.path.isdir(train) and extensions else ""
        raise ListError(f"{printable(train)} lists no files{wanted}")
    if need_labels and entries[0].label is None:
        raise ListError(
            f"{printable(train)} has no labels; give `path label` lines, or a folder with one folder per class"
        )
    return entries


def side_file(train: str, ending: str) -> str:
    """Path of a file kept beside a list or folder: `train.txt` -> `train.txt.<ending>`."""
    return f"{os.path.abspath(train)}.{ending}"


def write_beside(path: str, text: str) -> None:
    """Replace a file beside a list as a whole. Raises UserError where the folder does not allow it."""
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(
            f"{printable(path)} cannot be written ({error.strerror or error}); copy the list to a folder of your own"
        ) from error


# ---- one line of a list ----


def parse_line(line: str, exists: Callable[[str], bool] = os.path.isfile) -> Entry | None:
    """Path and label of one line of a list; None for blank lines and comments (`# ...`). The label may be missing.

    Accepted: `path label` and `path frames label`, separated by blanks, tabs or commas; the label is a number or a
    class's name. The path goes up to its ending (`.mp4`, `.jpg`, ...), so that it may contain separators. Where it has
    no such ending, `exists` decides, which says whether there is a file of that name. Quotes hold any path, as in CSV
    files.

    Raises UserError for what could be read in two ways, a quote that is never closed, and labels that are neither.
    """
    line = line.strip(BLANKS)
    if not line or line == "#" or line.startswith(("# ", "#\t")):
        return None
    if line[0] in QUOTES:
        path, rest = _unquoted(line)
    else:
        path, rest = _ends_known(line) or _found(line, exists) or _guessed(line)
        if line[0] == "#" and not exists(path):
            raise UserError(f"there is no file '{printable(path)}'; a comment begins with `# `, with a blank behind it")
    if not path:
        raise UserError("there is no path before the label")
    return Entry(path, _label(rest))


def _unquoted(text: str) -> tuple[str, str]:
    """What stands between the quotes that a text begins with, and the rest; a doubled quote stands for one."""
    quote = text[0]
    found = re.match(f"{quote}((?:[^{quote}]|{quote}{quote})*){quote}(?!{quote})", text)
    if not found:
        raise UserError(f"the quote {quote} is never closed")
    rest = text[found.end() :]
    if rest and rest[0] not in BLANKS + ",":
        raise UserError(f"the closing quote is followed by '{printable(rest)}'; write a blank, a tab or a comma there")
    return found[1].replace(quote * 2, quote), rest


@cache
def _ending() -> re.Pattern[str]:
    from mvd_fast.data.images import IMAGE_EXTENSIONS  # both bring libraries that --help need not wait for
    from mvd_fast.data.media import VIDEO_EXTENSIONS

    endings = "|".join(re.escape(ending) for ending in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS)
    return re.compile(rf"(.*(?:{endings}))((?:[ \t,].*)?)", re.IGNORECASE | re.DOTALL)


def _ends_known(line: str) -> tuple[str, str] | None:
    found = _ending().fullmatch(line)
    return (found[1], found[2]) if found else None


def _found(line: str, exists: Callable[[str], bool]) -> tuple[str, str] | None:
    """The part of a line, up to a separator or its end, that is the name of a file."""
    cuts = [match.start() for match in re.finditer(r"[ \t,]+|\Z", line)]
    paths = [line[:cut] for cut in cuts if cut and exists(line[:cut])]
    if len(paths) > 1:
        some = " and ".join(f"'{printable(path)}'" for path in paths[:2])
        raise UserError(f"it may name {some}, and both exist; put the path in quotes")
    return (paths[0], line[len(paths[0]) :]) if paths else None


def _guessed(line: str) -> tuple[str, str]:
    """Of a file without a known ending that does not exist either: up to one or two numbers at the end."""
    found = re.fullmatch(r"(.*?)((?:[ \t]*[ \t,][ \t]*-?[0-9]+){0,2})", line, re.DOTALL)
    assert found is not None, "both parts may be empty"
    return found[1], found[2]


def _label(rest: str) -> int | str | None:
    """The label in what follows a path: `label` or `frames label`, behind a separator."""
    blanks = rest[: len(rest) - len(rest.lstrip(BLANKS))]
    separator = "," if rest[len(blanks) :].startswith(",") else "\t" if "\t" in blanks else " "
    text = rest.strip(BLANKS + ",")
    fields = _words(text) if separator == " " else _columns(text, separator)
    if len(fields) == 2 and _is_integer(fields[0]):
        del fields[0]  # frames
    if len(fields) > 1:
        raise UserError(
            f"'{printable(text)}' is more than a label, or than frames and a label; put a class's name in quotes"
        )
    if fields and not _is_integer(fields[0]) and not any(character.isalpha() for character in fields[0]):
        raise UserError(f"the label '{printable(text)}' is neither a whole number nor the name of a class")
    return None if not fields else int(fields[0]) if _is_integer(fields[0]) else fields[0]


def _columns(text: str, separator: str) -> list[str]:
    try:
        columns = next(csv.reader([text], delimiter=separator, skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise UserError(f"the label '{printable(text)}' cannot be read: {error}") from error
    return [field for column in columns if (field := column.strip(BLANKS))]


def _words(text: str) -> list[str]:
    """What stands in quotes, numbers, or all of it, which may be a class's name of several words."""
    words = re.findall(r"\"[^\"]*\"|'[^']*'|[^ \t]+", text)
    numbers = sum(map(_is_integer, words))
    if any(word[0] in QUOTES for word in words) or numbers == len(words):
        return [word[1:-1].strip(BLANKS) if word[0] in QUOTES and word[-1] == word[0] else word for word in words]
    if numbers:
        raise UserError(
            f"'{printable(text)}' may be a class's name or have a number beside it; put the name in quotes, or write "
            "`path,label` or `path,frames,label`"
        )
    return [text]


def _is_integer(text: str) -> bool:
    return bool(re.fullmatch("[+-]?[0-9]+", text))


# ---- lists ----


def _read_list(path: str, root: str, need_labels: bool) -> list[Entry]:
    base = os.path.abspath(root or os.path.dirname(path) or ".")
    if _ends_known(path) == (path, ""):
        raise ListError(
            f"{printable(path)} is a single video or image where a list belongs; write its name into a text file, one "
            "`path label` a line, or give its folder"
        )
    entries = list(_parse_lines(path, base, need_labels))
    _require_disks_encoding(path, entries)
    return entries


def _parse_lines(path: str, base: str, need_labels: bool) -> Iterator[Entry]:
    def exists(name: str) -> bool:
        return os.path.isfile(os.path.join(base, name))

    first = True
    for number, line in _records(read_text(path, ListError)):
        try:
            found = parse_line(line, exists)
            if found and first and _is_header(line) and not exists(found.path):
                raise UserError(f"'{printable(line.strip())}' seems to be a header; delete it, or begin it with `# `")
            if found and found.label is None and need_labels:
                raise UserError("no label; write `path label`, with a class's number or name")
        except UserError as error:
            raise ListError(f"{printable(path)}, line {number}: {error}") from error
        if found:
            first = False
            yield Entry(os.path.join(base, found.path), found.label)


def _records(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a list and the numbers they start at; a quoted path may hold line ends."""
    lines = iter(enumerate(split_lines(text, keep_ends=True), start=1))
    for number, line in lines:
        while _is_open(line) and len(line) < LONGEST and (following := next(lines, None)):
            line += following[1]
        yield number, line.rstrip("\r\n")


def _is_open(line: str) -> bool:
    start = line.lstrip(BLANKS)[:1]
    return start == '"' and line.count(start) % 2 == 1


def _is_header(line: str) -> bool:
    words = re.split(r"[\s,]+", line.strip().lower())
    return HEADER.issuperset(words)


def _require_disks_encoding(train: str, entries: list[Entry]) -> None:
    """Refuses a list in another encoding than the names on the disk, all of whose odd files would be missing."""
    odd = [entry.path for entry in entries if has_odd_bytes(entry.path)]
    some = odd[:: -(-len(odd) // LOOKED_FOR) or 1]
    if odd and not any(os.path.lexists(path) for path in some):
        raise ListError(
            f"{printable(train)} is not UTF-8, and no file has the bytes of its names, such as {printable(odd[0])}; "
            "save the list as UTF-8, or set the folder that its paths start from"
        )


# ---- folders ----


def class_folders(folder: str) -> list[str]:
    """Names of the class folders in a folder, in the order of their labels; a link to what it lies in is none."""
    try:
        outside = _with_parents(folder)
        with os.scandir(folder) as items:
            inside = [item.name for item in items if item.is_dir() and not item.name.startswith(".")]
        return sorted(name for name in inside if _identity(os.path.join(folder, name)) not in outside)
    except OSError as error:
        raise _unlistable(error) from error


def _read_folder(folder: str, extensions: tuple[str, ...]) -> list[Entry]:
    """Files of class folders in alphabetical order, labelled by the class; without such folders nothing is labelled."""
    folder = os.path.abspath(folder)
    classes = class_folders(folder)
    if not classes:
        return [Entry(path, None) for path in _files_below(folder, extensions)]
    return [Entry(path, name) for name in classes for path in _files_below(os.path.join(folder, name), extensions)]


def _files_below(folder: str, extensions: tuple[str, ...]) -> Iterator[str]:
    """Links are followed, but no folder is visited twice, and none that this one lies in: links to those end there."""
    seen = _with_parents(folder)
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise_unlistable):
        inside = {_identity(os.path.join(parent, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for identity, name in inside.items() if identity not in seen)
        seen |= inside.keys()
        for name in sorted(files):
            if not name.startswith(".") and (not extensions or name.lower().endswith(extensions)):
                yield os.path.join(parent, name)


def _with_parents(folder: str) -> set[tuple[int, int]]:
    """The identities of a folder and of all that it lies in, by its path as given and without links."""
    paths = (os.path.abspath(folder), os.path.realpath(folder))
    return {_identity(str(one)) for path in paths for one in (path, *Path(path).parents)}


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _raise_unlistable(error: OSError) -> None:
    raise _unlistable(error) from error


def _unlistable(error: OSError) -> ListError:
    return ListError(f"the folder {printable(error.filename)} cannot be listed: {error.strerror}")

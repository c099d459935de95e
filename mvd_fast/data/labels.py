"""Labels: numbers and names of classes, and which number a name has.

Class folders are numbered in alphabetical order. `classes.txt` beside a list says the names of its classes in the order
of their numbers; where a list names classes and there is no such file, `write_classes` makes it. What was trained knows
the names of its classes: other data are numbered by these, see `Labelled.numbered_as`.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mvd_fast.data.lists import Entry, ListError, class_folders, read_dataset, write_beside
from mvd_fast.errors import UserError
from mvd_fast.names import printable, read_text, split_lines

CLASSES = "classes.txt"
# Numbers in another list may have another order.
MADE = "# Made by mvd-fast from a list that names its classes. Lists of numbers go by it once this line is deleted.\n"
FEW = 4  # names in a sentence

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """The files of a list or folder. `entries` have numbers as labels; `classes` are the names by number, empty where
    nothing says them. `source`: the list or folder. `note`: how its labels were taken, where that needs saying."""

    source: str
    entries: tuple[Entry, ...]
    classes: tuple[str, ...] = ()
    note: str = ""

    def require_below(
        self, count: int, limit: str = "model.num_classes", remedy: str = "set it to the number of classes"
    ) -> None:
        """Raises ListError unless there are `count` classes: so many names, and labels from 0 to count - 1."""
        if self.classes and len(self.classes) != count:
            raise ListError(
                f"{_origin(self.source)} has {len(self.classes)} classes ({some(self.classes)}), but {limit} is "
                f"{count}; {remedy}"
            )
        wrong = next((entry for entry in self.entries if not 0 <= entry.label < count), None)
        if wrong is None:
            return
        if wrong.label == count and min(entry.label for entry in self.entries) == 1:
            remedy = "these seem to count from 1: take 1 from each"
        raise ListError(
            f"{printable(self.source)}: {printable(wrong.path)} has label {wrong.label}, but {limit} is {count}: "
            f"labels go from 0 to {count - 1}; {remedy}"
        )

    def numbered_as(self, classes: Sequence[str], whose: str, remedy: str) -> Labelled:
        """The same files with the numbers that their classes have in `classes`, which are those of `whose`.

        Labels that are bare numbers stay. Raises ListError for a class that is not among them, and where only this side
        has names: `remedy` says how to give the other's.
        """
        source = printable(self.source)
        if not self.classes:
            ends = f": 0 is {printable(classes[0])}, {len(classes) - 1} is {printable(classes[-1])}" if classes else ""
            return replace(
                self, note=f"{source} has numbers as labels, taken as those of {whose}{ends}" if ends else ""
            )
        names = {label: self.classes[label] for label in sorted({entry.label for entry in self.entries})}
        if not classes:
            raise ListError(
                f"{_origin(self.source)} has names of classes ({some(names.values())}), but {whose} has numbers only; "
                f"{remedy}"
            )
        numbers = {name: number for number, name in enumerate(classes)}
        if strange := [name for name in names.values() if name not in numbers]:
            raise ListError(
                f"{_origin(self.source)} has {len(strange)} of {len(names)} classes that {whose} does not know: "
                f"{some(strange)}{_nearest(strange[0], classes)} it knows {len(classes)}: {some(classes)}"
            )
        entries = tuple(entry._replace(label=numbers[names[entry.label]]) for entry in self.entries)
        moved = any(numbers[name] != label for label, name in names.items())
        note = f"{source} numbers its classes otherwise than {whose}: matched by name" if moved else ""
        return replace(self, entries=entries, classes=tuple(classes), note=note)


def read_labelled(source: str, root: str = "", extensions: tuple[str, ...] = ()) -> Labelled:
    """The files of a list or folder with their labels, see `read_dataset`. Raises ListError."""
    return with_numbers(source, read_dataset(source, root, extensions, need_labels=True))


def class_names(source: str, root: str = "", extensions: tuple[str, ...] = ()) -> tuple[str, ...]:
    """`read_labelled(...).classes`, without looking into class folders. Raises ListError."""
    if os.path.isdir(source):
        return tuple(class_folders(source))
    return read_labelled(source, root, extensions).classes


def with_numbers(source: str, entries: Sequence[Entry]) -> Labelled:
    """Of what `read_dataset` found in `source`, where every file has a label. Raises ListError."""
    if os.path.isdir(source):
        return _by_name(source, entries, class_folders(source))
    named = next((entry for entry in entries if isinstance(entry.label, str)), None)
    number = next((entry for entry in entries if not isinstance(entry.label, str)), None)
    if named and number:
        raise ListError(
            f"{printable(source)} has numbers and names as labels: {printable(number.path)} has {number.label}, "
            f"{printable(named.path)} has '{printable(named.label)}'; write one or the other"
        )
    file = classes_file(source)
    known = read_class_names(file, only_given=named is None) if os.path.isfile(file) else ()
    if named:
        names = sorted({entry.label for entry in entries})
        if broken := next((name for name in names if "\n" in name or "\r" in name), None):
            raise ListError(
                f"{printable(source)}: the class '{printable(broken)}' has a line end; give it another name"
            )
        return _by_name(source, entries, known or names)
    if known and (wrong := next((entry for entry in entries if not 0 <= entry.label < len(known)), None)):
        raise ListError(
            f"{printable(source)}: {printable(wrong.path)} has label {wrong.label}, but {printable(file)} has "
            f"{len(known)} names, for labels from 0 to {len(known) - 1}; mend one of them"
        )
    return Labelled(source, tuple(entries), known)


def _by_name(source: str, entries: Sequence[Entry], classes: Sequence[str]) -> Labelled:
    numbers = {name: number for number, name in enumerate(classes)}
    if strange := sorted({entry.label for entry in entries} - numbers.keys()):
        raise ListError(
            f"{printable(source)} has {len(strange)} classes that {printable(classes_file(source))} lacks: "
            f"{some(strange)}{_nearest(strange[0], classes)} add them at its end, or delete it to have it written anew"
        )
    return Labelled(source, tuple(entry._replace(label=numbers[entry.label]) for entry in entries), tuple(classes))


def together(parts: Sequence[Labelled]) -> Labelled:
    """Several lists and folders as one: names are numbered in the order in which they come up.

    Raises ListError where some have names and others numbers only.
    """
    named = [part for part in parts if part.classes]
    bare = next((part for part in parts if not part.classes), None)
    if named and bare:
        raise ListError(
            f"{_origin(named[0].source)} has names of classes ({some(named[0].classes)}) and {printable(bare.source)} "
            "has numbers: they cannot be joined; label both alike"
        )
    classes = tuple(dict.fromkeys(name for part in named for name in part.classes))
    parts = [part.numbered_as(classes, "all of them", "") for part in parts]
    return Labelled(parts[0].source if parts else "", tuple(entry for part in parts for entry in part.entries), classes)


def classes_file(source: str) -> str:
    """Where the names of a list's classes are; lists in one folder share them."""
    return os.path.join(os.path.dirname(os.path.abspath(source)), CLASSES)


def read_class_names(path: str, only_given: bool = False) -> tuple[str, ...]:
    """One name a line, and comments (`# ...`). only_given: nothing of a file that `write_classes` made.

    Raises ListError for an empty line, or a name that stands twice.
    """
    text = read_text(path, ListError)
    if only_given and text.startswith(MADE):
        return ()
    lines: dict[str, int] = {}
    for number, line in enumerate(split_lines(text.rstrip(" \t\r\n")), start=1):
        if line.startswith("# "):
            continue
        if not (name := line.strip(" \t")):
            raise ListError(f"{printable(path)}, line {number}: it is empty; write one class's name a line")
        if (first := lines.setdefault(name, number)) != number:
            raise ListError(f"{printable(path)}, line {number}: '{printable(name)}' stands in line {first}, too")
    return tuple(lines)


def write_classes(labelled: Labelled) -> None:
    """Writes `classes.txt` beside a list that names its classes, where there is none.

    A folder that does not allow it is named in the log; the order is the alphabetical one either way.
    """
    file = classes_file(labelled.source)
    if not labelled.classes or os.path.isdir(labelled.source) or os.path.exists(file):
        return
    try:
        write_beside(file, MADE + "".join(f"{name}\n" for name in labelled.classes))
    except UserError as error:
        logger.warning("the order of the classes is alphabetical and was not written down: %s", error)


def some(names: Iterable[str]) -> str:
    """The first names, printable, and how many more there are."""
    names = list(names)
    rest = f", ... and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(map(printable, names[:FEW])) + rest


def _origin(source: str) -> str:
    """What says the names of a source's classes."""
    beside = not os.path.isdir(source) and os.path.isfile(classes_file(source))
    return f"{printable(source)} (with {CLASSES} beside it)" if beside else printable(source)


def _nearest(name: str, classes: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, classes, n=1)
    return f", did you mean '{printable(close[0])}'?" if close else ";"

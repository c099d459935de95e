"""What a list or folder holds, for `mvd-fast data check`: classes and their clips, lengths, sizes, what looks wrong."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from mvd_fast.data.index import FileFacts
from mvd_fast.data.labels import Labelled, classes_file, some, with_numbers, write_classes
from mvd_fast.data.lists import Entry, ListError, class_folders
from mvd_fast.names import printable

MOST_CLASSES = 60  # that are named one by one
ENDS = 5  # of more classes: those with the fewest and those with the most clips
MOST_SIZES = 4
MOST_NUMBER = 100_000  # of a class; what is higher is a mistake


@dataclass
class Overview:
    """Lines for people: `facts`, and `warnings` of what training would not refuse and is likely to be wrong."""

    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def overview(
    source: str, entries: Sequence[Entry], files: Mapping[str, FileFacts], extensions: tuple[str, ...]
) -> Overview:
    """Of the `entries` of the list or folder `source`; `files` has the usable ones.

    Writes `classes.txt` beside a list that names its classes, see `write_classes`.
    """
    found = Overview()
    unlabelled = sum(entry.label is None for entry in entries)
    if unlabelled == len(entries):
        found.facts.append("no labels: for pre-training")
    elif unlabelled:
        found.warnings.append(f"{unlabelled} of {len(entries)} lines have no label: for pre-training only")
    else:
        _add_classes(found, source, entries, files)
    _add_videos(found, [facts for facts in files.values() if facts.is_video])
    found.warnings += _repeated(entries)
    if os.path.isdir(source) and class_folders(source):
        found.warnings += _loose(source, extensions)
    return found


def _add_classes(found: Overview, source: str, entries: Sequence[Entry], files: Mapping[str, FileFacts]) -> None:
    try:
        labelled = with_numbers(source, entries)
    except ListError as error:
        found.warnings.append(f"for pre-training only: {error}")
        return
    write_classes(labelled)
    if labelled.classes and os.path.isfile(file := classes_file(source)) and not os.path.isdir(source):
        found.facts.append(f"names of the classes: {printable(file)}")
    listed = Counter(entry.label for entry in labelled.entries)
    usable = Counter(entry.label for entry in labelled.entries if entry.path in files)
    counts = {label: usable[label] for label in sorted({*listed, *range(len(labelled.classes))})}
    spread = "no usable file"
    if usable:
        least, most = min(usable.values()), max(usable.values())
        spread = f"{_range(least, most)} usable files each, median {median(usable.values()):g}"
    found.facts.append(f"labels {_range(min(listed), max(listed))}, {len(listed)} classes; {spread}")
    found.facts += _each_class(labelled, counts)
    found.warnings += _odd_labels(labelled, listed, counts)


def _range(least: int, most: int) -> str:
    return f"{least} to {most}" if least != most else str(least)


def _each_class(labelled: Labelled, counts: Mapping[int, int]) -> list[str]:
    rows = [f"  {_name(labelled, label)}: {count}" for label, count in counts.items()]
    if len(rows) <= MOST_CLASSES:
        return rows
    order = sorted(counts, key=lambda label: (counts[label], label))
    ends = [f"  {_name(labelled, label)}: {counts[label]}" for label in (*order[:ENDS], *order[-ENDS:])]
    return [*ends[:ENDS], f"  ... {len(rows) - 2 * ENDS} more ...", *ends[ENDS:]]


def _name(labelled: Labelled, label: int) -> str:
    known = 0 <= label < len(labelled.classes)
    return f"{label} {printable(labelled.classes[label])}" if known else str(label)


def _odd_labels(labelled: Labelled, listed: Mapping[int, int], counts: Mapping[int, int]) -> list[str]:
    warnings = []
    from_one = min(listed) == 1 and not labelled.classes
    if from_one:
        warnings.append(
            f"labels go from 1 to {max(listed)}, and here they count from 0: take 1 from each, else class 0 stays empty"
        )
    if below := sum(count for label, count in listed.items() if label < 0):
        warnings.append(f"{below} files have a label below 0: for pre-training only")
    if (highest := max(counts)) > MOST_NUMBER:
        return [*warnings, f"label {highest} is higher than any number of classes: it seems to be no label"]
    empty = [label for label in range(from_one, highest + 1) if not counts.get(label)]
    if empty:
        names = some(_name(labelled, label) for label in empty)
        warnings.append(f"{len(empty)} of {highest + 1} classes have no usable file: {names}")
    return warnings


def _add_videos(found: Overview, videos: Sequence[FileFacts]) -> None:
    if not videos:
        return
    frames = [facts.frames for facts in videos]
    seconds = [facts.frames / facts.fps for facts in videos if facts.fps]
    time = f"; {min(seconds):.1f} to {max(seconds):.1f} s, median {median(seconds):.1f}" if seconds else ""
    found.facts.append(f"lengths: {min(frames)} to {max(frames)} frames, median {median(frames):g}{time}")
    sizes = Counter(f"{facts.width}x{facts.height}" for facts in videos).most_common()
    shown = ", ".join(f"{size} ({count})" for size, count in sizes[:MOST_SIZES])
    found.facts.append(f"sizes: {shown}" + (f", {len(sizes) - MOST_SIZES} others" if len(sizes) > MOST_SIZES else ""))


def _repeated(entries: Sequence[Entry]) -> list[str]:
    labels: dict[str, list[int | str | None]] = defaultdict(list)
    for entry in entries:
        labels[entry.path].append(entry.label)
    twice = [path for path, found in labels.items() if len(found) > 1]
    odd = [path for path in twice if len(set(labels[path])) > 1]
    warnings = [f"{len(twice)} files stand more than once: {some(twice)}"] if twice else []
    return warnings + ([f"{len(odd)} of them with different labels: {some(odd)}"] if odd else [])


def _loose(folder: str, extensions: tuple[str, ...]) -> list[str]:
    names = sorted(
        item.name for item in os.scandir(folder) if item.is_file() and item.name.lower().endswith(extensions)
    )
    return [f"{len(names)} files lie beside the class folders and are left out: {some(names)}"] if names else []

"""Files that are complete or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a finished run leaves in its folder, for the next stage and for readers.
WEIGHTS = "model.safetensors"
SUMMARY = "summary.json"


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; on success it is fsynced and renamed into place, on failure removed.

    The name keeps its ending, for libraries that go by it.
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        fsync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replaces the file as a whole."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def fsync(path: str | Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

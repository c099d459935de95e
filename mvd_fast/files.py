"""Files that are complete or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mvd_fast.errors import UserError

# What a finished run leaves in its folder, for the next stage and for readers.
BEST = "best.safetensors"  # of the epoch that validated best
WEIGHTS = "model.safetensors"
SUMMARY = "summary.json"
CONFIG = "config.json"  # resolved


def make_folder(path: str | Path) -> None:
    """The folder and those above it, where they are missing; UserError where there can be none.

    What takes long and is given a place for its results calls it before it starts.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror}; name another place") from None


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; on success it is fsynced and renamed into place, on failure removed.

    The name keeps its ending, for libraries that go by it. Folders above it that are missing are made.
    """
    path = Path(path)
    make_folder(path.parent)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # as the umask and the folder have it
        aside.unlink()
        yield aside
        aside.chmod(mode)  # safetensors makes files for their owner alone
        fsync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_written_aside(path: str | Path, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """Gives a new folder beside `path` to write files to; on success they are fsynced and it is renamed into place.

    Folders above it that are missing are made. A folder that is there already is replaced as a whole, and only if it
    holds nothing but files named in `replaceable`; else UserError.
    """
    path = Path(path)
    make_folder(path.parent)
    if others := [entry.name for entry in path.glob("*") if entry.name not in replaceable]:
        raise UserError(f"{path} is not replaced, as it holds other things, too: {', '.join(sorted(others)[:4])}")
    aside, old = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    try:
        aside.mkdir()
        yield aside
        seal(aside)
        fsync(aside)
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        fsync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def seal(folder: str | Path) -> list[Path]:
    """The folder's files, also those further down, in order, each on the disk and with the mode of the umask."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    for file in files:
        # A new file may be read and written by whom the umask lets enter and change its new folder.
        file.chmod(file.parent.stat().st_mode & 0o666)
        fsync(file)
    return files


def write_text(path: str | Path, text: str) -> None:
    """Replaces the file as a whole. Names with bytes that are not UTF-8 are written as these bytes."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="surrogateescape")


def fsync(path: str | Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The index beside a list: what a scan found out about every file, so that the next scan looks only at changes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mvd_fast.data import images, media
from mvd_fast.data.containers import BadFile, UnreadableFile, read_bytes
from mvd_fast.data.lists import write_beside
from mvd_fast.data.workers import no_interrupts, worker_pool

VERSION = 4  # one more whenever a scan judges files differently
INLINE_BELOW = 64  # files; starting processes takes longer than scanning these
AHEAD = 4  # files handed to each process in advance


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One file as a scan saw it. `error` is empty for usable files; the facts are zero where it is not, size and time
    also where it could not be read."""

    size: int
    mtime_ns: int
    error: str = ""
    frames: int = 0
    fps: float = 0.0
    width: int = 0
    height: int = 0
    codec: str = ""
    pixel_format: str = ""
    key_every: float = 0.0
    is_video: bool = False
    by_dali: bool = False  # whether DALI's CPU decoder shows it as it is shown
    decoded: bool = False  # whether every frame was decoded, too


def scan_file(path: str, decode: bool = False) -> FileFacts:
    """Look at one file; never raises for what is wrong with it. `decode`: also decode every frame."""
    size, mtime_ns = stamp(path)
    try:
        if path.lower().endswith(images.IMAGE_EXTENSIONS):
            return _image_facts(size, mtime_ns, read_bytes(path), decode)
        info = media.probe_video(path)
        if decode:
            media.require_decodable(path, info)
    except UnreadableFile as error:
        return FileFacts(0, 0, error=str(error), decoded=decode)
    except BadFile as error:
        return FileFacts(size, mtime_ns, error=str(error), decoded=decode)
    return FileFacts(
        size,
        mtime_ns,
        is_video=True,
        frames=info.frames,
        fps=info.fps,
        width=info.width,
        height=info.height,
        codec=info.codec,
        pixel_format=info.pixel_format,
        key_every=info.key_every,
        by_dali=info.suits_dali(media.DALI_CPU_CODECS),
        decoded=decode,
    )


def _image_facts(size: int, mtime_ns: int, data: np.ndarray, decode: bool) -> FileFacts:
    info = images.probe_image(data)
    if decode:
        images.decode_image(data)
    return FileFacts(
        size, mtime_ns, frames=1, width=info.width, height=info.height, codec=info.codec.lower(), decoded=decode
    )


def stamp(path: str) -> tuple[int, int]:
    """(size in bytes, modification time in ns); zeros where the file cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def load_index(path: str) -> dict[str, FileFacts]:
    """path -> facts of an earlier scan; empty where there is none, or one of another version."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return {}
        return {name: FileFacts(**facts) for name, facts in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save_index(path: str, files: dict[str, FileFacts]) -> None:
    """Write the index; readers see the old one or the new one, never a part."""
    content = {"version": VERSION, "files": {name: asdict(facts) for name, facts in files.items()}}
    write_beside(path, json.dumps(content))


def is_fresh(facts: FileFacts | None, path: str, decode: bool) -> bool:
    """Whether earlier facts still hold: same size, same modification time, looked at as deeply. A file that could not
    be read is looked at again."""
    return facts is not None and (facts.size, facts.mtime_ns) == stamp(path) != (0, 0) and facts.decoded >= decode


def scan_files(paths: Iterable[str], decode: bool, processes: int) -> Iterator[tuple[str, FileFacts]]:
    """Facts of every file, in the order of `paths`."""
    left = list(paths)
    if processes <= 1 or len(left) < INLINE_BELOW:
        yield from ((path, scan_file(path, decode)) for path in left)
        return
    while left:
        done = 0
        with suppress(BrokenExecutor), worker_pool(processes) as pool:
            for found in _scan_ahead(pool, left, decode, processes * AHEAD):
                yield found
                done += 1
        left = left[done:]
        for path in left[: processes * AHEAD]:  # a process died: of one of these
            yield path, _scan_alone(path, decode)
        left = left[processes * AHEAD :]


def _scan_ahead(pool: Executor, paths: list[str], decode: bool, ahead: int) -> Iterator[tuple[str, FileFacts]]:
    waiting: list[tuple[str, Future[FileFacts]]] = []
    for path in paths:
        with no_interrupts():
            waiting.append((path, pool.submit(scan_file, path, decode)))
        if len(waiting) >= ahead:
            done, future = waiting.pop(0)
            yield done, future.result()
    for path, future in waiting:
        yield path, future.result()


def _scan_alone(path: str, decode: bool) -> FileFacts:
    """In a process of its own, which may die."""
    try:
        with worker_pool(1) as pool, no_interrupts():
            future = pool.submit(scan_file, path, decode)
        return future.result()
    except BrokenExecutor:
        return FileFacts(0, 0, error="ends the process that reads it: too large for the memory, or FFmpeg crashes")

"""`mvd-fast data check LIST`: scan every file once, set the unusable ones aside, say what would decode faster."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mvd_fast.arguments import positive
from mvd_fast.data import images, media
from mvd_fast.data.index import FileFacts, is_fresh, load_index, save_index, scan_files
from mvd_fast.data.lists import read_dataset, side_file
from mvd_fast.data.overview import Overview, overview
from mvd_fast.data.quarantine import quarantine_path, write_quarantine
from mvd_fast.names import printable

LONG_GOP = 32  # frames; a random clip decodes half of this before its first frame
SHORT_SIDE = (256, 320)  # pixels; more is thrown away by the resize to 224
SAVE_EVERY = 60.0  # seconds


@dataclass
class CheckReport:
    """What `check_list` found."""

    files: int
    scanned: int  # the rest was known from the index
    bad: dict[str, str]  # path -> reason
    codecs: dict[str, int]
    overview: Overview = field(default_factory=Overview)
    advice: list[str] = field(default_factory=list)
    index: str = ""
    quarantine: str = ""


def check_list(
    train: str,
    root: str = "",
    min_frames: int = 1,
    decode: bool = False,
    processes: int | None = None,
    console: Console | None = None,
) -> CheckReport:
    """Scan every file of a list or folder that the index beside it does not know yet.

    `min_frames`: shorter videos are set aside as too short. `decode`: decode every frame instead of trusting the
    container. Writes `<list>.index.json`, `<list>.quarantine.jsonl`, and `classes.txt` where a list names classes; an
    interrupted scan keeps what it has seen. Raises ListError when the list itself is missing or malformed.
    """
    extensions = media.VIDEO_EXTENSIONS + images.IMAGE_EXTENSIONS
    entries = read_dataset(train, root, extensions)
    paths = list(dict.fromkeys(entry.path for entry in entries))
    index_path = side_file(train, "index.json")
    known = load_index(index_path)
    known = {path: known[path] for path in paths if is_fresh(known.get(path), path, decode)}
    scanned = len(paths) - len(known)
    _scan(paths, known, index_path, decode, processes or min(os.cpu_count() or 1, 16), console or Console(stderr=True))
    bad = {path: reason for path in paths if (reason := _why_unusable(known[path], min_frames))}
    write_quarantine(train, bad)
    usable = {path: known[path] for path in paths if path not in bad}
    good = list(usable.values())
    return CheckReport(
        files=len(paths),
        scanned=scanned,
        bad=bad,
        codecs=dict(Counter(facts.codec for facts in good).most_common()),
        overview=overview(train, entries, usable, extensions),
        advice=advise(good),
        index=index_path,
        quarantine=quarantine_path(train),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0 when every file is usable, else 1."""
    parser = argparse.ArgumentParser("mvd-fast data check", description="Scan every file of a list or folder, once.")
    parser.add_argument("list", metavar="LIST", help="list file (`path label` a line) or folder of class folders")
    parser.add_argument("--root", default="", help="folder that relative paths start from (default: the list's)")
    parser.add_argument("--min-frames", type=positive, default=1, help="set shorter ones aside (default: %(default)s)")
    parser.add_argument("--decode", action="store_true", help="decode every frame: slow, finds damage inside files")
    parser.add_argument("--processes", type=positive, default=None, help="processes that scan (default: one per CPU)")
    chosen = parser.parse_args(argv)
    report = check_list(chosen.list, chosen.root, chosen.min_frames, chosen.decode, chosen.processes)
    _print(report, Console(soft_wrap=True, highlight=False))
    return 1 if report.bad else 0


def advise(files: list[FileFacts]) -> list[str]:
    """Sentences on what re-encoding would speed up, with a command line; empty when nothing would."""
    videos = [facts for facts in files if facts.is_video]
    findings = [*_codec_advice(videos), *_key_frame_advice(videos), *_size_advice(videos)]
    return [*findings, *_commands()] if findings else []


def _codec_advice(videos: list[FileFacts]) -> list[str]:
    slow = [facts for facts in videos if not facts.by_dali]
    if not slow:
        return []
    names = ", ".join(sorted({f"{facts.codec} {facts.pixel_format}".strip() for facts in slow}))
    return [
        f"{len(slow)} of {len(videos)} videos ({names}) are not what DALI's CPU decoder shows rightly (VP8, VP9, MJPEG "
        "in 8-bit 4:2:0 or 4:2:2, BT.601, upright, without hidden frames): training on a CPU decodes them with PyAV. "
        "On a GPU, NVDEC takes H.264, HEVC, VP9 and AV1 with such colours"
    ]


def _key_frame_advice(videos: list[FileFacts]) -> list[str]:
    long = [facts for facts in videos if facts.key_every > LONG_GOP and facts.frames > 2 * LONG_GOP]
    if not long:
        return []
    typical = median(facts.key_every for facts in long)
    return [
        f"{len(long)} of {len(videos)} videos have a key frame only every {typical:.0f} frames (median): on average "
        f"half of those are decoded before a clip begins. Every {LONG_GOP} or fewer is better"
    ]


def _size_advice(videos: list[FileFacts]) -> list[str]:
    large = [facts for facts in videos if min(facts.width, facts.height) > SHORT_SIDE[1]]
    if not large:
        return []
    typical = median(min(facts.width, facts.height) for facts in large)
    return [
        f"{len(large)} of {len(videos)} videos have a short side above {SHORT_SIDE[1]} pixels (median {typical:.0f}): "
        f"{SHORT_SIDE[0]} to {SHORT_SIDE[1]} is enough for training at 224"
    ]


def _commands() -> list[str]:
    scale = f"-vf \"scale='if(gt(iw,ih),-2,{SHORT_SIDE[0]})':'if(gt(iw,ih),{SHORT_SIDE[0]},-2)'\""
    vp9 = f"-c:v libvpx-vp9 -crf 28 -b:v 0 -g {LONG_GOP} -cpu-used 4 -row-mt 1"
    h264 = f"-c:v libx264 -crf 20 -bf 0 -g {LONG_GOP} -pix_fmt yuv420p -movflags +faststart"
    return [
        f"for training on a CPU: ffmpeg -i IN -an {scale} {vp9} -pix_fmt yuv420p OUT.webm",
        f"for training on a GPU: ffmpeg -i IN -an {scale} {h264} OUT.mp4",
    ]


def _scan(
    paths: list[str], known: dict[str, FileFacts], index_path: str, decode: bool, processes: int, console: Console
) -> None:
    """Add to `known` what is missing; the index is saved now and then and whatever happens."""
    missing = [path for path in paths if path not in known]
    saved = time.monotonic()
    columns = (TextColumn("scanning"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not missing) as progress:
            task = progress.add_task("scan", total=len(missing))
            for path, facts in scan_files(missing, decode, processes):
                known[path] = facts
                progress.advance(task)
                if time.monotonic() - saved > SAVE_EVERY:
                    save_index(index_path, known)
                    saved = time.monotonic()
    finally:
        save_index(index_path, known)


def _why_unusable(facts: FileFacts, min_frames: int) -> str:
    if facts.error:
        return facts.error
    if facts.is_video and facts.frames < min_frames:
        return f"is too short: {facts.frames} frames, at least {min_frames} were asked for"
    return ""


def _print(report: CheckReport, console: Console) -> None:
    codecs = ", ".join(f"{count} {codec}" for codec, count in report.codecs.items())
    console.print(f"{report.files} files, {report.scanned} scanned now, {len(report.bad)} unusable; {codecs or 'none'}")
    lines = [
        *(f"  {printable(path)}: {reason}" for path, reason in report.bad.items()),
        *report.overview.facts,
        *(f"warning: {line}" for line in report.overview.warnings),
        *(f"- {line}" for line in report.advice),
        f"index: {printable(report.index)}",
    ]
    if report.bad:
        lines.append(f"training leaves out what is named in {printable(report.quarantine)}")
    for line in lines:
        console.print(line, markup=False)

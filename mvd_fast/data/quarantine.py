"""The quarantine beside a list: files known to be unusable, one `path<tab>reason` a line."""

from __future__ import annotations

import os
from pathlib import Path

from mvd_fast.data.index import write_whole
from mvd_fast.data.lists import side_file

HEADER = (
    "# Training shows other files in place of these. Written by `mvd-fast data check`; delete a line to try again.\n"
)


def quarantine_path(train: str) -> str:
    """Where the quarantine of a list or folder lies."""
    return side_file(train, "quarantine.txt")


def read_quarantine(train: str) -> dict[str, str]:
    """path -> reason; empty where no quarantine was written."""
    path = quarantine_path(train)
    if not os.path.exists(path):
        return {}
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return {file: reason for file, _, reason in (line.partition("\t") for line in lines)}


def write_quarantine(train: str, bad: dict[str, str]) -> None:
    """Replace the quarantine by `bad` (path -> reason); removes it when nothing is bad."""
    path = quarantine_path(train)
    if bad:
        write_whole(path, HEADER + "".join(f"{file}\t{reason}\n" for file, reason in bad.items()))
    elif os.path.exists(path):
        os.unlink(path)

"""The quarantine beside a list: files known to be unusable, one JSON object a line, `{"path": ..., "reason": ...}`."""

from __future__ import annotations

import json
import os

from mvd_fast.data.lists import ListError, side_file, write_beside
from mvd_fast.names import printable, read_text, split_lines


def quarantine_path(train: str) -> str:
    """Where the quarantine of a list or folder lies."""
    return side_file(train, "quarantine.jsonl")


def read_quarantine(train: str) -> dict[str, str]:
    """path -> reason; empty where no quarantine was written.

    Raises ListError for a line that is none of a quarantine, and where there is only a file of the earlier form.
    """
    path = quarantine_path(train)
    if os.path.exists(path):
        lines = enumerate(split_lines(read_text(path, ListError)), start=1)
        return dict(_parsed(path, number, line) for number, line in lines if line.strip())
    if os.path.exists(old := _old_path(train)):
        raise ListError(
            f"{printable(old)} is of a form that is no longer read; run `mvd-fast data check {printable(train)}` "
            f"again, which writes {os.path.basename(printable(path))} in its place, or delete it"
        )
    return {}


def write_quarantine(train: str, bad: dict[str, str]) -> None:
    """Replace the quarantine by `bad` (path -> reason); removes it when nothing is bad."""
    path = quarantine_path(train)
    if bad:
        lines = (json.dumps({"path": file, "reason": reason}) for file, reason in bad.items())
        write_beside(path, "".join(f"{line}\n" for line in lines))
    for gone in (_old_path(train), *([] if bad else [path])):
        if os.path.exists(gone):
            os.unlink(gone)


def _parsed(path: str, number: int, line: str) -> tuple[str, str]:
    try:
        found = json.loads(line)
        return os.fspath(found["path"]), str(found["reason"])
    except (ValueError, KeyError, TypeError) as error:
        raise ListError(
            f'{printable(path)}, line {number}: it must be a JSON object such as {{"path": "a.mp4", "reason": "..."}}; '
            "mend or delete it"
        ) from error


def _old_path(train: str) -> str:
    return side_file(train, "quarantine.txt")

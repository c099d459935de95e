"""Names of files, byte for byte, and the text files that hold them.

On Linux a name is bytes. Those that are not UTF-8 become lone surrogates in Python (`os.fsdecode`) and the same bytes
again when the file is opened; JSON keeps them as escapes. Only what is printed needs care: `printable`.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path

from mvd_fast.errors import UserError

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
BYTES = range(0xDC80, 0xDD00)  # what `os.fsdecode` makes of bytes that are not UTF-8


def printable(name: str | os.PathLike[str]) -> str:
    r"""A name on one line, as any terminal can show it: `\x..` for a byte that is not UTF-8, and escapes for line ends,
    tabs, and other characters that do not print."""
    return "".join(character if character.isprintable() else _escaped(character) for character in os.fspath(name))


def _escaped(character: str) -> str:
    code = ord(character)
    if code in BYTES:
        return f"\\x{code - BYTES.start + 0x80:02x}"
    return f"\\u{code:04x}" if 0x80 <= code < 0x10000 else character.encode("unicode_escape").decode()


def has_odd_bytes(name: str) -> bool:
    """Whether some of its bytes are not UTF-8."""
    return not name.isascii() and any(ord(character) in BYTES for character in name)


def print_safely() -> None:
    """From here on, what a terminal's encoding does not have is printed as an escape, not raised as an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def read_text(path: str | Path, error: type[UserError] = UserError) -> str:
    """The text of a list, a CSV file or a file of class names, without a byte order mark.

    Raises `error` for a file that cannot be read, is UTF-16, or is no text at all.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as found:
        raise error(f"{printable(path)} cannot be read: {found.strerror or found}") from found
    if b"\0" in data:
        is_utf16 = data.startswith(UTF16)
        raise error(f"{printable(path)} is {'UTF-16 text; save it as UTF-8' if is_utf16 else 'no text file'}")
    return os.fsdecode(data.removeprefix(codecs.BOM_UTF8))


def split_lines(text: str, keep_ends: bool = False) -> list[str]:
    r"""The lines of a text, ending in \n, \r\n or \r. `str.splitlines` also splits at U+2028, U+0085 and others, which
    may stand in names."""
    found = io.StringIO(text, newline="").readlines()
    return found if keep_ends else [line.rstrip("\r\n") for line in found]

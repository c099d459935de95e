"""The error that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message is one clear sentence that says what came, what is accepted and how to mend it.

    Commands print the sentence alone and end with status 2. Every other exception is a fault of the program and keeps
    its traceback, a plain `ValueError` (of `int("x")`, of `zip(strict=True)`) too.

    `everywhere`: raised on every rank alike, so that one of them shows it. `status`: the command's.
    """

    everywhere = False
    status = 2


# Exit statuses after a signal: nothing was saved, and the run was saved and can go on.
INTERRUPTED, SAVED = 130, 143

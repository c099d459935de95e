"""The error that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message is one clear sentence that says what came, what is accepted and how to mend it.

    Commands print the sentence alone and end with status 2. Every other exception is a fault of the program and keeps
    its traceback, a plain `ValueError` (of `int("x")`, of `zip(strict=True)`) too.
    """

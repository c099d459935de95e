"""Which errors are a user's to mend."""

from __future__ import annotations

import traceback

_OURS = ("mvd_fast", "mvd_kernels")


def is_users_to_mend(error: ValueError) -> bool:
    """Whether a ValueError is one of our sentences: of a type of ours, or raised by our code.

    One that a library raises from below us is a fault of the program, and keeps its traceback.
    """
    raised_in = type(error).__module__
    if raised_in == "builtins":
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        raised_in = frame.f_globals["__name__"]
    return raised_in.split(".")[0] in _OURS

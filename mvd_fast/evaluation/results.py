"""Results of entries that were tested on several ranks."""

from __future__ import annotations

from typing import TypeVar

from mvd_fast.errors import UserError
from mvd_fast.names import printable
from mvd_fast.training import launch

Part = TypeVar("Part")


def gather_results(
    found: dict[int, Part], bad: dict[str, str], total: int, what: str
) -> tuple[dict[int, Part], dict[str, str]]:
    """All ranks' results by the number of their entry, ascending, and what they left out (collective).

    Raises UserError, on every rank, if there are no results of the `total` entries, which the sentence calls `what`.
    """
    parts = launch.all_gather((found, bad))
    together = {number: part for results, _ in parts for number, part in results.items()}
    all_bad = {path: reason for _, left_out in parts for path, reason in left_out.items()}
    if not together:
        path, reason = next(iter(all_bad.items()))
        raise UserError(f"none of {total} {what} can be used, for instance {printable(path)} {reason}")
    return dict(sorted(together.items())), all_bad

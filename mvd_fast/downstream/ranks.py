"""A test on several ranks: each takes its share, every one gets the whole.

A launcher (`torchrun`, `deepspeed`), srun or mpirun starts them; without one there is a single rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mvd_fast.errors import UserError

Part = TypeVar("Part")


@contextmanager
def joined() -> Iterator[int]:
    """This process's rank, with the others for as long as the block lasts, if there are any."""
    from mvd_fast.train import TASK_VARIABLES, distributed

    if not any(int(os.environ.get(size, 1)) > 1 for _, size, _ in (*TASK_VARIABLES, ("RANK", "WORLD_SIZE", ""))):
        yield 0
        return
    with distributed():
        yield int(os.environ["RANK"])


def share(total: int) -> range:
    """This rank's entries of `total`: r, r + n, ... for rank r of n."""
    rank, world = _place()
    return range(total)[rank::world]


def title(what: str) -> str:
    """Of a progress bar that shows this rank's share of the work."""
    rank, world = _place()
    return what if world == 1 else f"{what} (rank {rank} of {world})"


def device(asked: str | None) -> torch.device:
    """The one asked for, else this rank's GPU, else the CPU."""
    if asked:
        return torch.device(asked)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local := int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", local)


def gathered(
    found: dict[int, Part], bad: dict[str, str], total: int, what: str
) -> tuple[dict[int, Part], dict[str, str]]:
    """All ranks' results by the number of their entry, ascending, and what they left out (collective).

    Raises UserError, on every rank, if there are no results of the `total` entries, which the sentence calls `what`.
    """
    world = _place()[1]
    parts: list[Any] = [(found, bad)]
    if world > 1:
        own, parts = parts[0], [None] * world
        dist.all_gather_object(parts, own)
    together = {number: part for results, _ in parts for number, part in results.items()}
    all_bad = {path: reason for _, left_out in parts for path, reason in left_out.items()}
    if not together:
        path, reason = next(iter(all_bad.items()))
        raise UserError(f"none of {total} {what} can be used, for instance {path} {reason}")
    return dict(sorted(together.items())), all_bad


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

"""No step from a loss that is infinite or NaN, on any rank."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mvd_fast.names import printable

from . import launch


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN; the step was not made. Raised on every rank, with the same sentence."""


class FiniteCheck:
    """Whether all losses of one step are finite, on all ranks.

    `begin` after the step's last forward pass, `failed` after its backward pass: the ranks' reduction and its way to
    the host lie beside the backward pass, so that reading them leaves the device busy.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._any: launch.AnyRank | None = None

    def add(self, loss: Tensor, index: Tensor) -> None:
        """One micro batch: its loss, a scalar, and the positions of its samples in the list."""
        self._losses.append((loss.detach(), index))

    def begin(self) -> None:
        """Starts the ranks' agreement on what was added (collective)."""
        self._any = launch.AnyRank(~torch.stack([loss for loss, _ in self._losses]).isfinite().all())

    def failed(self) -> bool:
        """Whether a loss is not finite; the same on every rank. If none, the next step's losses are awaited."""
        assert self._any is not None, "begin comes first"
        if self._any.result():
            return True
        self._losses, self._any = [], None
        return False

    def describe(self, step: int, names: Callable[[Tensor], list[str]]) -> str:
        """Which losses of which ranks, and the samples' `names` (collective)."""
        bad = [(loss.item(), index) for loss, index in self._losses if not math.isfinite(loss.item())]
        own = (bad[0][0], [name for _, index in bad for name in names(index)]) if bad else None
        return "; ".join(
            f"loss is {found[0]} at step {step} on rank {rank} (samples: {', '.join(map(printable, found[1]))})"
            for rank, found in enumerate(launch.all_gather(own))
            if found
        )

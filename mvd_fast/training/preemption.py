"""Stopping on a signal: every rank saves after the same step."""

from __future__ import annotations

import signal
from typing import Any

import torch

from . import launch, messages


class PreemptionHandler:
    """SIGTERM (or Ctrl-C, once) on any rank, agreed on by all ranks at the same step.

    With several ranks the agreement of one step is read after the next, so that nobody waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received = False
        self._pending: launch.AnyRank | None = None
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if launch.rank() == 0 and not self._received:
            again = "; Ctrl-C once more stops at once" if number == signal.SIGINT else ""
            messages.say("", f"mvd-fast: saves after this step, then stops{again}")
        self._received = True
        if number == signal.SIGINT:  # the second one interrupts at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self) -> bool:
        """Whether to stop now; every rank gets the same answer. Called once per step (collective)."""
        if launch.world_size() == 1:
            return self._received
        agreed = self._pending is not None and self._pending.result()
        self._pending = launch.AnyRank(torch.full((), self._received, dtype=torch.bool, device=self._device))
        return agreed

"""Averaged weights beside the trained ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .checkpoint import CheckpointError
from .engine import master_weight


class ModelEMA:
    """Exponentially averaged float32 weights (torch.optim.swa_utils), the same on every rank.

    With ZeRO each step gathers the weights once more; that is the price of averaging partitioned ones.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self._mix = get_ema_multi_avg_fn(decay)
        self.values = {name: weight.clone() for name, weight in self._current(engine).items()}

    @staticmethod
    def _current(engine: Any) -> dict[str, Tensor]:
        named = engine.module.named_parameters()
        return {name: master_weight(engine, p).detach().float() for name, p in named if p.requires_grad}

    def update(self, engine: Any) -> None:
        """Moves towards the engine's weights, after a step (collective)."""
        current = self._current(engine)
        self._mix(list(self.values.values()), [current[name] for name in self.values], None)

    def network(self, engine: Any) -> Callable[[Tensor], Tensor]:
        """The engine's network with the averaged weights in the precision of its own."""
        types = {name: p.dtype for name, p in engine.module.named_parameters()}
        averaged = {name: value.to(types[name]) for name, value in self.values.items()}
        return lambda video: torch.func.functional_call(engine.module, averaged, (video,))

    def state_dict(self) -> dict[str, Tensor]:
        """On the CPU, for checkpoints and exports."""
        return {name: value.to("cpu", copy=True).contiguous() for name, value in self.values.items()}

    def load_state_dict(self, state: dict[str, Tensor] | None, source: Path) -> None:
        """source: the checkpoint, for the sentence of the CheckpointError where it has none."""
        if state is None:
            raise CheckpointError(
                f"{source} holds no averaged weights, but optim.ema is on; switch it off, or start a new run"
            )
        for name, value in self.values.items():
            value.copy_(state[name])

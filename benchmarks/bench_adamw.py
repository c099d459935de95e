"""The step of a bf16 ViT-B student on one rank: the engine's own under ZeRO 0 against DeepSpeed's under ZeRO 1.

Both are whole engines. Their backward pass only hands gradients over (of a loss that is linear in the weights), so that
what is timed is that, what the engine does with gradients, and the step.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import Case
from torch import Tensor, nn

pytest.importorskip("deepspeed")

from mvd_fast.config.load import load_config
from mvd_fast.tasks.distill import DistilledStudent
from mvd_fast.training import launch
from mvd_fast.training.engine import backward, start_engine
from mvd_fast.training.optim import set_lr


class Linear(nn.Module):
    """The weights of a network, and sum(weight * gradient) as its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList(p for p in network.parameters() if p.requires_grad)
        generator = torch.Generator().manual_seed(0)
        self.gradients = [torch.randn(p.shape, generator=generator).mul(0.01).bfloat16() for p in self.weights]

    def forward(self) -> Tensor:
        return sum((p * g.to(p.device)).sum() for p, g in zip(self.weights, self.gradients, strict=True))


SIDES = {"ours, ZeRO 0": 0, "DeepSpeed, ZeRO 1": 1}


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    with launch.init_process_group():
        engines = {}
        for name, stage in SIDES.items():
            config = load_config("vitb_from_vitb", [f"deepspeed.zero_optimization.stage={stage}", "batch.size=1"])
            torch.manual_seed(0)
            engines[name] = start_engine(Linear(DistilledStudent(config.model, config.decoders)), config, 1, 1)
            set_lr(engines[name].optimizer, 1e-3)

        def update(engine) -> list[Tensor]:
            backward(engine, engine())
            engine.step()
            return list(engine.module.parameters())

        # A bf16 weight differs by one rounding where the float32 ones differ in their last bit.
        sides = {name: lambda engine=engine: update(engine) for name, engine in engines.items()}
        yield Case("AdamW step ViT-B student bf16", sides, tolerance=1e-2, reference="DeepSpeed, ZeRO 1")


@pytest.mark.parametrize("side", SIDES)
def test_update(compare, case, side):
    compare(case, side)

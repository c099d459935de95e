"""Schedules and parameter groups of the recipes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mvd_fast.config.run import OptimConfig
from mvd_fast.training.optim import build_optimizer, learning_rate, parameter_groups, set_lr

SCHEDULES = json.loads((Path(__file__).parent / "data" / "recipe_facts.json").read_text())["cosine_schedule"]


@pytest.mark.parametrize("facts", SCHEDULES, ids=lambda f: f"{f['base_value']}-{f['epochs']}")
def test_schedule_equals_the_references(facts: dict) -> None:
    config = OptimConfig(
        base_lr=facts["base_value"],
        base_min_lr=facts["final_value"],
        epochs=facts["epochs"],
        warmup_epochs=facts["warmup_epochs"],
    )
    ours = [learning_rate(u, facts["niter_per_ep"], config, 256) for u in range(len(facts["values"]))]
    np.testing.assert_allclose(ours, facts["values"], rtol=1e-12)


def test_rates_scale_with_the_batch() -> None:
    config = OptimConfig(base_lr=1.5e-4, base_min_lr=1e-4, epochs=400, warmup_epochs=40)
    rates = [learning_rate(step, 10, config, 1024) for step in (0, 399, 400, 3999)]
    assert rates == pytest.approx([0.0, 6e-4, 6e-4, 4e-4], rel=1e-4)


def test_groups_keep_frozen_parameters_out_and_decay_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.token = nn.Parameter(torch.zeros(1, 1, 4))
    model.table = nn.Parameter(torch.zeros(1, 5, 4), requires_grad=False)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.05)
    shapes = {group["weight_decay"]: sorted(tuple(p.shape) for p in group["params"]) for group in groups}
    assert shapes == {0.05: [(1, 1, 4), (4, 3)], 0.0: [(4,), (4,), (4,)]}


def test_set_lr_respects_each_groups_scale() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimConfig(epochs=1, warmup_epochs=0))
    optimizer.param_groups[0]["lr_scale"] = 0.5
    set_lr(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]

"""What DeepSpeed is given, and the seeds of steps."""

from __future__ import annotations

import pytest
import tiny_runs

from mvd_fast.tasks.distill import Config
from mvd_fast.training.engine import deepspeed_config
from mvd_fast.training.trainer import step_seed


@pytest.mark.parametrize(
    ("precision", "accumulation", "stage", "expected"),
    [("bf16", 4, 1, "fp32"), ("bf16", 1, 1, None), ("bf16", 4, 0, None), ("fp32", 4, 2, None)],
)
def test_bf16_gradients_are_summed_in_fp32(tmp_path, precision, accumulation, stage, expected) -> None:
    content = tiny_runs.config(tmp_path, tmp_path, precision=precision)
    content["deepspeed"] = {"zero_optimization": {"stage": stage}, "wall_clock_breakdown": True}
    told = deepspeed_config(Config.model_validate(content), micro_batch_size=2, grad_accum_steps=accumulation)
    assert told.get("data_types", {}).get("grad_accum_dtype") == expected
    assert told["wall_clock_breakdown"] and told["gradient_clipping"] == 0.0
    assert told["bf16"] == {"enabled": precision == "bf16" and stage > 0}  # stage 0: MasterAdamW's
    assert told.get("communication_data_type") == ("bf16" if (precision, stage) == ("bf16", 0) else None)


def test_step_seeds_differ_in_every_argument() -> None:
    seeds = {step_seed(*numbers) for numbers in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(7, 11, 2, 3) == step_seed(7, 11, 2, 3)

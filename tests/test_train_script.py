"""`train.py` as a script: which rank it is, and what it tells DeepSpeed."""

from __future__ import annotations

import pytest
import tiny_runs

from mvd_fast.config import RunConfig
from mvd_fast.config_file import ConfigError
from mvd_fast.engine import deepspeed_config
from mvd_fast.train import _adopt_ranks
from mvd_fast.trainer import step_seed

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("told", "rank", "size", "local"),
    [
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", **MASTER}, "5", "8", "1"),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3", **MASTER},
            *("3", "4", "3"),
        ),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "SLURM_STEP_NUM_TASKS": "8", **MASTER}, "2", "4", "0"),
        # A batch script without srun: one process, whatever the job was given.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "0", "1", "0"),
        ({}, "0", "1", "0"),
    ],
)
def test_ranks_are_taken_from_whoever_started_us(told: dict[str, str], rank: str, size: str, local: str) -> None:
    environment = dict(told)
    _adopt_ranks(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == (rank, size, local)
    assert environment["MASTER_ADDR"] and int(environment["MASTER_PORT"]) > 0


def test_tasks_without_a_meeting_point_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of 8 tasks, but MASTER_ADDR and MASTER_PORT are not set"):
        _adopt_ranks({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"})


@pytest.mark.parametrize(
    ("precision", "accumulation", "stage", "expected"),
    [("bf16", 4, 1, "fp32"), ("bf16", 1, 1, None), ("bf16", 4, 0, None), ("fp32", 4, 2, None)],
)
def test_bf16_gradients_are_summed_in_fp32(tmp_path, precision, accumulation, stage, expected) -> None:
    content = tiny_runs.config(tmp_path, tmp_path, precision=precision)
    content["deepspeed"] = {"zero_optimization": {"stage": stage}, "wall_clock_breakdown": True}
    told = deepspeed_config(RunConfig.model_validate(content), micro=2, accumulation=accumulation)
    assert told.get("data_types", {}).get("grad_accum_dtype") == expected
    assert told["wall_clock_breakdown"] and told["gradient_clipping"] == 0.0
    assert told["bf16"] == {"enabled": precision == "bf16" and stage > 0}  # stage 0: MasterAdamW's
    assert told.get("communication_data_type") == ("bf16" if (precision, stage) == ("bf16", 0) else None)


def test_step_seeds_differ_in_every_argument() -> None:
    seeds = {step_seed(*numbers) for numbers in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(7, 11, 2, 3) == step_seed(7, 11, 2, 3)

"""Which process this is, and what processes do together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_runs
import torch

from mvd_fast.errors import UserError
from mvd_fast.training import launch

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
    launch.publish(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == (rank, size, local)
    assert environment["MASTER_ADDR"] and int(environment["MASTER_PORT"]) > 0


def test_tasks_without_a_meeting_point_are_refused() -> None:
    with pytest.raises(UserError, match="one of 8 tasks, but MASTER_ADDR and MASTER_PORT are not set"):
        launch.publish({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"})


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, (1, 2, 1)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0"}, (2, 3, 0)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4, 0)),
        # torchrun with one process in each of several tasks that know nothing of each other
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (0, 1, 0)),
        ({}, (0, 1, 0)),
    ],
)
def test_placement_needs_no_meeting_point(told: dict[str, str], expected: tuple[int, int, int]) -> None:
    assert launch.placement(told) == expected


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero'"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is ''"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but must be less than WORLD_SIZE, which is 2"),
    ],
)
def test_variables_that_cannot_be_right_are_named(told: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        launch.placement(told)


def test_a_task_with_a_gpu_of_its_own_takes_it() -> None:
    assert launch.gpu_index(3, visible=1) == 0
    assert launch.gpu_index(3, visible=4) == 3
    with pytest.raises(UserError, match="local rank 4 has no GPU, as 4 are visible"):
        launch.gpu_index(4, visible=4)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'gpu' is not known; it must be cpu, cuda or cuda:N"):
        launch.device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.device() == torch.device("cpu")
    with pytest.raises(UserError, match="device cuda was asked for, but torch sees no GPU"):
        launch.device("cuda")


def test_two_ranks_share_and_agree(tmp_path: Path) -> None:
    script = """
import torch
from mvd_fast.training import launch
with launch.init_process_group(alone=False) as rank:
    print(rank, list(launch.shard(5)), launch.all_gather(f"r{rank}"), launch.broadcast(rank), launch.title("videos"))
    flags = [launch.AnyRank(torch.tensor(one)) for one in (rank == 1, False, True)]
    print(launch.mean(torch.tensor([1.0, 4.0]) * rank).tolist(), [flag.result() for flag in flags])
"""
    said = []
    for process in tiny_runs.start_ranks([sys.executable, "-c", script]):
        out, err = process.communicate(timeout=tiny_runs.TIMEOUT)
        assert process.returncode == 0, err
        said.append(out)
    agreed = "[0.5, 2.0] [True, False, True]\n"
    assert said[0].endswith("0 [0, 2, 4] ['r0', 'r1'] 0 videos (rank 0 of 2)\n" + agreed)
    assert said[1].endswith("1 [1, 3] ['r0', 'r1'] 0 videos (rank 1 of 2)\n" + agreed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_flag_comes_to_the_host_beside_queued_work() -> None:
    """It is read while work that was queued after it still goes on."""
    torch.cuda.synchronize()
    for expected in (True, False):
        flag = launch.AnyRank(torch.tensor(expected, device="cuda"))
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
        done = torch.cuda.Event()
        done.record()
        assert flag.result() is expected
        assert not done.query()
        torch.cuda.synchronize()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path: Path, accumulation: int) -> None:
    """Rank 1's loss is NaN in step 2 (with two micro batches in the first of them): both ranks end with status 1
    before the step, within two minutes of their start, with one sentence, and nothing of theirs is saved."""
    inputs = tiny_runs.write_inputs(tmp_path)
    run_dir = tmp_path / "run"
    content = tiny_runs.config(inputs, run_dir, batch={"size": 8, "grad_accum_steps": accumulation})
    config_file = tiny_runs.write_config(tmp_path / "c.json", content)
    worker = str(Path(__file__).with_name("nan_worker.py"))
    ranks = tiny_runs.start_ranks([sys.executable, worker, str(config_file), "1", str(2 * accumulation)])
    outputs = []
    for process in ranks:
        outputs.append("".join(process.communicate(timeout=600)))
        assert process.returncode == 1, outputs
    sentence = "mvd-fast: error: loss is nan at step 2 on rank 1 (samples: "
    assert outputs[0].count(sentence) == 1 and "error" not in outputs[1]
    assert "Traceback" not in "".join(outputs)
    assert outputs[0].count(".webm") == 4 // accumulation and "the step was not made" in outputs[0]
    saved = run_dir / "checkpoints" / "step-00000002"
    assert f"Last good checkpoint: {saved}" in outputs[0]
    assert list((run_dir / "checkpoints").iterdir()) == [saved] and not (run_dir / "model.safetensors").exists()

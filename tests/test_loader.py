"""The loader: what it delivers is a pure function of the cursor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from video_files import assert_same, data_setup, loader_of, take, write_list, write_mixed_list, write_video

from mvd_fast.data import sampling
from mvd_fast.data.sampling import SampleKey
from mvd_fast.data.source import Readers, Schedule, Source
from mvd_kernels import tube_mask


@pytest.fixture(scope="module")
def mixed_list(tmp_path_factory) -> Path:
    return write_mixed_list(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def vp9_list(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vp9")
    for number in range(10):
        write_video(folder / f"clip {number}_vp9.webm", 12 + 3 * number, seed=number)
    return write_list(folder / "vp9.txt", [f"clip {number}_vp9.webm" for number in range(10)])


def test_masks_equal_the_kernel_library(vp9_list):
    config = data_setup(vp9_list, seed=2**40 + 3, mask_ratio=0.75)
    for epoch, batch in zip((0, 0, 1), take(config, 3), strict=True):
        expected = tube_mask(config.seed, epoch, batch["index"], config.request.masks.grid, 0.75).mask
        assert batch["mask"].dtype == torch.bool
        assert torch.equal(batch["mask"], expected)


def test_an_epoch_shows_every_file_once_in_an_order_of_its_own(vp9_list):
    config = data_setup(vp9_list)
    indices = [batch["index"].tolist() for batch in take(config, 4, micro=5)]
    first, second = indices[0] + indices[1], indices[2] + indices[3]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_resuming_at_any_update_continues_the_run(mixed_list):
    config = data_setup(mixed_list)
    whole = take(config, 5)
    assert_same(take(config, 5), whole)
    for start in (1, 2, 4):
        assert_same(take(config, 5 - start, start), whole[start:])


def test_every_world_size_sees_the_same_updates(mixed_list):
    config = data_setup(mixed_list)
    whole = take(config, 2, micro=8)
    parts = take(config, 4, micro=4, accumulation=2)
    ranks = [take(config, 4, rank=rank, world=2, micro=2, accumulation=2) for rank in (0, 1)]
    for name in whole[0]:
        for step in range(2):
            accumulated = [parts[2 * step][name], parts[2 * step + 1][name]]
            dealt = [ranks[rank][2 * step + part][name] for part in (0, 1) for rank in (0, 1)]
            assert torch.equal(torch.cat(accumulated), whole[step][name])
            assert torch.equal(torch.cat(dealt), whole[step][name])


def test_seeds_and_epochs_differ(vp9_list):
    first, other = take(data_setup(vp9_list), 1)[0], take(data_setup(vp9_list, seed=1), 1)[0]
    assert not torch.equal(first["index"], other["index"])
    epochs = take(data_setup(vp9_list), 2, micro=10)
    zero, one = ({int(i): video for i, video in zip(b["index"], b["video"], strict=True)} for b in epochs)
    assert any(not torch.equal(zero[index], one[index]) for index in zero)


def test_batches_are_not_overwritten_by_later_ones(vp9_list):
    config = data_setup(vp9_list, prefetch=1)
    with closing(loader_of(config)) as loader:
        batches = loader.batches(0)
        kept = [next(batches) for _ in range(6)]
        copies = [{name: tensor.clone() for name, tensor in batch.items()} for batch in kept]
        for _ in range(6):
            next(batches)
    assert_same(kept, copies)


def test_worker_processes_deliver_the_same(mixed_list):
    config = data_setup(mixed_list)
    assert_same(take(data_setup(mixed_list, workers=1), 3), take(config, 3))


KILLED = """
import os, signal
from mvd_fast.data.containers import read_bytes
from mvd_fast.data.sampling import SampleKey
from mvd_fast.data.source import Readers, Source

class Kind:
    check = staticmethod(read_bytes)

if __name__ == "__main__":
    readers = Readers(Source(["nowhere"], Kind()), threads=1, workers=1)
    try:
        readers.samples([SampleKey(0, 0, 0)], frozenset())
    except ValueError:
        print(*readers._pool._processes, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_go_when_the_trainer_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    killed = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    worker = Path("/proc") / killed.stdout.strip() / "cmdline"
    assert worker.parent.name.isdecimal()
    for _ in range(100):
        if not worker.exists() or not worker.read_bytes():  # gone, or a zombie
            return
        time.sleep(0.1)
    pytest.fail("the worker process still runs")


def test_lists_that_cannot_work_are_refused_at_once(vp9_list, tmp_path):
    with pytest.raises(ValueError, match="lists 10 files, less than one step"):
        loader_of(data_setup(vp9_list), micro=11)
    with pytest.raises(ValueError, match=r"none of 10 files .* set data\.root"):
        loader_of(data_setup(vp9_list, root=str(tmp_path)))


def test_a_closed_loader_stops(vp9_list):
    loader = loader_of(data_setup(vp9_list))
    batches = loader.batches(0)
    next(batches)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_schedule_deals_out_consecutive_parts_of_the_permutation():
    schedule = Schedule(seed=3, count=50, micro=2, accumulation=3, rank=1, world_size=2)
    assert schedule.size == 12 and schedule.steps_per_epoch == 4
    order = sampling.epoch_order(3, 1, 50)
    step = (4 + 2) * 3 + 1  # epoch 1, its step 2, second micro batch
    assert schedule.keys(step) == [SampleKey(3, 1, int(i)) for i in order[24 + 4 + 2 : 24 + 4 + 4]]


def _die(key, suspects):
    os._exit(1)


def test_a_dead_worker_is_one_sentence():
    readers = Readers(Source(["nowhere"], None), threads=1, workers=1)
    with closing(readers), pytest.raises(ChildProcessError, match=r"lower data\.workers"):
        readers._sample = _die
        readers.samples([SampleKey(0, 0, 0)], frozenset())

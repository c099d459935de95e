"""`teachers.prefetch`: the teachers of the next batch beside the student."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_runs
import torch

from mvd_fast.config.base import ConfigError
from mvd_fast.config.load import load_config
from mvd_fast.models import ImageTeacher, VideoTeacher
from mvd_fast.tasks._prefetch import prefetched
from mvd_fast.tasks.distill import Distill, DistilledStudent, distillation
from mvd_kernels import tube_mask

CPU = torch.device("cpu")
TARGETS = ("target_image", "target_video")


def make_task(**options: float) -> Distill:
    torch.manual_seed(0)
    video = {**tiny_runs.ENCODER, **tiny_runs.CLIP}
    student = DistilledStudent(**video, **tiny_runs.two_decoders())
    return distillation(student, ImageTeacher(**tiny_runs.ENCODER), VideoTeacher(**video), **options)


def make_batches(count: int, device: torch.device = CPU) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [
        {
            "video": torch.randn(2, 3, 8, 32, 32).to(device),
            "mask": tube_mask(0, 0, torch.arange(2) + 2 * number, (4, 4, 4), 0.5).mask.to(device),
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_batches_are_the_same_and_in_order(count: int) -> None:
    """One is fetched ahead, none is lost at the end; losses are those of teachers that run within the step."""
    task, fetched = make_task(), []

    def loader() -> Iterator[dict[str, torch.Tensor]]:
        for batch in make_batches(count):
            fetched.append(batch)
            yield batch

    losses = []
    for number, batch in enumerate(prefetched(task.with_targets, loader(), CPU), 1):
        assert len(fetched) == min(number + 1, count)
        assert batch["video"] is fetched[number - 1]["video"]
        losses.append(task(batch)["loss"].item())
    assert losses == [task(batch)["loss"].item() for batch in make_batches(count)]


def test_a_teacher_of_weight_0_is_not_run() -> None:
    task = make_task(image_weight=0.0)
    (batch,) = prefetched(task.with_targets, iter(make_batches(1)), CPU)
    assert "target_image" not in batch and batch["target_video"].shape == (2, 64, 32)
    assert task(batch).keys() == {"loss", "loss_video"} and task(batch)["loss_video"] > 0


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's path with streams that write down what they are asked: the student waits for the batch that it gets,
    with the next one's teachers at work, and owns the targets' memory before they can be given back."""
    told: list[object] = []

    class Stream:
        def __init__(self, name: object = "teachers") -> None:
            self.name, self.events = name, 0

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} wait for {other.name}")

        def record_event(self) -> int:
            self.events += 1
            return self.events

        def wait_event(self, event: int) -> None:
            told.append(f"{self.name} waits for {event}")

    @contextlib.contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        told.append(f"on {stream.name}")
        yield
        told.append("off")

    student = Stream("student")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: student)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    owners: list[tuple[torch.Tensor, Stream]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: owners.append((tensor, stream)))
    task = make_task()
    task.targets["video"].register_forward_hook(lambda *_: told.append("teach"))
    for number, batch in enumerate(prefetched(task.with_targets, iter(make_batches(2)), torch.device("cuda")), 1):
        told.append(f"train {number}")
        assert [stream for _, stream in owners] == [student, student]
        assert all(tensor is batch[name] for (tensor, _), name in zip(owners, TARGETS, strict=True))
        owners.clear()
    teaching = ["on teachers", "teach", "off"] * 2
    training = [line for n in (1, 2) for line in (f"student waits for {n}", f"train {n}")]
    assert told == ["teachers wait for student", *teaching, *training]


def test_runs_are_the_same_and_resume(tmp_path: Path) -> None:
    """By the command line: losses and weights bit for bit, also when the second half is made by a resumed run."""
    inputs = tiny_runs.write_inputs(tmp_path)

    def run(name: str, prefetch: bool) -> tuple[dict[int, float], bytes, str]:
        content = tiny_runs.config(inputs, tmp_path / name, checkpoint={"every_steps": 5})
        content["teachers"] = {"prefetch": prefetch}
        status, output = tiny_runs.run(tiny_runs.write_config(tmp_path / f"{name}.json", content))
        assert status == 0, output
        return tiny_runs.losses(tmp_path / name), (tmp_path / name / "model.safetensors").read_bytes(), output

    plain, ahead = run("plain", False), run("ahead", True)
    assert ahead[:2] == plain[:2]
    shutil.rmtree(tmp_path / "ahead" / "checkpoints" / "step-00000010")
    (tmp_path / "ahead" / "model.safetensors").unlink()  # as a run lies there that was killed before its end
    resumed = run("ahead", True)
    assert "tiny 6/10" in resumed[2] and "tiny 1/10" not in resumed[2], "it went on after step 5"
    assert resumed[:2] == plain[:2]


def test_where_no_teachers_run_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teachers.prefetch: no teachers run where targets are stored"):
        load_config("demo/student", ["teachers.prefetch=true", f"teachers.cache.path={tmp_path}"])
    with pytest.raises(ConfigError, match=r"teachers: unknown key"):
        load_config("demo/video_teacher", ["teachers.prefetch=true"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_losses_are_the_same() -> None:
    device = torch.device("cuda")
    task = make_task().to(device)
    ahead = [
        task(batch)["loss"].item() for batch in prefetched(task.with_targets, iter(make_batches(6, device)), device)
    ]
    assert ahead == pytest.approx([task(batch)["loss"].item() for batch in make_batches(6, device)], rel=1e-6)

"""Targets of the next batch while the student trains on this one (`teachers.ahead`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mvd_fast.objectives.distillation import TARGETS, DistillationObjective

Batch = dict[str, Tensor]


def targets_ahead(objective: DistillationObjective, batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches with their targets; when one is handed out, the teachers have been given the next.

    On a GPU they run on a stream of their own, and the student's stream waits for the targets it is about to use. On a
    CPU they run in the same thread: nothing is gained.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))  # which has brought the teachers' weights there
    taught = None
    for batch in batches:
        following = _teach(objective, batch, stream)
        if taught:
            yield _handed_over(*taught, device)
        taught = following
    if taught:
        yield _handed_over(*taught, device)


def _teach(
    objective: DistillationObjective, batch: Batch, stream: torch.cuda.Stream | None
) -> tuple[Batch, torch.cuda.Event | None]:
    """The batch with its targets, and when they are there (None: now). The loader's batches are whole on arrival."""
    if stream is None:
        return objective.taught(batch), None
    with torch.cuda.stream(stream):
        return objective.taught(batch), stream.record_event()


def _handed_over(batch: Batch, done: torch.cuda.Event | None, device: torch.device) -> Batch:
    if done is not None:
        student = torch.cuda.current_stream(device)
        student.wait_event(done)
        for name in TARGETS:
            if batch[name] is not None:  # its memory is the teachers' stream's, which must not reuse it too early
                batch[name].record_stream(student)
    return batch

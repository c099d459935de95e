"""Targets of the next batch while the student trains on this one (`teachers.prefetch`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def prefetched(
    with_targets: Callable[[Batch], Batch], batches: Iterator[Batch], device: torch.device
) -> Iterator[Batch]:
    """The same batches with their targets; when one is handed out, the next one's are under way.

    with_targets: a batch and its targets. On a GPU it runs on a stream of its own, and the student's stream waits for
    the targets that it is about to use. On a CPU it runs in the same thread: nothing is gained.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))  # which has brought the teachers' weights there
    ready = None
    for batch in batches:
        following = _started(with_targets, batch, stream)
        if ready:
            yield _handed_over(*ready, device)
        ready = following
    if ready:
        yield _handed_over(*ready, device)


def _started(
    with_targets: Callable[[Batch], Batch], batch: Batch, stream: torch.cuda.Stream | None
) -> tuple[Batch, frozenset[str], torch.cuda.Event | None]:
    """The batch with its targets, their names, and when they are there (None: now). The loader's batches are whole on
    arrival."""
    if stream is None:
        return with_targets(batch), frozenset(), None
    with torch.cuda.stream(stream):
        found = with_targets(batch)
        return found, frozenset(found.keys() - batch.keys()), stream.record_event()


def _handed_over(batch: Batch, added: frozenset[str], done: torch.cuda.Event | None, device: torch.device) -> Batch:
    if done is not None:
        student = torch.cuda.current_stream(device)
        student.wait_event(done)
        for name in sorted(added):  # their memory is the other stream's, which must not reuse it too early
            batch[name].record_stream(student)
    return batch

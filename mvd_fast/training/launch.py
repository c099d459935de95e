"""The only home of ranks, devices and process groups: which process this is, and what processes do together.

`torchrun`, `deepspeed`, `srun` or `mpirun` start the processes and name them in the environment; without one of them
there is a single rank. What is collective must be called by every rank, in the same order.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mvd_fast.errors import UserError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

# Variables of rank, world size and local rank. The first launcher with a world size above one is taken: torchrun and
# deepspeed start processes inside a task of Slurm or MPI, and Slurm sets the variables of MPI.
LAUNCHERS = {
    "torchrun, deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
SETTLING = 0.2  # seconds for gloo's threads, which only wait for their turn


# ---- this process ----


class Placement(NamedTuple):
    """rank of world_size; local_rank counts the processes of this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def placement(environment: Mapping[str, str] = os.environ) -> Placement:
    """Which process this is, by the launcher's variables; the only one without them. Needs no process group."""
    for rank, size, local in LAUNCHERS.values():
        if "RANK" in environment and rank != "RANK":
            break  # a launcher inside a task of another: its word counts
        if _number(environment, size, "1") > 1:
            found = Placement(*(_number(environment, *variable) for variable in ((rank, ""), (size, ""), (local, "0"))))
            if found.rank >= found.world_size:
                raise UserError(f"{rank} is {found.rank}, but must be less than {size}, which is {found.world_size}")
            return found
    return Placement()


def _number(environment: Mapping[str, str], name: str, default: str) -> int:
    text = environment.get(name, default)
    if not text.isdecimal():
        raise UserError(f"the environment's {name} is {text!r}, but must be the launcher's number; unset it")
    return int(text)


def is_distributed() -> bool:
    """Whether a launcher started this process as one of several."""
    return placement().world_size > 1


def device(asked: str | None = None) -> torch.device:
    """The device asked for, else this rank's GPU, else the CPU. `DS_ACCELERATOR=cpu` keeps runs off the GPU."""
    import torch

    if asked:
        try:
            found = torch.device(asked)
        except RuntimeError:
            raise UserError(f"device {asked!r} is not known; it must be cpu, cuda or cuda:N") from None
        if found.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {asked} was asked for, but torch sees no GPU here; `mvd-fast doctor` says why")
        return found
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.device("cuda", gpu_index(placement().local_rank, torch.cuda.device_count()))
    torch.cuda.set_device(found)
    return found


def gpu_index(local_rank: int, visible: int) -> int:
    """The GPU of a rank. Where one is visible, a scheduler gave this task its own."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(f"local rank {local_rank} has no GPU, as {visible} are visible; start one rank for each")
    return local_rank


def choose_accelerator(environment: MutableMapping[str, str]) -> None:
    """Names the CPU as DeepSpeed's device where torch sees no GPU; else it warns about that in every process."""
    import torch

    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")


# ---- the process group ----


@contextmanager
def init_process_group(alone: bool = True) -> Iterator[int]:
    """This process as a rank of a group for as long as the block lasts; gives the rank.

    alone: whether a single process makes a group of one, which DeepSpeed's engine needs. DeepSpeed itself is not
    started (`deepspeed_start`). Raises UserError where tasks do not know where to meet.

    At the end the group is left, and its threads get time to free the last collectives' tensors. For that they need the
    interpreter; one that asks for it when Python shuts down aborts the process (PyTorch's issue 190489). DeepSpeed
    keeps references to the group, so leaving it does not end the threads.
    """
    if not alone and not is_distributed():
        yield 0
        return
    publish(os.environ)
    _quiet_logs()
    import torch.distributed as dist

    backend, options = "gloo", {}
    if (here := device()).type == "cuda":
        os.environ["LOCAL_RANK"] = str(here.index)  # by which DeepSpeed chooses the GPU again
        backend, options = "nccl", {"device_id": here} if is_distributed() else {}
    patience = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", 30)))
    dist.init_process_group(backend, timeout=patience, **options)
    try:
        yield dist.get_rank()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(SETTLING)


def publish(environment: MutableMapping[str, str]) -> None:
    """Writes this process's placement and meeting point where torch and DeepSpeed read them."""
    found = placement(environment)
    missing = [name for name in MEETING_POINT if name not in environment]
    if found.world_size > 1 and missing:
        names = " and ".join(missing) + (" are" if missing[1:] else " is")
        raise UserError(
            f"this is one of {found.world_size} tasks, but {names} not set; export MASTER_ADDR, the first node's name, "
            "and MASTER_PORT, a free port there, before the tasks start"
        )
    if found.world_size == 1 and (missing or "RANK" not in environment):
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    environment.update(RANK=str(found.rank), WORLD_SIZE=str(found.world_size), LOCAL_RANK=str(found.local_rank))


def free_port() -> int:
    """One that no process of this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _quiet_logs() -> None:
    """Our warnings and worse to the terminal; other libraries' remarks about a machine without a GPU stay out."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    choose_accelerator(os.environ)


def rank() -> int:
    """Of this process in the group; 0 without one."""
    return _group()[0]


def world_size() -> int:
    """Ranks of the group; 1 without one."""
    return _group()[1]


def _group() -> tuple[int, int]:
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# ---- work in shares ----


def shard(total: int) -> range:
    """This rank's entries of `total`: r, r + n, ... for rank r of n."""
    return range(total)[rank() :: world_size()]


def title(what: str) -> str:
    """Of a progress bar that shows this rank's share of the work."""
    return what if world_size() == 1 else f"{what} (rank {rank()} of {world_size()})"


def all_gather(value: Value) -> list[Value]:
    """Every rank's value, any picklable object, by rank (collective)."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Value) -> Value:
    """Rank 0's value, any picklable object, on every rank (collective)."""
    import torch.distributed as dist

    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def raise_together(error: UserError | None) -> None:
    """Raises on every rank where one has an error (collective): each sentence once, with the ranks that it is of."""
    ranks: dict[str, list[int]] = {}
    for number, sentence in enumerate(all_gather(str(error) if error else "")):
        if sentence:
            ranks.setdefault(sentence, []).append(number)
    if not ranks:
        return
    if world_size() == 1:
        raise error
    lines = []
    for sentence, those in ranks.items():
        which = f"rank{'s' if those[1:] else ''} {', '.join(map(str, those))}"
        lines.append(sentence if len(those) == world_size() else f"{sentence} ({which})")
    together = UserError("\n".join(lines))
    together.everywhere = True
    raise together


@contextmanager
def errors_together() -> Iterator[None]:
    """What all ranks check alike: a UserError in the block is raised on every rank (collective)."""
    fault = None
    try:
        yield
    except UserError as error:
        fault = error
    raise_together(fault)


def barrier() -> None:
    """Waits for every rank (collective)."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.barrier()


def mean(values: torch.Tensor) -> torch.Tensor:
    """Of float values, over the ranks (collective)."""
    import torch.distributed as dist

    if world_size() > 1:
        values = values / world_size()
        dist.all_reduce(values)
    return values


class AnyRank:
    """Whether a flag is set on any rank (collective): begun when made, read later, while other work goes on.

    On a GPU nothing waits for it before `result`: the reduction and its copy to the host run beside the work that is
    queued meanwhile.
    """

    def __init__(self, flag: torch.Tensor) -> None:
        """flag: a bool scalar on this rank's device."""
        import torch
        import torch.distributed as dist

        self._flag = flag.int()
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True) if world_size() > 1 else None
        self._copied = None
        if flag.device.type == "cuda":
            stream = _copy_stream(flag.device)
            stream.wait_stream(torch.cuda.current_stream(flag.device))
            with torch.cuda.stream(stream):
                if self._work:
                    self._work.wait()  # on this stream, not on the host
                self._host = torch.empty(1, dtype=torch.int32, pin_memory=True)
                self._host.copy_(self._flag.view(1), non_blocking=True)
                self._copied = stream.record_event()

    def result(self) -> bool:
        """The same on every rank."""
        if self._copied:
            self._copied.synchronize()
            return bool(self._host.item())
        if self._work:
            self._work.wait()
        return bool(self._flag.item())


@cache
def _copy_stream(where: torch.device) -> torch.cuda.Stream:
    import torch

    return torch.cuda.Stream(where)

"""`triton` and `tl` for the op files, which must also import where Triton is not installed, and how kernels start.

Kernels start through `launch`, which states the work of each: the offline gate (`mvd_kernels.offline`) records the
launches of a call instead of running them, compiles them for GPUs that are not there, and predicts their times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    def _leave_undecorated(function: Any = None, **_options: Any) -> Any:
        return function if function is not None else lambda later: later

    triton = SimpleNamespace(jit=_leave_undecorated)  # type: ignore[assignment]
    tl = SimpleNamespace()  # type: ignore[assignment]

OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """A kernel that was to start: its arguments in order, constants and options by name, and its work."""

    kernel: Any
    grid: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    flops: float
    bytes: float


_recordings: list[list[Launch]] = []


def interpreting() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter (TRITON_INTERPRET=1 at import)."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


def autotune(configs: Sequence[dict[str, int]], key: Sequence[str]) -> Callable[[Any], Any]:
    """Decorator above `triton.jit`: the fastest of `configs` for each new value of the arguments named in `key`.

    A config is a dict of constants and of `num_warps`, `num_stages`. In the interpreter the first one is taken. A
    kernel that is tuned runs several times on the same arguments: it must not read what it writes.
    """
    if not HAS_TRITON:
        return lambda kernel: kernel
    chosen = configs[:1] if interpreting() else configs
    return triton.autotune([_config(config) for config in chosen], key=list(key))


def _config(config: dict[str, int]) -> Any:
    constants = {name: value for name, value in config.items() if name not in OPTIONS}
    return triton.Config(constants, **{name: config[name] for name in OPTIONS if name in config})


def launch(kernel: Any, grid: Any, *arguments: Any, flops: float, bytes: float, **constants: Any) -> None:
    """Start `kernel[grid](*arguments, **constants)`; its work is `flops`, and `bytes` to and from device memory."""
    if _recordings:
        _recordings[-1].append(Launch(kernel, grid, arguments, constants, flops, bytes))
    else:
        kernel[grid](*arguments, **constants)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside the block, launches are listed and not run; tensors may be on the meta device."""
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


__all__ = ["HAS_TRITON", "Launch", "autotune", "interpreting", "launch", "record_launches", "tl", "triton"]

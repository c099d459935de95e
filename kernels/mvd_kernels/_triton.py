"""`triton` and `tl` for the op files, which must also import where Triton is not installed, and how kernels start.

Kernels start through `launch`, which states the work of each: the offline gate (`mvd_kernels.offline`) records the
launches of a call instead of running them, compiles them for GPUs that are not there, and predicts their times.

For each start Triton looks for the compiled kernel, and above it the autotuner for its configuration: 6 to 16
microseconds, while a call of one of these operators is to cost ten. `launch` keeps what they found.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

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
_found: dict[tuple, tuple[Any, dict[str, Any], list[Any]]] = {}
_finding = threading.RLock()
_MOST_FOUND = 10_000


@functools.cache
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


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes two microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is at least n."""
    return 1 << (n - 1).bit_length()


def launch(
    kernel: Any, grid: Any, *arguments: Any, flops: float, moves: Sequence[Tensor | int | None], **constants: Any
) -> None:
    """Start `kernel[grid](*arguments, **constants)`.

    Its work is `flops` and what it `moves` to and from device memory: tensors, or bytes where it is a part of one.
    """
    if _recordings:
        moved = sum(one.numel() * one.element_size() if isinstance(one, Tensor) else one or 0 for one in moves)
        _recordings[-1].append(Launch(kernel, grid, arguments, constants, flops, moved))
        return
    if interpreting():
        kernel[grid](*arguments, **constants)
        return
    # All that a compiled kernel may depend on: Triton knows which addresses are multiples of 16.
    key = (
        id(kernel),
        arguments[0].get_device(),
        *[(one.dtype, one.data_ptr() % 16 == 0) if isinstance(one, Tensor) else one for one in arguments],
        *constants.values(),
    )
    found = _found.get(key)
    if found is None:
        with _finding:  # an autotuner has one best configuration at a time
            _found[key] = _find(kernel, kernel[grid](*arguments, **constants), arguments, constants)
        return
    compiled, settings, rest = found
    blocks = grid(settings) if callable(grid) else grid
    compiled[(*blocks, 1, 1)[:3]](*arguments, *rest)


def _find(kernel: Any, compiled: Any, arguments: tuple, constants: dict[str, Any]) -> tuple[Any, dict, list]:
    """What has been compiled for a launch, the constants with those that were tuned, and their values in order."""
    if len(_found) >= _MOST_FOUND:
        _found.clear()
    tuned = isinstance(kernel, triton.runtime.Autotuner)
    settings = constants | (kernel.best_config.all_kwargs() if tuned else {})
    names = (kernel.fn if tuned else kernel).arg_names[len(arguments) :]
    return compiled, settings, [settings[name] for name in names]


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside the block, launches are listed and not run; tensors may be on the meta device."""
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


__all__ = [
    "HAS_TRITON",
    "Launch",
    "autotune",
    "cdiv",
    "interpreting",
    "launch",
    "power_of_2",
    "record_launches",
    "tl",
    "triton",
]

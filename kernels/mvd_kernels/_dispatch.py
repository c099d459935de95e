"""Which implementation of an operator runs: chosen by the tensor's device, or forced with `use_impl`.

CUDA runs Triton, the CPU runs the C++ extension, anything else the plain PyTorch reference. Where the extension is
not built the reference takes over, with one warning that names the cause.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from mvd_kernels._triton import HAS_TRITON, interpreting

IMPLEMENTATIONS = ("reference", "cpp", "triton")
BUILD_COMMAND = "pip install -e . --no-build-isolation"

_operators: dict[str, Operator] = {}
_forced: list[str] = []


@contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Force one implementation of every operator inside the block: "reference", "cpp" or "triton".

    It holds for the whole process (autograd runs backward in threads of its own), so use it in tests and
    measurements, not concurrently. An operator that has no such implementation for its device raises ValueError.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"there is no implementation {name!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


@dataclass(frozen=True)
class Operator:
    """An operator and its implementations, which take the same arguments; making one enters it in `operators()`."""

    name: str
    reference: Callable[..., Any]
    cpp: Callable[..., Any] | None = None
    triton: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        _operators[self.name] = self

    def __call__(self, device: torch.device, *args: Any) -> Any:
        """Run the implementation for `device`."""
        name, why = self.choose(device)
        if name == "reference" and not _forced and device.type in ("cpu", "cuda"):
            _warn_once(why)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return getattr(self, name)(*args)

    def choose(self, device: torch.device) -> tuple[str, str]:
        """Name of the implementation that runs on `device`, and why."""
        if _forced:
            if problem := self._problem(_forced[-1], device):
                raise ValueError(f"{self.name} cannot run as {_forced[-1]!r} on {device}: {problem}")
            return _forced[-1], "forced by use_impl"
        wanted = {"cpu": "cpp", "cuda": "triton"}.get(device.type)
        if wanted is None:
            return "reference", f"there are no kernels for {device.type}"
        if problem := self._problem(wanted, device):
            return "reference", problem
        return wanted, f"the tensors are on {device.type}"

    def _problem(self, name: str, device: torch.device) -> str | None:
        """What keeps implementation `name` from running on `device`, if anything does."""
        if getattr(self, name) is None:
            return f"{self.name} has no {name} implementation"
        if name == "cpp":
            return extension()[1] if device.type == "cpu" else "the C++ operators take CPU tensors"
        if name == "triton":
            return _triton_problem(device)
        return None


def operators() -> tuple[str, ...]:
    """Names of all operators."""
    return tuple(_operators)


def implementation(op: str, device: torch.device | str) -> tuple[str, str]:
    """The implementation of operator `op` that tensors on `device` use, and why: ("cpp", "the tensors are on cpu")."""
    if op not in _operators:
        raise ValueError(f"there is no operator {op!r}; choose one of {', '.join(_operators)}")
    return _operators[op].choose(torch.device(device))


@functools.cache
def extension() -> tuple[ModuleType | None, str | None]:
    """The C++ extension, or None and the reason why it is not there."""
    try:
        return importlib.import_module("mvd_kernels._C"), None
    except ModuleNotFoundError:
        return None, f"the C++ extension is not built (`{BUILD_COMMAND}` in the checkout builds it)"
    except ImportError as error:
        reason = str(error).splitlines()[0]
        return None, f"the C++ extension does not load ({reason}); build it again with `{BUILD_COMMAND}`"


def _triton_problem(device: torch.device) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type != "cuda" and not interpreting():
        return "Triton takes CUDA tensors (or CPU tensors with TRITON_INTERPRET=1 set before the import)"
    return None


@functools.cache
def _warn_once(why: str) -> None:
    warnings.warn(f"mvd_kernels runs plain PyTorch instead of its own kernels: {why}", RuntimeWarning, stacklevel=4)

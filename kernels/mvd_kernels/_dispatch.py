"""Which implementation of an operator runs: chosen by device and dtype, or forced with `use_impl`.

CUDA runs Triton (or the library that an operator names), the CPU runs the C++ extension, anything else the plain
PyTorch reference. Where the extension is not built the reference takes over, with one warning that names the cause.

Kernels have a first derivative, and nothing else that torch could see through. Under `torch.func`'s transforms (vmap,
grad, jvp, ...) and forward-mode AD the reference takes over as well, with one warning.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol

import torch
from torch.autograd import forward_ad

from mvd_kernels._triton import HAS_TRITON, interpreting

KERNELS = ("cpp", "triton")  # all else is plain PyTorch or a library's, which torch sees through
IMPLEMENTATIONS = ("reference", "cpp", "triton", "xformers", "sdpa")
# The first that an operator has and that can run is taken; after the last comes the reference.
PREFERENCE = {"cpu": ("cpp", "sdpa"), "cuda": ("triton", "xformers", "sdpa")}
TRANSFORMED = "torch.func's transforms and forward-mode AD see through plain PyTorch only"
BUILDING = (
    "with g++ there, `pip install -e . --no-build-isolation` in a checkout of mvd-fast builds it, "
    "or, where mvd-kernels is installed alone, installing it again does"
)
Dtypes = tuple[torch.dtype, ...]


class Choices(Protocol):
    """What a choice is made from: an `Operator`, as `_operator` says."""

    name: str
    dtypes: Mapping[str, Dtypes]
    limits: Mapping[str, tuple[str, Callable[..., bool]]]

    def has(self, name: str) -> bool: ...


_operators: dict[str, Choices] = {}
_forced: list[str] = []


@contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Force one implementation of every operator inside the block: "reference", "cpp", "triton", ...

    It holds for the whole process (autograd runs backward in threads of its own), so use it in tests and
    measurements, not concurrently. An operator that has no such implementation for its device raises ValueError.
    Functions that `torch.compile` has compiled keep the implementation they were compiled with.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"there is no implementation {name!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def enter(operator: Choices) -> None:
    """Make an operator known to the functions below."""
    _operators[operator.name] = operator


def choose(
    operator: Choices,
    device: str,
    dtype: torch.dtype | None,
    unfit: tuple[str, ...] = (),
    transformed: bool = False,
) -> tuple[str, str]:
    """The implementation of `operator` for tensors of `device` (its type) and `dtype` (None: any), and why this one.

    `unfit` names those that do not take the arguments, by the operator's limits.
    """
    if _forced:
        problem = _problem(operator, _forced[-1], device, dtype, unfit)
        if transformed and _forced[-1] != "reference":
            problem = problem or f'{TRANSFORMED}; run this call under mvd_kernels.use_impl("reference")'
        if problem:
            raise ValueError(f"{operator.name} cannot run as {_forced[-1]!r} on {device}: {problem}")
        return _forced[-1], "forced by use_impl"
    if transformed:
        return "reference", TRANSFORMED
    problems = []
    for name in filter(operator.has, PREFERENCE.get(device, ())):
        problem = _problem(operator, name, device, dtype, unfit)
        if problem is None:
            return name, "; ".join([*problems, f"the tensors are on {device}"])
        problems.append(problem)
    return "reference", "; ".join(problems) or f"there are no kernels for {device}"


def _problem(
    operator: Choices, name: str, device: str, dtype: torch.dtype | None, unfit: tuple[str, ...]
) -> str | None:
    """What keeps implementation `name` from running on `device`, if anything does."""
    if not operator.has(name):
        return f"{operator.name} has no {name} implementation"
    problem = _missing(name, device)
    if problem is None and dtype is not None and dtype not in operator.dtypes.get(name, (dtype,)):
        accepted = ", ".join(str(one).removeprefix("torch.") for one in operator.dtypes[name])
        problem = f"its {name} kernels take {accepted}, not {str(dtype).removeprefix('torch.')}"
    if problem is None and name in unfit:
        problem = f"its {name} kernels take {operator.limits[name][0]}"
    return problem


@torch.compiler.assume_constant_result
def chosen(name: str, device: str, dtype: torch.dtype, unfit: tuple[str, ...]) -> str:
    """Name of the implementation that operator `name` runs; warns once if kernels that should be there cannot run."""
    implementation, warning = _choice(name, device, dtype, unfit, transformed(), _forced[-1] if _forced else None)
    if warning:
        _warn_once(warning)
    return implementation


@functools.cache
def _choice(
    name: str, device: str, dtype: torch.dtype, unfit: tuple[str, ...], transformed: bool, forced: str | None
) -> tuple[str, str | None]:
    """The implementation, and what to warn of."""
    operator = _operators[name]
    implementation, why = choose(operator, device, dtype, unfit, transformed)
    if implementation == "reference" and forced is None:
        kernels = list(filter(operator.has, PREFERENCE.get(device, ())))
        if kernels and (transformed or all(_missing(one, device) for one in kernels)):
            return implementation, why
    return implementation, None


def kernels_for(operator: Choices, device: str, dtype: torch.dtype) -> str:
    """The kernels that the registered operator runs: those that are forced, or the device's.

    Raises:
        ValueError: if there are none for these tensors. The functions of mvd_kernels do not come here then.
    """
    forced = [one for one in _forced[-1:] if one in KERNELS]
    names = forced or [one for one in PREFERENCE.get(device, ()) if one in KERNELS]
    problems = {name: _problem(operator, name, device, dtype, ()) for name in names}
    for name, problem in problems.items():
        if problem is None:
            return name
    raise ValueError(f"{operator.name} has no kernels here: {'; '.join(problems.values()) or device}")


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is in progress."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def operators() -> tuple[str, ...]:
    """Names of all operators: a file in this package that declares one is enough."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg and not module.name.startswith("_"):
            importlib.import_module(f"{__package__}.{module.name}")
    return tuple(sorted(name for name in _operators if not name.startswith("_")))


def implementation(op: str, device: torch.device | str, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """The implementation of operator `op` that tensors on `device` use, and why: ("cpp", "the tensors are on cpu")."""
    if op not in operators():
        raise ValueError(f"there is no operator {op!r}; choose one of {', '.join(operators())}")
    return choose(_operators[op], torch.device(device).type, dtype)


@functools.cache
def extension() -> tuple[ModuleType | None, str | None]:
    """The C++ extension, or None and the reason why it is not there."""
    try:
        module = importlib.import_module("mvd_kernels._C")
    except ModuleNotFoundError:
        return None, f"the C++ extension is not built ({BUILDING})"
    except ImportError as error:
        return None, f"the C++ extension does not load: {str(error).splitlines()[0]} ({BUILDING})"
    built = getattr(module, "torch_version", torch.__version__)
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:
        return None, f"the C++ extension is built for torch {built}, and this is {torch.__version__} ({BUILDING})"
    return module, None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on `device`; None where it is off."""
    if device.type == "meta":  # for which torch has no autocast, and raises where it is asked
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _missing(name: str, device: str) -> str | None:
    """What implementation `name` of any operator lacks on `device`."""
    if name == "cpp":
        return extension()[1] if device == "cpu" else "the C++ operators take CPU tensors"
    if name == "triton":
        return _triton_problem(device)
    if name == "xformers":
        return None if _has_xformers() and device == "cuda" else "xformers is not installed, or the tensors not on CUDA"
    return None


@functools.cache
def _has_xformers() -> bool:
    return importlib.util.find_spec("xformers") is not None


def _triton_problem(device: str) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    if device != "cuda" and not interpreting():
        return "Triton takes CUDA tensors (or CPU tensors with TRITON_INTERPRET=1 set before the import)"
    return None


@functools.cache
def _warn_once(why: str) -> None:
    warnings.warn(f"mvd_kernels runs plain PyTorch instead of its own kernels: {why}", RuntimeWarning, stacklevel=4)

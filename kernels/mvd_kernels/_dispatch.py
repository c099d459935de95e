"""Which implementation of an operator runs: chosen by device and dtype, or forced with `use_impl`.

CUDA runs Triton (or the library that an operator names), the CPU runs the C++ extension, anything else the plain
PyTorch reference. Where the extension is not built the reference takes over, with one warning that names the cause.

Kernels have a first derivative, and nothing else that torch could see through. Under `torch.func`'s transforms (vmap,
grad, jvp, ...) and forward-mode AD the reference takes over as well, with one warning. Differentiating a kernel's
gradient again is refused: nobody knows in the forward pass that it will be asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mvd_kernels._triton import HAS_TRITON, interpreting

IMPLEMENTATIONS = ("reference", "cpp", "triton", "xformers", "sdpa")
# The first that an operator has and that can run is taken; after the last comes the reference.
PREFERENCE = {"cpu": ("cpp", "sdpa"), "cuda": ("triton", "xformers", "sdpa")}
TRANSFORMED = "torch.func's transforms and forward-mode AD see through plain PyTorch only"
NO_SECOND = (
    'the kernels of {} have no second derivative; call it under mvd_kernels.use_impl("reference"), which torch '
    "differentiates as often as you like"
)
BUILD_COMMAND = "pip install -e . --no-build-isolation"
Dtypes = tuple[torch.dtype, ...]

_operators: dict[str, Operator] = {}
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


@dataclass(frozen=True)
class Operator:
    """An operator and its implementations, which take the same arguments; making one enters it in `operators()`.

    `dtypes` names what an implementation takes (anything, where it is not named): other tensors go to the reference.
    A name with a leading underscore is a part of another operator, such as its backward, and is not listed.
    """

    name: str
    reference: Callable[..., Any] | None = None
    cpp: Callable[..., Any] | None = None
    triton: Callable[..., Any] | None = None
    xformers: Callable[..., Any] | None = None
    sdpa: Callable[..., Any] | None = None
    dtypes: Mapping[str, Dtypes] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        _operators[self.name] = self

    def __call__(self, like: Tensor, *args: Any) -> Any:
        """Run the implementation for tensors like `like`."""
        name = self.name_for(like)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(like.device) if like.device.type == "cuda" else nullcontext():
            return getattr(self, name)(*args)

    def name_for(self, like: Tensor) -> str:
        """Name of the implementation that tensors like `like` go to."""
        return chosen(self.name, like.device.type, like.dtype, transformed())

    def runs_reference(self, like: Tensor) -> bool:
        """Whether tensors like `like` go to the reference, which autograd and torch.compile see through."""
        return self.name_for(like) == "reference"

    def choose(self, device: str, dtype: torch.dtype | None, transformed: bool = False) -> tuple[str, str]:
        """Name of the implementation that runs tensors of `device` (its type) and `dtype` (None: any), and why."""
        if _forced:
            problem = self._problem(_forced[-1], device, dtype)
            if transformed and _forced[-1] != "reference":
                problem = problem or f'{TRANSFORMED}; run this call under mvd_kernels.use_impl("reference")'
            if problem:
                raise ValueError(f"{self.name} cannot run as {_forced[-1]!r} on {device}: {problem}")
            return _forced[-1], "forced by use_impl"
        if transformed:
            return "reference", TRANSFORMED
        problems = []
        for name in (name for name in PREFERENCE.get(device, ()) if getattr(self, name)):
            problem = self._problem(name, device, dtype)
            if problem is None:
                return name, "; ".join([*problems, f"the tensors are on {device}"])
            problems.append(problem)
        return "reference", "; ".join(problems) or f"there are no kernels for {device}"

    def _problem(self, name: str, device: str, dtype: torch.dtype | None) -> str | None:
        """What keeps implementation `name` from running on `device`, if anything does."""
        if getattr(self, name) is None:
            return f"{self.name} has no {name} implementation"
        problem = _missing(name, device)
        if problem is None and dtype is not None and dtype not in self.dtypes.get(name, (dtype,)):
            accepted = ", ".join(str(one).removeprefix("torch.") for one in self.dtypes[name])
            problem = f"its {name} kernels take {accepted}, not {str(dtype).removeprefix('torch.')}"
        return problem


@torch.compiler.assume_constant_result
def chosen(name: str, device: str, dtype: torch.dtype, transformed: bool) -> str:
    """Name of the implementation that operator `name` runs; warns once if kernels that should be there cannot run."""
    operator = _operators[name]
    implementation, why = operator.choose(device, dtype, transformed)
    if implementation == "reference" and not _forced:
        kernels = [one for one in PREFERENCE.get(device, ()) if getattr(operator, one)]
        if kernels and (transformed or all(_missing(one, device) for one in kernels)):
            _warn_once(why)
    return implementation


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is in progress."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_tangent(x: Tensor | None) -> bool:
    """Whether x carries a tangent of forward-mode AD."""
    return x is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


class _Once(torch.autograd.Function):
    """Gradients as they are; what they depend on is an input, so that differentiating them again leads here."""

    generate_vmap_rule = True  # for torch.autograd.grad(..., is_grads_batched=True)

    @staticmethod
    def forward(name: str, gradients: list[Tensor], *depends_on: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *_: Tensor | None) -> None:
        raise ValueError(NO_SECOND.format(ctx.name))


def once_differentiable(name: str, backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """The backward of operator `name` for autograd: its gradients refuse to be differentiated themselves.

    `backward(ctx, saved, *grads)` gives the gradients; among `saved` must be all that they depend on, or an output.
    torch's own `once_differentiable` does not do: it lets gradients pass as constants where the incoming one is.
    """

    def differentiate(ctx, *grads):
        saved, incoming = ctx.saved_tensors, flattened(grads)
        if any(has_tangent(one) for one in incoming):
            raise ValueError(f"a tangent came to the backward of {name}; {NO_SECOND.format(name)}")
        with torch.no_grad():
            gradients = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():  # they are not asked for with create_graph=True
            return gradients
        found = [one for one in flattened(gradients) if one is not None]
        marked = iter(_Once.apply(name, found, *saved, *incoming) if found else ())

        def mark(part):
            if isinstance(part, list):
                return [mark(one) for one in part]
            return None if part is None else next(marked)

        return tuple(mark(part) for part in gradients)

    return differentiate


def flattened(parts: Sequence[Any]) -> list[Any]:
    """Parts, and the entries of those that are lists."""
    return [one for part in parts for one in (part if isinstance(part, list) else [part])]


def operators() -> tuple[str, ...]:
    """Names of all operators."""
    return tuple(name for name in _operators if not name.startswith("_"))


def implementation(op: str, device: torch.device | str, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """The implementation of operator `op` that tensors on `device` use, and why: ("cpp", "the tensors are on cpu")."""
    if op not in operators():
        raise ValueError(f"there is no operator {op!r}; choose one of {', '.join(operators())}")
    return _operators[op].choose(torch.device(device).type, dtype)


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


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on `device`; None where it is off."""
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

"""An operator is one declaration: dispatch, registration with torch, derivatives and their refusals follow from it.

In eager mode a call goes straight to the chosen kernels, as an autograd.Function where gradients are recorded: the way
through an operator that is registered from Python takes longer than small kernels do (the table of host times in
docs/kernels.md). `torch.compile` and `torch.export`, dispatch modes and subclasses of tensors meet the registered
operator `torch.ops.mvd_kernels.<name>`, into which they do not look.

Kernels have a first derivative. Differentiating it again is refused: nobody knows in the forward pass that it will be
asked for. Under `torch.func`'s transforms and forward-mode AD the reference runs (see `_dispatch`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mvd_kernels import _dispatch
from mvd_kernels._dispatch import KERNELS, Dtypes, transformed
from mvd_kernels._triton import HAS_TRITON

NO_SECOND = (
    'the kernels of {} have no second derivative; call it under mvd_kernels.use_impl("reference"), which torch '
    "differentiates as often as you like"
)
_PLAIN = frozenset({Tensor, torch.nn.Parameter, NoneType, bool, int, float, tuple, list})


class Operator:
    """What an operator gives, what computes it, and what its gradients are.

    All implementations take the arguments that `outputs` takes, in this order.

    Args:
        name: of the module, and of the registered operator. A name with a leading underscore is a part of another
            operator, such as its backward: it is registered without the underscore, and not listed.
        outputs: gives the results of a kernel, empty. Its annotations are the operator's signature.
        reference: plain PyTorch, differentiable; it gives only the first `results` of them.
        cpp: whether the C++ extension has the operator, as `<name>_cpp`.
        triton: launches the kernels of Triton.
        xformers, sdpa: call these libraries, which bring their own derivatives; results as the reference's.
        dtypes: what an implementation takes (anything, where it is not named): other tensors go to the next one.
        limits: of an implementation that does not take everything else either: what it takes, in words, and whether it
            takes these arguments.
        like: the argument that decides by its device and dtype; the first, if not given.
        results: how many of the kernels' outputs the caller gets (one: not as a tuple); None: all, as they are. Further
            ones are there for the backward.
        save: (ctx, arguments, outputs) -> the tensors that `gradients` needs, inputs and outputs; other facts go to
            attributes of ctx. Among them must be all that the gradients depend on, or a result that depends on it.
        gradients: (ctx, saved, needed, *grads) -> a gradient for every argument; trailing None may be left out.
            `needed` says which are wanted, argument by argument; `grads` are those of the results.
    """

    def __init__(
        self,
        name: str,
        outputs: Callable[..., Any],
        *,
        reference: Callable[..., Any] | None = None,
        cpp: bool = False,
        triton: Callable[..., Any] | None = None,
        xformers: Callable[..., Any] | None = None,
        sdpa: Callable[..., Any] | None = None,
        dtypes: Mapping[str, Dtypes] | None = None,
        limits: Mapping[str, tuple[str, Callable[..., bool]]] | None = None,
        like: str | None = None,
        results: int | None = None,
        save: Callable[..., Sequence[Tensor | None]] | None = None,
        gradients: Callable[..., Sequence[Any]] | None = None,
    ) -> None:
        self.name, self.reference, self.xformers, self.sdpa = name, reference, xformers, sdpa
        self.triton = triton if HAS_TRITON else None
        self.has_cpp, self.dtypes, self.limits = cpp, dtypes or {}, limits or {}
        self.results, self.save, self.gradients = results, save, gradients
        parameters = list(inspect.signature(outputs).parameters)
        self._like = parameters.index(like) if like else 0
        self._count = len(parameters)
        self.registered = self._register(outputs)
        taken, _, given = str(self.registered._schema).partition("->")
        self._takes_lists, self._gives_list = "Tensor[]" in taken, "Tensor[]" in given
        self._function = type("".join(map(str.capitalize, name.split("_"))), (_Eager,), {})
        _dispatch.enter(self)

    @functools.cached_property
    def cpp(self) -> Any:
        """The C++ operator; None where there is none, or no extension."""
        if not self.has_cpp or _dispatch.extension()[0] is None:
            return None
        return getattr(torch.ops.mvd_kernels, f"{self.name.lstrip('_')}_cpp").default

    def has(self, name: str) -> bool:
        """Whether it has implementation `name`, built or not."""
        return self.has_cpp if name == "cpp" else getattr(self, name) is not None

    def __call__(self, *arguments: Any) -> Any:
        """Run the implementation for these arguments."""
        like = arguments[self._like]
        unfit = tuple(one for one, (_, takes) in self.limits.items() if not takes(*arguments)) if self.limits else ()
        name = _dispatch.chosen(self.name, like.device.type, like.dtype, unfit)
        if name not in KERNELS:
            return getattr(self, name)(*arguments)
        flat = _flat(arguments) if self._takes_lists else arguments
        if torch.compiler.is_compiling() or _is_watched(flat):
            return self._public(self.registered(*arguments))
        if self.gradients is None or not torch.is_grad_enabled():
            return self._public(self.run(name, *arguments))
        counts = None
        if self._takes_lists:
            counts = [len(one) if isinstance(one, (list, tuple)) else None for one in arguments]
        results = self._function.apply(self, name, counts, *flat)
        return list(results) if self._gives_list else results

    def run(self, name: str | None, *arguments: Any) -> Any:
        """All outputs of the kernels `name`; None: of those that the registered operator chooses."""
        if name is None:
            return self.registered(*arguments)
        like = arguments[self._like]
        if like.is_cuda and like.get_device() != torch.cuda.current_device():
            with torch.cuda.device(like.device):  # Triton launches on the current device
                return getattr(self, name)(*arguments)
        return getattr(self, name)(*arguments)

    def _public(self, outputs: Any) -> Any:
        if self.results is None:
            return outputs
        return outputs[0] if self.results == 1 else outputs[: self.results]

    def _register(self, outputs: Callable[..., Any]) -> torch._ops.OpOverload:
        def run_kernels(*arguments: Any) -> Any:
            like = arguments[self._like]
            if forward_ad._current_level >= 0 and not self.name.startswith("_"):  # tangents do not come here: lost
                raise ValueError(f"torch.ops.mvd_kernels.{name} has no forward-mode AD; call mvd_kernels.{name}")
            return self.run(_dispatch.kernels_for(self, like.device.type, like.dtype), *arguments)

        name = self.name.lstrip("_")
        schema = torch.library.infer_schema(outputs, mutates_args=())
        definition = torch.library.custom_op(f"mvd_kernels::{name}", run_kernels, mutates_args=(), schema=schema)
        definition.register_fake(outputs)
        if self.gradients is not None:
            definition.register_autograd(self._registered_backward, setup_context=self._registered_context)
        return definition._opoverload

    def _registered_context(self, ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.kernels = None
        if self.results is not None:
            ctx.mark_non_differentiable(*output[self.results :])
        ctx.save_for_backward(*self.save(ctx, inputs, output))

    def _registered_backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        gradients = _differentiate(self, ctx, ctx.needs_input_grad, _flat(grads)[: self.results])
        return tuple(
            [None] * len(wanted) if one is None and isinstance(wanted, (list, tuple)) else one
            for one, wanted in zip(gradients, ctx.needs_input_grad, strict=True)
        )


class _Eager(torch.autograd.Function):
    """An operator without the dispatcher: `counts` gives the lengths of lists, which autograd takes entry by entry."""

    @staticmethod
    def forward(ctx, operator: Operator, name: str, counts: list[int | None] | None, *flat: Any) -> Any:
        arguments = flat if counts is None else _grouped(flat, counts)
        outputs = operator.run(name, *arguments)
        ctx.operator, ctx.kernels, ctx.counts = operator, name, counts
        ctx.save_for_backward(*operator.save(ctx, arguments, outputs))
        results = operator._public(outputs)
        return tuple(results) if isinstance(results, list) else results

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        if torch.compiler.is_compiling() or _is_watched(grads) or _is_batched(grads):
            ctx.kernels = None
        if ctx.counts is None:
            return (None, None, None, *_differentiate(ctx.operator, ctx, needed, grads))
        gradients = _differentiate(ctx.operator, ctx, _grouped(needed, ctx.counts), grads)
        return (
            *(None, None, None),
            *_flat(
                [None] * count if one is None and count is not None else one
                for one, count in zip(gradients, ctx.counts, strict=True)
            ),
        )


def _differentiate(operator: Operator, ctx: Any, needed: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Any]:
    """The gradients of all arguments; asked for with create_graph=True, they refuse to be differentiated themselves.

    Not torch's `once_differentiable`: it lets gradients pass as constants where the incoming ones are.
    """
    saved = ctx.saved_tensors
    if forward_ad._current_level >= 0 and any(map(has_tangent, grads)):
        raise ValueError(f"a tangent came to the backward of {operator.name}; {NO_SECOND.format(operator.name)}")
    if not torch.is_grad_enabled():
        gradients = operator.gradients(ctx, saved, needed, *grads)
        return [*gradients, *[None] * (operator._count - len(gradients))]
    with torch.no_grad():
        gradients = operator.gradients(ctx, saved, needed, *grads)
    marked = iter(_Once.apply(operator.name, [one for one in _flat(gradients) if one is not None], *saved, *grads))

    def mark(part: Any) -> Any:
        if isinstance(part, list):
            return [mark(one) for one in part]
        return None if part is None else next(marked)

    return [*map(mark, gradients), *[None] * (operator._count - len(gradients))]


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


def has_tangent(x: Any) -> bool:
    """Whether x is a tensor that carries a tangent of forward-mode AD."""
    return forward_ad._current_level >= 0 and isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _is_watched(arguments: Sequence[Any]) -> bool:
    """Whether someone looks on to whom an operator must be one: a dispatch mode, a tracer, a subclass of tensors."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, arguments))
    )


def _is_batched(grads: Sequence[Tensor | None]) -> bool:
    """Whether the backward alone is mapped over: by torch.vmap, or by autograd.grad(..., is_grads_batched=True)."""
    return transformed() or any(one is not None and torch._C._functorch.is_legacy_batchedtensor(one) for one in grads)


def _flat(parts: Any) -> list[Any]:
    """Parts, and the entries of those that are lists."""
    return [one for part in parts for one in (part if isinstance(part, (list, tuple)) else [part])]


def _grouped(flat: Sequence[Any], counts: Sequence[int | None]) -> list[Any]:
    """The reverse of `_flat`; a count of None stands for what is no list."""
    entries = iter(flat)
    return [next(entries) if count is None else [next(entries) for _ in range(count)] for count in counts]

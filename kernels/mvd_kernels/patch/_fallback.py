"""When a patched module runs the original's forward after all.

A fused forward leaves out the calls of some submodules: of a norm, of identities, of dropout that is off. Whoever hooks
or replaces one of these, before patching or after it, must find it called. So every call asks `runs_original` first,
and `must_call` is what a report says of a module that is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _has_any_global_hook

Parts = list[tuple[str, nn.Module]]
Kinds = tuple[tuple[str, type[nn.Module]], ...]


class PatchError(ValueError):
    """A model in which nothing is recognised, or something that cannot be done with a patched one."""


def is_patched(module: nn.Module) -> bool:
    return hasattr(type(module), "_mvd_unpatched")


def original(layer: type[nn.Module], module: nn.Module) -> Callable[..., Any]:
    """The forward that `layer` replaces: that of the class, where Hugging Face's `kernelize` bound ours instead."""
    return super(layer, module).forward if isinstance(module, layer) else type(module).forward.__get__(module)


def runs_original(module: nn.Module, calls: frozenset[str], x: object) -> bool:
    """Whether this call of `module` with input `x` is one for the original.

    That is so if `must_call` finds a reason, where dropout is active, while there are hooks on all modules (such as
    those of FlopCounterMode), and where torch.fx, torch.jit.trace or torch.export write the forward down: what they
    make is to run without mvd_kernels.

    Raises:
        PatchError: in an export to ONNX.
    """
    tracer = "torch.fx" if isinstance(x, torch.fx.Proxy) else _tracer()
    if tracer == "torch.onnx" and is_patched(module):
        raise PatchError(refusal("torch.onnx.export"))
    parts = left_out(module, calls)
    active = any(
        isinstance(part, _DropoutNd) and part.p > 0 and (part.training or module.training) for _, part in parts
    )
    return bool(tracer or active or _has_any_global_hook()) or must_call(module, parts) is not None


@torch.compiler.assume_constant_result
def _tracer() -> str | None:
    """Who is writing the forward down; torch.compile, which runs what it writes itself, does not count."""
    if not (torch.jit.is_tracing() or torch.compiler.is_exporting()):
        return None
    return "torch.onnx" if torch.onnx.is_in_onnx_export() else "torch"


def refusal(what: str) -> str:
    return (
        f"{what} does not take a patched model, whose operators exist in mvd_kernels alone: call "
        "mvd_kernels.patch.unpatch(model) before it, and patch the model again afterwards"
    )


def left_out(module: nn.Module, calls: frozenset[str] = frozenset()) -> Parts:
    """Submodules, by name, that a forward does not run which `calls` these children alone."""
    parts = []
    for name, part in module._modules.items():
        if part is not None and name not in calls:
            parts.append((name, part))
            if part._modules:
                parts += [(f"{name}.{rest}", below) for rest, below in left_out(part)]
    return parts


def must_call(module: nn.Module, parts: Parts) -> str | None:
    """Why `parts` of `module` cannot be left out: someone hooks one, or replaced something since it was probed."""
    for name, part in parts:
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return f"{name} has a hook, which only a call of it runs"
        if "forward" in vars(part):
            return f"the forward of {name} has been replaced by someone else"
    fused = type(module)
    if is_patched(module) and fused._mvd_probed != probed(fused._mvd_unpatched, fused._mvd_method, kinds(parts)):
        return "it is no longer what it was when it was patched"
    return None


def kinds(parts: Parts) -> Kinds:
    return tuple((name, type(part)) for name, part in parts)


def probed(original: type[nn.Module], method: str, kinds: Kinds) -> tuple:
    """All that a probe has seen beside numbers: the classes of the parts, their forwards, and what computes with them.

    Somebody may replace the forward of a class, for all modules at once.
    """
    return kinds, tuple(kind.forward for _, kind in kinds), getattr(original, method)

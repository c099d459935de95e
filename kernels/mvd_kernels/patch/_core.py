"""Give a module of somebody else's a forward of ours, tell what was done, and take it back.

A module is patched by moving it to a subclass of its own class, made here, whose first base is our layer. So its
parameters, buffers, hooks, name and `isinstance` relations stay what they are; `copy.deepcopy`, pickle, DDP, FSDP,
`torch.compile` and activation checkpointing see an ordinary module; and nothing has to be remembered to undo it. (A
`forward` stored on the instance would not survive pickling, and a replica of the module would run on the original.)
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mvd_kernels.add_layer_norm import add_layer_norm

_HEAD_STEP, _LARGEST_HEAD = 16, 128  # of the attention kernels
_PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # else that of bf16
_PACKED_ATTENTION = {"qkv", "attn_drop", "proj", "proj_drop"}
_LAYER_NORMS = ("LayerNorm", "LayerNormFp32")  # torch's, and timm's of these names: the same arithmetic


class PatchError(ValueError):
    """A model in which nothing is recognised."""


@dataclass(frozen=True)
class Row:
    """One place in the model."""

    name: str
    """of the module, as in `named_modules`"""
    part: str
    """what would be fused: "attention", "add + LayerNorm", ..."""
    swapped: bool
    note: str = ""
    """why it was left; of a swapped module, when it runs the original"""


@dataclass
class Report:
    """What was swapped in a model, and what was left and why; `print(report)` shows it as a table."""

    model: str
    rows: list[Row] = field(default_factory=list)

    @property
    def swapped(self) -> list[Row]:
        return [row for row in self.rows if row.swapped]

    @property
    def left(self) -> list[Row]:
        return [row for row in self.rows if not row.swapped]

    def add(self, name: str, part: str, reason: str | None, note: str = "") -> None:
        """A row: left for `reason`, or swapped if that is None."""
        self.rows.append(Row(name, part, reason is None, note if reason is None else reason))

    def __str__(self) -> str:
        """Rows that differ in their numbers alone share a line."""
        alike: dict[tuple[str, str, bool, str], int] = {}
        for row in self.rows:
            key = (re.sub(r"\d+", "*", row.name), row.part, row.swapped, row.note)
            alike[key] = alike.get(key, 0) + 1
        lines = [f"{self.model}: {len(self.swapped)} swapped, {len(self.left)} left"]
        for (name, part, swapped, note), count in alike.items():
            outcome = "fused" if swapped else "left"
            lines.append(f"  {name:<32} {count:>3}x  {part:<16} -> {outcome}{f': {note}' if note else ''}")
        return "\n".join(lines)


# ---- swapping ----


@functools.cache
def _fused_class(layer: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """Subclass of `original` that runs as `layer`. It keeps the name, by which accelerate and FSDP find classes."""
    members = {"__module__": original.__module__, "__reduce_ex__": _reduce, "_mvd_unpatched": original}
    return type(original.__name__, (layer, original), members)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    layer, original = type(self).__bases__
    return _bare, (layer, original), self.__getstate__()


def _bare(layer: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    """What pickle and deepcopy fill with the state."""
    made = _fused_class(layer, original)
    return made.__new__(made)


def is_patched(module: nn.Module) -> bool:
    return hasattr(type(module), "_mvd_unpatched")


def unpatch(model: nn.Module) -> nn.Module:
    """Undo every patch in `model`, also in a copy of a patched one; -> the model."""
    for module in model.modules():
        if is_patched(module):
            module.__class__ = type(module)._mvd_unpatched
    return model


def swap(module: nn.Module, layer: type[nn.Module], method: str = "forward", probe: tuple | None = None) -> str | None:
    """Move `module` to `layer`; -> None, or the reason why it stays what it is.

    With `probe`, arguments of the method, both must compute the same from them, in eval mode and without gradients.
    """
    if is_patched(module):
        return None
    original = type(module)
    theirs = list(inspect.signature(getattr(original, method)).parameters)
    ours = list(inspect.signature(getattr(layer, method)).parameters)
    takes_any = any(
        one.kind is one.VAR_KEYWORD for one in inspect.signature(getattr(layer, method)).parameters.values()
    )
    if extra := [name for name in theirs if name not in ours and not (takes_any and name == ours[-1])]:
        return f"its {method} takes {', '.join(extra)}"
    if method in vars(module):
        return f"its {method} has been replaced by someone else"
    if probe is None or any(one.is_meta for one in module.parameters()):
        module.__class__ = _fused_class(layer, original)
        return None
    try:
        with _evaluating(module):
            expected = getattr(module, method)(*probe)
            module.__class__ = _fused_class(layer, original)
            actual = getattr(module, method)(*probe)
        problem = _difference(actual, expected)
    except Exception as error:
        problem = f"it does not run on what its names promise ({str(error).splitlines()[0] if str(error) else error!r})"
    if problem:
        module.__class__ = original
    return problem


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [one for one in module.modules() if one.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for one in training:
            one.training = True


def _difference(actual: object, expected: object) -> str | None:
    actual, expected = (one[0] if isinstance(one, tuple) else one for one in (actual, expected))
    if not isinstance(actual, Tensor) or not isinstance(expected, Tensor) or actual.shape != expected.shape:
        return "its result has another form than its names promise"
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    if not error <= _PROBE_TOLERANCE.get(expected.dtype, 5e-2):
        return f"it computes something else than its names promise (off by {error:.0e} of the largest entry)"
    return None


def wave(*shape: int, like: Tensor) -> Tensor:
    """Numbers to probe with, in the dtype and on the device of `like`; no random numbers are drawn."""
    count = torch.Size(shape).numel()
    return torch.arange(count, device=like.device).mul(0.7).sin().view(shape).to(like.dtype)


def original(layer: type[nn.Module], module: nn.Module) -> Callable[..., object]:
    """The forward that `layer` replaces: that of the class, where Hugging Face's `kernelize` bound ours instead."""
    return super(layer, module).forward if isinstance(module, layer) else type(module).forward.__get__(module)


# ---- what an adapter asks of a module ----


def unexpected(module: nn.Module, children: set[str], tensors: set[str] = frozenset()) -> str | None:
    """A reason, if `module` lacks one of `children`, or has others (identities aside), or tensors beyond `tensors`."""
    for name in sorted(children):
        if not isinstance(getattr(module, name, None), nn.Module):
            return f"it has no {name}"
    for name, child in module.named_children():
        if name not in children and not isinstance(child, nn.Identity):
            return f"it has {name}: {type(child).__name__}"
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    others = [name for name, _ in own if name not in tensors]
    return f"it has {', '.join(others)}" if others else None


def unfit_norm(norm: nn.Module) -> str | None:
    """Why `add_layer_norm` cannot stand for `norm`."""
    if not isinstance(norm, nn.LayerNorm) or type(norm).__name__ not in _LAYER_NORMS:
        return f"its second norm is {type(norm).__name__}, not LayerNorm"
    if norm.weight is None or norm.bias is None or norm.weight.ndim != 1:
        return "its second norm has no weight or no bias"
    return None


def unfit_head(width: int) -> str | None:
    """Why `attention` would only hand heads of this width on to torch."""
    if width % _HEAD_STEP or width > _LARGEST_HEAD:
        return f"head width {width} is not a multiple of {_HEAD_STEP} up to {_LARGEST_HEAD}; torch's SDPA stays"
    return None


def dropout_note(rate: float) -> str:
    return f"attention dropout {rate:g} is active in training, which runs the original" if rate else ""


def find_blocks(model: nn.Module, children: set[str], missing: str) -> list[tuple[str, nn.Module]]:
    """Modules with at least these children, by name. Raises PatchError, saying what is `missing`, if there are none."""
    blocks = [(name, one) for name, one in model.named_modules() if {n for n, _ in one.named_children()} >= children]
    if not blocks:
        raise PatchError(f"{type(model).__name__} has no {missing}. Nothing was changed.")
    return blocks


def swap_packed_attention(
    report: Report, name: str, attn: nn.Module, layer: type[nn.Module], tensors: set[str] = frozenset()
) -> None:
    """Attention from one projection of queries, keys and values; `tensors`: what it may own beside its children."""
    reason, note = unexpected(attn, _PACKED_ATTENTION, tensors), ""
    if reason is None and not isinstance(attn.qkv, nn.Linear):
        reason = f"its qkv is {type(attn.qkv).__name__}, not Linear"
    if reason is None:
        note = dropout_note(attn.attn_drop.p)
        probe = wave(1, 3, attn.qkv.in_features, like=attn.qkv.weight)
        reason = unfit_head(attn.qkv.out_features // 3 // attn.num_heads) or swap(attn, layer, probe=(probe,))
    report.add(name, "attention", reason, note)


def swap_block(
    report: Report, name: str, block: nn.Module, norm: nn.Module, layer: type[nn.Module], reason: str | None = None
) -> None:
    """A block whose first addition goes into its second LayerNorm, `norm`; left if there is a `reason` already."""
    reason = reason or unfit_norm(norm)
    if reason is None:
        reason = swap(block, layer, probe=(wave(1, 3, *norm.weight.shape, like=norm.weight),))
    report.add(name, "add + LayerNorm", reason)


def has_hooks(module: nn.Module) -> bool:
    """Whether someone wants to see what goes through `module`, which a fused operator passes by."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def add_norm(x: Tensor, branch: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """-> x + branch and its LayerNorm; in one pass where the operator takes them and nobody watches the norm."""
    dtypes = (torch.promote_types(x.dtype, branch.dtype), torch.float32)
    same = x.dtype == branch.dtype or torch.is_autocast_enabled(x.device.type)
    if has_hooks(norm) or not same or norm.weight.dtype not in dtypes or x.shape != branch.shape:
        total = x + branch
        return total, norm(total)
    return add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps)

"""Give a module of somebody else's a forward of ours, tell what was done, and take it back.

A module is patched by moving it to a subclass of its own class, made here, whose first base is our layer. So its
parameters, buffers, hooks, name and `isinstance` relations stay what they are; `copy.deepcopy`, pickle, DDP, FSDP,
`torch.compile` and activation checkpointing see an ordinary module; and nothing has to be remembered to undo it. (A
`forward` stored on the instance would not survive pickling, and a replica of the module would run on the original.)
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mvd_kernels.add_layer_norm import add_layer_norm
from mvd_kernels.patch._fallback import Kinds, PatchError, is_patched, kinds, left_out, must_call, probed, refusal

_HEAD_STEP, _LARGEST_HEAD = 16, 128  # of the attention kernels
_PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # else that of bf16
_DERIVED = "it got another class after it had been patched (from a parametrization or fully_shard, for example)"
_PACKED_ATTENTION = {"qkv", "attn_drop", "proj", "proj_drop"}
_TIMM_NORMS = ("LayerNorm", "LayerNormFp32")  # the same arithmetic as torch's


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
def _fused_class(layer: type[nn.Module], original: type[nn.Module], seen: tuple) -> type[nn.Module]:
    """Subclass of `original` that runs as `layer`. It keeps the name, by which accelerate and FSDP find classes."""
    members = {
        "__module__": original.__module__,
        "__reduce_ex__": _reduce,
        "__prepare_scriptable__": _refuse_script,
        "_mvd_unpatched": original,
        "_mvd_method": _method(layer),
        "_mvd_probed": seen,
    }
    return type(original.__name__, (layer, original), members)


def _method(layer: type[nn.Module]) -> str:
    """The one that the layer has instead of the original: "forward" or "forward_features"."""
    return next(name for name in vars(layer) if name.startswith("forward"))


def _reduce(self: nn.Module, protocol: int) -> tuple | str:
    if _is_derived(self):
        return object.__reduce_ex__(self, protocol)
    layer, original = type(self).__bases__
    return _bare, (layer, original, type(self)._mvd_probed[0]), self.__getstate__()


def _bare(layer: type[nn.Module], original: type[nn.Module], kinds: Kinds) -> nn.Module:
    """What pickle and deepcopy fill with the state."""
    made = _fused_class(layer, original, probed(original, _method(layer), kinds))
    return made.__new__(made)


def _is_derived(module: nn.Module) -> bool:
    """Whether a patched module is of a class that someone derived from ours."""
    return "_mvd_unpatched" not in vars(type(module))


def _refuse_script(self: nn.Module) -> None:
    raise PatchError(refusal("torch.jit.script"))


def unpatch(model: nn.Module) -> nn.Module:
    """Undo every patch in `model`, also in a copy of a patched one; -> the model.

    Raises:
        PatchError: if a patched module has got yet another class since. Nothing is changed then.
    """
    patched = [(name, module) for name, module in model.named_modules() if is_patched(module)]
    for name, module in patched:
        if _is_derived(module):
            raise PatchError(f"{name or 'the model'} cannot be unpatched: {_DERIVED}; undo that first")
    for _, module in patched:
        module.__class__ = type(module)._mvd_unpatched
    return model


def swap(module: nn.Module, layer: type[nn.Module], calls: frozenset[str], probe: tuple | None = None) -> str | None:
    """Move `module` to `layer`, whose forward `calls` these children; -> None, or why the module stays what it is.

    With `probe`, arguments of the method, both must compute the same from them, in eval mode and without gradients.
    """
    if is_patched(module):  # anything may have happened to it since
        if _is_derived(module):
            return _DERIVED
        module.__class__ = type(module)._mvd_unpatched
    original, method, parts = type(module), _method(layer), left_out(module, calls)
    if reason := _other_form(module, layer, method) or must_call(module, parts):
        return reason
    fused = _fused_class(layer, original, probed(original, method, kinds(parts)))
    problem = (
        None
        if probe is None or any(one.is_meta for one in module.parameters())
        else _probe(module, fused, method, probe)
    )
    if problem is None:
        module.__class__ = fused
    return problem


def _other_form(module: nn.Module, layer: type[nn.Module], method: str) -> str | None:
    theirs = list(inspect.signature(getattr(type(module), method)).parameters)
    ours = list(inspect.signature(getattr(layer, method)).parameters)
    takes_any = any(
        one.kind is one.VAR_KEYWORD for one in inspect.signature(getattr(layer, method)).parameters.values()
    )
    if extra := [name for name in theirs if name not in ours and not (takes_any and name == ours[-1])]:
        return f"its {method} takes {', '.join(extra)}"
    home = next(one for one in type(module).__mro__ if method in vars(one))
    if method in vars(module) or getattr(vars(home)[method], "__module__", home.__module__) != home.__module__:
        return f"its {method} has been replaced by someone else"
    return None


def _probe(module: nn.Module, fused: type[nn.Module], method: str, arguments: tuple) -> str | None:
    """What is different between `module` and its copy of class `fused`, beside the time that they take."""
    try:
        with _evaluating(module):
            theirs, ours = copy.copy(module), copy.copy(module)
            ours.__class__ = fused
            expected, actual = getattr(theirs, method)(*arguments), getattr(ours, method)(*arguments)
    except Exception as error:
        return f"it does not run on what its names promise ({str(error).splitlines()[0] if str(error) else error!r})"
    if kept := [name for name, value in vars(theirs).items() if value is not vars(ours).get(name, theirs)]:
        return f"its {method} stores {', '.join(kept)}, which a fused one does not compute"
    return _difference(actual, expected)


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
    kind = type(norm)
    of_timm = kind.__name__ in _TIMM_NORMS and kind.__module__.startswith("timm.")
    if not isinstance(norm, nn.LayerNorm) or not (kind.forward is nn.LayerNorm.forward or of_timm):
        return f"its second norm is {kind.__name__} of {kind.__module__}, not a plain LayerNorm"
    if norm.weight is None or norm.bias is None or norm.weight.ndim != 1:
        return "its second norm has no weight or no bias"
    return None


def unfit_scores(attn: nn.Module) -> str | None:
    """Why the attention weights of timm's and the authors' modules must exist, if they must."""
    return (
        None if getattr(attn, "fused_attn", True) else "its fused_attn is False, which asks for the attention weights"
    )


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
    report: Report,
    name: str,
    attn: nn.Module,
    layer: type[nn.Module],
    calls: frozenset[str],
    tensors: frozenset[str] = frozenset(),
) -> None:
    """Attention from one projection of queries, keys and values; `tensors`: what it may own beside its children."""
    reason, note = unexpected(attn, _PACKED_ATTENTION, tensors) or unfit_scores(attn), ""
    if reason is None and not isinstance(attn.attn_drop, nn.Dropout):
        reason = f"its attn_drop is {type(attn.attn_drop).__name__}, not Dropout"
    qkv = getattr(attn, "qkv", None)
    plain = type(qkv).forward is nn.Linear.forward
    if reason is None and not (plain or ("qkv" in calls and hasattr(qkv, "in_features"))):
        reason = f"its qkv is {type(qkv).__name__} of {type(qkv).__module__}, not a plain Linear"
    if reason is None:
        note = dropout_note(attn.attn_drop.p)
        probe = wave(1, 3, qkv.in_features, like=qkv.weight)
        reason = unfit_head(qkv.out_features // 3 // attn.num_heads) or swap(attn, layer, calls, probe=(probe,))
    report.add(name, "attention", reason, note)


def swap_block(
    report: Report,
    name: str,
    block: nn.Module,
    norm: str,
    layer: type[nn.Module],
    calls: frozenset[str],
    reason: str | None,
) -> None:
    """A block whose first addition goes into its second LayerNorm, `norm`; left if there is a `reason` already."""
    reason = reason or unfit_norm(getattr(block, norm))
    if reason is None:
        weight = getattr(block, norm).weight
        reason = swap(block, layer, calls, probe=(wave(1, 3, *weight.shape, like=weight),))
    report.add(name, "add + LayerNorm", reason)


def add_norm(x: Tensor, branch: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """-> x + branch and its LayerNorm; in one pass where the operator takes them."""
    dtypes = (torch.promote_types(x.dtype, branch.dtype), torch.float32)
    same = x.dtype == branch.dtype or torch.is_autocast_enabled(x.device.type)
    if not same or norm.weight.dtype not in dtypes or x.shape != branch.shape:
        total = x + branch
        return total, norm(total)
    return add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps)

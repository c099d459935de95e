"""What the tests of all fused operators share: which implementations run here, how close they must come, which cases.

The oracle is the plain PyTorch reference in float64 on the same (already rounded) inputs, never another kernel.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mvd_kernels import use_impl
from mvd_kernels._dispatch import extension

CUDA = torch.cuda.is_available()
_C = extension()[0]
# Each instruction set of this processor counts as an implementation; Triton runs in the interpreter without a GPU.
CPP = tuple(f"cpp-{isa}" for isa in _C.isa_names()) if _C else ()
IMPLEMENTATIONS = (*CPP, "triton")
# For what does not depend on the instruction set: which gradients are computed, dtypes, torch's features.
LANGUAGES = (*CPP[-1:], "triton")


def pairwise(**factors: Sequence) -> pytest.MarkDecorator:
    """Cases of a test with several factors; those named `kernels` are of the fixture.

    Any two values of two factors meet in some case, so every implementation meets every dtype. An operator has a branch
    for a dtype, one for a remainder of columns, one for a missing bias and so on; a fault takes one of them, or two
    together, such as loading bf16 at the end of a row. A fault that takes three at once may be missed; all combinations
    took most of the tests' time.
    """
    names = list(factors)
    return pytest.mark.parametrize(
        names, all_pairs(*factors.values()), indirect=[name for name in names if name == "kernels"], ids=_id
    )


def all_pairs(*factors: Sequence) -> list[tuple]:
    """Rows with a value of each factor, in which any two values of two factors meet; the same ones every time."""
    places = [(i, j) for i, values in enumerate(factors) for j in range(len(values))]
    missing = [pair for pair in itertools.combinations(places, 2) if pair[0][0] != pair[1][0]]
    missing = dict.fromkeys(missing)  # a set in order
    used: Counter = Counter()
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for i, values in enumerate(factors):
            if i not in row:
                row[i] = max(
                    range(len(values)), key=lambda j, i=i, row=row: (len(_new(row | {i: j}, missing)), -used[i, j], -j)
                )
        for pair in _new(row, missing):
            del missing[pair]
        used.update(row.items())
        rows.append(tuple(values[row[i]] for i, values in enumerate(factors)))
    return rows


def _new(row: dict[int, int], missing: dict) -> list[tuple]:
    return [pair for pair in itertools.combinations(sorted(row.items()), 2) if pair in missing]


def _id(value: object) -> str:
    return getattr(value, "__name__", str(value)).removeprefix("torch.")


@contextmanager
def running(implementation: str) -> Iterator[str]:
    """Run "cpp-avx2", "triton", "reference", ... inside the block; gives the device its tensors live on.

    Uninitialised memory is NaN inside, so that whatever a kernel leaves unwritten shows.
    """
    name, _, isa = implementation.partition("-")
    before = _C.isa_name() if _C else None
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    if isa:
        _C.set_isa(isa)
    try:
        with use_impl(name):
            yield "cuda" if name == "triton" and CUDA else "cpu"
    finally:
        torch.use_deterministic_algorithms(False)
        if isa:
            _C.set_isa(before)


def assert_close(
    actual: Tensor, oracle: Tensor, length: int = 1, roundings: int = 1, name: str = "", largest: float = 0.0
) -> None:
    """Every entry within the error that the arithmetic explains, relative to the largest entry of its last dimension.

    `roundings`: how often a value is rounded to `actual`'s dtype on its way (the last rounding included); `length`:
    how many fp32 terms are summed, whose roundings add up like a random walk. NaN and infinities must be in the same
    places. A row is held against its own largest entry, so that one large row cannot hide a wrong small one; `largest`
    says how large the terms are where they may cancel.
    """
    assert actual.shape == oracle.shape, f"{name}: {list(actual.shape)} for {list(oracle.shape)}"
    actual, expected = actual.detach().cpu(), oracle.detach().cpu().double()
    if not actual.numel():
        return
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: NaN or infinity in other places"
    unit = torch.finfo(actual.dtype).eps / 2
    bound = roundings * unit + 4 * 2**-24 * length**0.5
    sizes = expected.where(finite, 0).abs()
    sizes = (sizes.amax(-1, keepdim=True) if sizes.ndim else sizes).clamp(min=largest)
    error = (actual.double() - expected).where(finite, 0).abs()
    worst = (error / (bound * sizes + torch.finfo(actual.dtype).tiny * 2)).max().item()
    assert worst <= 1.5, f"{name}: error is {worst:.2f} times what {roundings} roundings and {length} terms explain"

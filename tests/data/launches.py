"""A program that starts operators' kernels on a stub GPU, with what `launch` remembers and without: must be the same.

Prints how many launches there were, and how many of them Triton did not have to look up.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
from stub_gpu import Launcher, stub_gpu

from mvd_kernels import _triton, add_layer_norm, scatter_mask_tokens

launched: list[tuple] = []
looked_up: list[int] = []


def facts(one: object) -> object:
    return (one.dtype, one.shape, one.data_ptr() % 16 == 0) if isinstance(one, torch.Tensor) else one


def record(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments) -> None:
    launched.append((x, y, z, function, *map(facts, arguments)))


def norm(batch: int, offset: int, dtype: torch.dtype) -> None:
    x = torch.zeros(batch * 9 * 64 + offset, dtype=dtype)[offset:].view(batch, 9, 64).requires_grad_()
    weight = torch.ones(64, dtype=dtype, requires_grad=True)
    results = add_layer_norm(x, x * 2, weight, weight * 2)
    torch.autograd.grad(results, (x, weight), results)


def scatter(batch: int, masked: int) -> None:
    """Tuned kernels, whose grids follow from the configuration."""
    x, weight = torch.zeros(batch, 3, 8, requires_grad=True), torch.zeros(70, 8, requires_grad=True)
    token, pos = torch.zeros(70, requires_grad=True), torch.zeros(3 + masked, 70, requires_grad=True)
    index = torch.arange(3 + masked).repeat(batch, 1)
    out = scatter_mask_tokens(x, weight, None, token, pos, index[:, :3], index[:, 3:])
    torch.autograd.grad(out, (x, weight, token, pos), out)


def everything() -> list[tuple]:
    launched.clear()
    for batch in (1, 2, 1):
        for offset, dtype in ((0, torch.float32), (1, torch.float32), (0, torch.bfloat16)):
            norm(batch, offset, dtype)
        scatter(batch, 5)
        scatter(batch, 200)
    return list(launched)


class Forgetful(dict):
    def get(self, key: tuple) -> None:
        return None


class Counting(dict):
    def __setitem__(self, key: tuple, value: object) -> None:
        looked_up.append(1)
        super().__setitem__(key, value)


if __name__ == "__main__":
    Launcher.__call__ = record
    with stub_gpu():
        _triton._found = Forgetful()
        expected = everything()
        _triton._found = Counting()
        assert everything() == expected
    print(len(expected), len(expected) - len(looked_up))

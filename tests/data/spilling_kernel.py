"""The offline gate on an operator of its own, whose kernel has four times as many values as a thread has registers.

Run as a program, with the arguments of mvd_kernels.offline: its workers find the kernel in it.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import triton
import triton.language as tl

from mvd_kernels import offline
from mvd_kernels._triton import launch


@triton.jit
def _spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, x / tl.sum(x, axis=0))


def offline_cases():
    x = torch.empty(32 * 1024, device="meta")
    yield "case", partial(launch, _spilling_kernel, (1,), x, flops=0, moves=(), BLOCK=len(x), num_warps=1)


if __name__ == "__main__":
    sys.modules["mvd_kernels.spilling"] = sys.modules["__main__"]
    offline.operators = lambda: ("spilling",)
    offline.ARCHITECTURES = (80,)
    sys.exit(offline.main())

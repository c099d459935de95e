"""Compiles the tube-mask kernel for GPUs that need not be there; prints each target that worked."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mvd_kernels.tube_mask import _tube_mask_kernel

POINTERS = {"samples_ptr": "*i64", "mask_ptr": "*i1", "visible_ptr": "*i64", "masked_ptr": "*i64"}
CONSTANTS = {"SLICES": 8, "POSITIONS": 196, "MASKED": 176, "BLOCK": 256, "STEP": 32}

signature = POINTERS | {"seed": "i64", "epoch": "i64"} | dict.fromkeys(CONSTANTS, "constexpr")
for capability in (80, 90):
    source = ASTSource(_tube_mask_kernel, signature, constexprs=CONSTANTS)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    print(f"sm_{capability}")

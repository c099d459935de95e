"""Shared by all tests: two threads, and Triton kernels in the interpreter where there is no GPU."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(2)
if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before mvd_kernels is imported.
    os.environ["TRITON_INTERPRET"] = "1"

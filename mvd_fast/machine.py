"""What a measurement was made on."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's name as Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def has_fast_bf16() -> bool:
    """Whether bf16 pays on what torch would train on: any GPU, or a CPU with bf16 arithmetic (AVX-512 and later).

    Other CPUs multiply bf16 matrices many times more slowly than float32 ones.
    """
    import torch

    return torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()

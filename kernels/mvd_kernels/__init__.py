"""Fused operators for masked video models: PyTorch and Triton only, useful in any ViT code base.

Every operator runs as a Triton kernel on CUDA, as C++ on the CPU, and as plain PyTorch anywhere: the plain version is
the definition that the others are tested against. `use_impl` forces one of them.
"""

from __future__ import annotations

from mvd_kernels._dispatch import implementation, operators, use_impl
from mvd_kernels.tube_mask import TubeMask, masked_per_slice, tube_mask

__version__ = "0.1.0"
__all__ = ["TubeMask", "__version__", "implementation", "masked_per_slice", "operators", "tube_mask", "use_impl"]

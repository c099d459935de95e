"""Fused operators for masked video models: PyTorch and Triton only, useful in any ViT code base.

Every operator runs as a Triton kernel on CUDA, as C++ on the CPU, and as plain PyTorch anywhere: the plain version is
the definition that the others are tested against. `use_impl` forces one of them.
"""

from __future__ import annotations

import os

# Operators of others: files of a folder `kernels` in one of the folders that MVD_PLUGINS names.
_named = filter(None, os.environ.get("MVD_PLUGINS", "").split(os.pathsep))
__path__ += [os.path.join(os.path.abspath(plugins), "kernels") for plugins in _named]

from mvd_kernels._dispatch import implementation, operators, use_impl  # noqa: E402
from mvd_kernels.add_layer_norm import AddLayerNorm, add_layer_norm  # noqa: E402
from mvd_kernels.attention import attention  # noqa: E402
from mvd_kernels.embed_visible_tubes import embed_visible_tubes  # noqa: E402
from mvd_kernels.linear_8bit import Linear8bit, QuantizedWeight, linear_8bit, quantize_weight  # noqa: E402
from mvd_kernels.linear_smooth_l1 import linear_smooth_l1  # noqa: E402
from mvd_kernels.scatter_mask_tokens import scatter_mask_tokens  # noqa: E402
from mvd_kernels.tube_mask import TubeMask, masked_per_slice, tube_mask  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "AddLayerNorm",
    "Linear8bit",
    "QuantizedWeight",
    "TubeMask",
    "__version__",
    "add_layer_norm",
    "attention",
    "embed_visible_tubes",
    "implementation",
    "linear_8bit",
    "linear_smooth_l1",
    "masked_per_slice",
    "operators",
    "quantize_weight",
    "scatter_mask_tokens",
    "tube_mask",
    "use_impl",
]

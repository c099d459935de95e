"""Put the fused operators into models of others, in place: one file per family of ViTs.

print(patch_timm_vit(model))     # what was swapped, what was left and why
unpatch(model)
"""

from __future__ import annotations

from mvd_kernels.patch._core import Report, Row, unpatch
from mvd_kernels.patch._fallback import PatchError
from mvd_kernels.patch.hf_videomae import patch_hf_videomae
from mvd_kernels.patch.reference import patch_reference_vit
from mvd_kernels.patch.timm import patch_timm_vit

__all__ = ["PatchError", "Report", "Row", "patch_hf_videomae", "patch_reference_vit", "patch_timm_vit", "unpatch"]

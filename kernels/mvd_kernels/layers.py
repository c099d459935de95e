"""Layers without parameters or constructor, whose `forward` stands for that of another library's layer.

They follow the convention of Hugging Face's `kernels` library: `kernelize` binds such a forward to a module that has
the attributes it reads. `mvd_kernels.patch` puts the same layers into models, after having checked that they fit.
"""

from __future__ import annotations

from mvd_kernels.patch.hf_videomae import VideoMAEEmbeddings, VideoMAELayer, VideoMAESelfAttention
from mvd_kernels.patch.reference import ReferenceAttention, ReferenceBlock
from mvd_kernels.patch.timm import TimmAttention, TimmBlock

__all__ = [
    "ReferenceAttention",
    "ReferenceBlock",
    "TimmAttention",
    "TimmBlock",
    "VideoMAEEmbeddings",
    "VideoMAELayer",
    "VideoMAESelfAttention",
]

"""The pre-norm ViT blocks that every network here is built from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .tokens import tubes

LN_EPS = 1e-6


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a sample's branch with probability `rate`, scales the rest."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.rate
        return x * (keep / (1.0 - self.rate)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, D].

    `split_bias`: the projection has separate query and value biases and none for the keys (BEiT, VideoMAE, MVD);
    otherwise one bias for all three (MAE).
    """

    def __init__(self, dim: int, num_heads: int, split_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=not split_bias)
        if split_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.split_bias = split_bias
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if self.split_bias:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, head dim]
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(LN x), then x + MLP(LN x); exact GELU, hidden width 4 D."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0, split_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LN_EPS)
        self.attn = Attention(dim, num_heads, split_bias)
        self.norm2 = nn.LayerNorm(dim, eps=LN_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def make_blocks(dim: int, depth: int, num_heads: int, drop_path: float = 0.0, split_bias: bool = True) -> nn.ModuleList:
    """`depth` blocks whose drop-path rate ramps linearly from 0 to `drop_path`."""
    rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
    return nn.ModuleList(Block(dim, num_heads, rate, split_bias) for rate in rates)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool = False) -> Tensor:
    """Applies the blocks; `recompute` keeps only each block's input and recomputes the rest in backward."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x


class TubeletEmbed(nn.Module):
    """Tubes of a clip to tokens. A Conv3d with kernel = stride = tube, computed as one matrix product, so that
    any subset of the tokens can be embedded alone."""

    def __init__(self, embed_dim: int, tubelet_size: int, patch_size: int) -> None:
        super().__init__()
        tube = (tubelet_size, patch_size, patch_size)
        self.tubelet_size, self.patch_size = tubelet_size, patch_size
        self.pixels = 3 * tubelet_size * patch_size**2  # values of one tube
        self.proj = nn.Conv3d(3, embed_dim, kernel_size=tube, stride=tube)

    def forward(self, video: Tensor, index: Tensor | None = None) -> Tensor:
        """video [B, 3, T, H, W] -> [B, N, D], or [B, M, D] for index int64 [B, M]."""
        weight = self.proj.weight.flatten(1)
        pixels = tubes(video, self.tubelet_size, self.patch_size, index).flatten(2)
        return F.linear(pixels.to(weight.dtype), weight, self.proj.bias)


class Decoder(nn.Module):
    """Blocks over all tokens, then LayerNorm and a linear head on the last `num_outputs` of them."""

    def __init__(self, dim: int, depth: int, num_heads: int, output_dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.blocks = make_blocks(dim, depth, num_heads, drop_path)
        self.norm = nn.LayerNorm(dim, eps=LN_EPS)
        self.head = nn.Linear(dim, output_dim)
        self.recompute = False

    def forward(self, x: Tensor, num_outputs: int) -> Tensor:
        x = run_blocks(self.blocks, x, self.recompute)
        return self.head(self.norm(x[:, x.shape[1] - num_outputs :]))


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform Linear weights (qkv as one matrix), zero biases; convolutions keep PyTorch's default."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def mask_token(dim: int) -> nn.Parameter:
    """A learned [1, 1, dim] token, normal with std 0.02 truncated at one std."""
    token = nn.Parameter(torch.zeros(1, 1, dim))
    nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
    return token


def frozen(table: Tensor) -> nn.Parameter:
    """A table that is stored in checkpoints and never trained."""
    return nn.Parameter(table, requires_grad=False)


def check_video(video: Tensor, num_frames: int, image_size: int) -> None:
    """Refuses anything but [B, 3, num_frames, image_size, image_size]."""
    check_shape("video", video, (3, num_frames, image_size, image_size))


def check_shape(name: str, x: Tensor, expected: Sequence[int]) -> None:
    if tuple(x.shape[1:]) != tuple(expected):
        raise ValueError(f"{name} must be [B, {', '.join(map(str, expected))}], got {list(x.shape)}")


def block_flops(tokens: int, dim: int) -> float:
    """Forward FLOP of one block on one sample, multiply-adds counted as 2: 24 N D^2 + 4 N^2 D."""
    return 24.0 * tokens * dim**2 + 4.0 * tokens**2 * dim


def linear_flops(tokens: int, *widths: int) -> float:
    return 2.0 * tokens * math.prod(widths)

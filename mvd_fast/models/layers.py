"""The pre-norm ViT blocks that every network here is built from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvd_fast.config.network import ClipConfig, DecoderConfig
from mvd_kernels import (
    AddLayerNorm,
    attention,
    embed_visible_tubes,
    scatter_mask_tokens,
)

LN_EPS = 1e-6

MakeFrozen = Callable[[nn.Linear, str | None], nn.Module]
"""Of a layer and an activation after it (None or "gelu"), one without gradients that computes both."""


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a sample's branch with probability `rate`, scales the rest."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor | None:
        """Factors of the samples of a branch that is added to x [B, N, D]: float32 [B], 0 or 1 / (1 - rate).

        None where nothing is dropped.
        """
        if not self.training or self.rate == 0.0:
            return None
        keep = torch.rand(x.shape[0], device=x.device) >= self.rate
        return keep / (1.0 - self.rate)


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

    def forward(self, x: Tensor, outputs: int | None = None) -> Tensor:
        """-> [B, N, D], or [B, outputs, D]: of the last `outputs` tokens only, which attend to all."""
        if outputs is None or outputs == x.shape[1]:
            qkv = F.linear(x, self.qkv.weight, self._bias()) if self.split_bias else self.qkv(x)
            q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)  # each [B, N, heads, head dim]
        else:
            dim, bias = x.shape[2], self._bias()
            q = F.linear(x[:, -outputs:], self.qkv.weight[:dim], bias[:dim]).unflatten(2, (self.num_heads, -1))
            kv = F.linear(x, self.qkv.weight[dim:], bias[dim:])
            k, v = kv.unflatten(2, (2, self.num_heads, -1)).unbind(2)
        return self.proj(attention(q, k, v).flatten(2))

    def _bias(self) -> Tensor:
        """Of queries, keys and values, [3 D]."""
        if not self.split_bias:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])

    def freeze(self, make: MakeFrozen) -> None:
        """Replaces its linear layers, for good: a frozen teacher's."""
        self.qkv.bias = nn.Parameter(self._bias().detach(), requires_grad=False)
        if self.split_bias:
            self.split_bias = False
            del self.q_bias, self.v_bias
        self.qkv, self.proj = make(self.qkv, None), make(self.proj, None)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.act: nn.Module = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def freeze(self, make: MakeFrozen) -> None:
        """As `Attention.freeze`; the GELU moves into the first layer."""
        self.fc1, self.fc2, self.act = make(self.fc1, "gelu"), make(self.fc2, None), nn.Identity()


class Pending(NamedTuple):
    """The residual stream [B, N, D] and a branch still to be added to it: the next LayerNorm does it in passing."""

    x: Tensor
    branch: Tensor | None = None
    scale: Tensor | None = None  # the branch's factors [B] (drop path), None: 1

    def sum(self) -> Tensor:
        if self.branch is None:
            return self.x
        branch = self.branch if self.scale is None else self.branch * self.scale.to(self.branch.dtype)[:, None, None]
        return self.x + branch


class Block(nn.Module):
    """x + attention(LN x), then x + MLP(LN x); exact GELU, hidden width 4 D. The last addition is left pending."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0, split_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = AddLayerNorm(dim, eps=LN_EPS)
        self.attn = Attention(dim, num_heads, split_bias)
        self.norm2 = AddLayerNorm(dim, eps=LN_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, scale: Tensor | None = None, outputs: int | None = None
    ) -> Pending:
        """x [B, N, D] and what is pending from the block before -> all tokens, or only the last `outputs` of them."""
        x, normed = self.norm1(x, branch, scale)
        x = x if outputs is None else x[:, -outputs:]
        x, normed = self.norm2(x, self.attn(normed, outputs), self.drop_path(x))
        return Pending(x, self.mlp(normed), self.drop_path(x))


def make_blocks(dim: int, depth: int, num_heads: int, drop_path: float = 0.0, split_bias: bool = True) -> nn.ModuleList:
    """`depth` blocks whose drop-path rate ramps linearly from 0 to `drop_path`."""
    rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
    return nn.ModuleList(Block(dim, num_heads, rate, split_bias) for rate in rates)


def run_blocks(blocks: Sequence[nn.Module], x: Tensor, recompute: bool = False, outputs: int | None = None) -> Pending:
    """Applies the blocks; `recompute` keeps only each block's input and recomputes the rest in backward.

    `outputs`: only the last so many tokens are wanted, and the last block computes no others.
    """
    pending = Pending(x)
    for number, block in enumerate(blocks):
        wanted = outputs if number == len(blocks) - 1 else None
        if recompute and torch.is_grad_enabled():
            pending = Pending(*checkpoint(block, *pending, wanted, use_reentrant=False))
        else:
            pending = block(*pending, wanted)
    return pending


class TubeletEmbed(nn.Module):
    """Tubes of a clip to tokens. A Conv3d with kernel = stride = tube, computed as one matrix product, so that
    any subset of the tokens can be embedded alone."""

    def __init__(self, embed_dim: int, tubelet_size: int, patch_size: int) -> None:
        super().__init__()
        tube = (tubelet_size, patch_size, patch_size)
        self.tubelet_size, self.patch_size = tubelet_size, patch_size
        self.pixels = 3 * tubelet_size * patch_size**2  # values of one tube
        self.proj = nn.Conv3d(3, embed_dim, kernel_size=tube, stride=tube)

    def forward(self, video: Tensor, pos: Tensor, index: Tensor | None = None) -> Tensor:
        """video [B, 3, T, H, W], pos [1, N, D] -> [B, N, D], or [B, M, D] for index int64 [B, M]; positions added."""
        return embed_visible_tubes(video, self.proj.weight, self.proj.bias, pos, index)


class ClipEncoder(nn.Module):
    """Tubes of clips and the blocks over them: what every network of videos begins with."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config, self.grid = config, config.grid
        self.patch_embed = TubeletEmbed(config.embed_dim, config.tubelet_size, config.patch_size)
        self.blocks = make_blocks(config.embed_dim, config.depth, config.num_heads, config.drop_path)

    def encode_tubes(self, video: Tensor, pos: Tensor, index: Tensor | None = None) -> Pending:
        """video [B, 3, T, H, W], pos [1, N, D] -> tokens [B, N, D], or [B, M, D] for index int64 [B, M]."""
        check_video(video, self.config)
        return run_blocks(self.blocks, self.patch_embed(video, pos, index), self.config.activation_checkpointing)

    def encoder_flops(self, tokens: int) -> float:
        """Forward FLOP of one clip with so many tokens."""
        embed = linear_flops(tokens, self.patch_embed.pixels, self.config.embed_dim)
        return embed + len(self.blocks) * block_flops(tokens, self.config.embed_dim)


class MaskTokens(nn.Linear):
    """Encoder output to a decoder's input: projected visible tokens, then mask tokens, each with its position."""

    def forward(self, x: Tensor, token: Tensor, pos: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """x [B, Nv, E], token [1, 1, D], pos [1, N, D], visible int64 [B, Nv], masked int64 [B, Nm] -> [B, N, D]."""
        return scatter_mask_tokens(x, self.weight, self.bias, token, pos, visible, masked)


class Decoder(nn.Module):
    """Blocks over all tokens (the last: for the outputs alone), LayerNorm and a linear head on the last tokens."""

    def __init__(self, config: DecoderConfig, output_dim: int, drop_path: float = 0.0, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = make_blocks(config.dim, config.depth, config.num_heads, drop_path)
        self.norm = AddLayerNorm(config.dim, eps=LN_EPS)
        self.head = nn.Linear(config.dim, output_dim)
        self.recompute = recompute

    def features(self, x: Tensor, num_outputs: int) -> Tensor:
        """x [B, N, D] -> what the head reads, [B, num_outputs, D]."""
        return self.norm(*run_blocks(self.blocks, x, self.recompute, num_outputs))[1]

    def forward(self, x: Tensor, num_outputs: int) -> Tensor:
        """x [B, N, D] -> predictions [B, num_outputs, C]."""
        return self.head(self.features(x, num_outputs))

    def flops(self, tokens: int, outputs: int) -> float:
        """Forward FLOP of one sample, the head's included; blocks but the last compute all tokens."""
        dim, depth = self.head.in_features, len(self.blocks)
        blocks = (depth - 1) * block_flops(tokens, dim) + block_flops(tokens, dim, outputs)
        return blocks + linear_flops(outputs, *self.head.weight.shape)


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


def frozen(values: Tensor) -> nn.Parameter:
    """What is stored in checkpoints and never trained: tables, weights of teachers."""
    return nn.Parameter(values, requires_grad=False)


def check_video(video: Tensor, config: ClipConfig) -> None:
    """Refuses anything but [B, 3, num_frames, image_size, image_size]."""
    check_shape("video", video, (3, config.num_frames, config.image_size, config.image_size))


def check_shape(name: str, x: Tensor, expected: Sequence[int]) -> None:
    if tuple(x.shape[1:]) != tuple(expected):
        raise ValueError(f"{name} must be [B, {', '.join(map(str, expected))}], got {list(x.shape)}")


def block_flops(tokens: int, dim: int, outputs: int | None = None) -> float:
    """Forward FLOP of one block on one sample, multiply-adds counted as 2: 24 N D^2 + 4 N^2 D.

    `outputs`: of a block that computes only so many tokens; keys and values are still of all.
    """
    outputs = tokens if outputs is None else outputs
    return (4.0 * tokens + 20.0 * outputs) * dim**2 + 4.0 * outputs * tokens * dim


def linear_flops(tokens: int, *widths: int) -> float:
    return 2.0 * tokens * math.prod(widths)

"""The README's examples of the operators run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from mvd_kernels import AddLayerNorm, linear_8bit, quantize_weight

README = (Path(__file__).parents[1] / "README.md").read_text()


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(dim, 4 * dim)


def test_examples_of_the_operators() -> None:
    section = README.split("## Use the ops in your own ViT")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 4 and all(len(block.splitlines()) <= 7 for block in blocks)
    B, N, heads, D = 2, 8 * 14 * 14, 2, 16
    dim = heads * D
    names = {
        "B": B,
        "N": N,
        "heads": heads,
        "D": D,
        "x": torch.randn(B, N, dim),
        "qkv": torch.randn(B, N, 3 * dim),
        "proj": nn.Linear(dim, dim),
        "norm": AddLayerNorm(dim),
        "conv3d": nn.Conv3d(3, dim, (2, 16, 16)),
        "frames": torch.randint(256, (B, 16, 224, 224, 3), dtype=torch.uint8),
        "pos": torch.randn(1, N, dim),
        "encoder": nn.Identity(),
        "down": nn.Linear(dim, 24),
        "mask_token": torch.zeros(1, 1, 24),
        "decoder_pos": torch.randn(1, N, 24),
        "head": nn.Linear(24, 40),
        "block": Block(dim),
        "teacher_features": torch.randn(B, N, 40),
    }
    for block in blocks:
        exec(block, names)  # one after the other, each building on those before
        if "decoder_in" in names and "decoder_out" not in names:
            names["decoder_out"] = names["decoder_in"][:, -names["masked"].shape[1] :]
    assert names["normed"].shape == (B, N, dim) and names["decoder_in"].shape == (B, N, 24)
    assert names["loss"].shape == () and names["loss"].isfinite()
    fc1 = names["block"].mlp.fc1
    with torch.no_grad():
        expected = linear_8bit(names["x"], quantize_weight(fc1.weight), fc1.bias, "gelu")
    assert torch.equal(names["hidden"], expected)


def test_the_example_of_patching_a_model() -> None:
    section = README.split("## Speed up your own ViT")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(block, names)
    assert names["loss"].isfinite()

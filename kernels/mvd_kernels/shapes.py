"""The shapes of the recipes: what `mvd_kernels.offline` compiles the Triton kernels for, and what benchmarks time."""

from __future__ import annotations

from typing import NamedTuple


class Recipe(NamedTuple):
    """Widths and heads of a student, and the width of its teachers' features."""

    width: int
    heads: int
    decoder_width: int
    decoder_heads: int
    target_width: int


RECIPES = {
    "ViT-S": Recipe(384, 6, 384, 6, 768),
    "ViT-B": Recipe(768, 12, 768, 12, 768),
    "ViT-L": Recipe(1024, 16, 512, 8, 1024),
    "ViT-H": Recipe(1280, 16, 640, 8, 1280),
}
# A clip, its tubes and how many of them a student sees.
FRAMES, IMAGE_SIZE = 16, 224
TUBELET, PATCH = 2, 16
GRID = (FRAMES // TUBELET, IMAGE_SIZE // PATCH, IMAGE_SIZE // PATCH)
MASK_RATIO = 0.9
TOKENS = GRID[0] * GRID[1] * GRID[2]
MASKED = GRID[0] * int(MASK_RATIO * GRID[1] * GRID[2])
VISIBLE = TOKENS - MASKED
# The image teacher of ViT-H has smaller patches; that of the others has the clip's, and a class token.
IMAGE_PATCH_H = 14
IMAGE_TOKENS = GRID[1] * GRID[2] + 1
IMAGE_MASK_RATIO = 0.75
# Teachers, whose linear layers are frozen and may be in 8 bits.
TEACHERS = {name: recipe.width for name, recipe in RECIPES.items() if name != "ViT-S"}


def linear_layers(width: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of a ViT's block."""
    return {
        "qkv": (width, 3 * width),
        "proj": (width, width),
        "fc1": (width, 4 * width),
        "fc2": (4 * width, width),
    }

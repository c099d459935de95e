"""What a call costs besides its arithmetic: 1 x 8 x 64 in bf16, one thread, against the same in eager PyTorch.

"Triton" is Triton's launchers on a GPU that is not there (stub_gpu.py): launches do nothing, so that only the shapes of
results are checked. Times are the process's CPU time: another process on the machine is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product

import bench_add_layer_norm
import bench_attention
import bench_embed_visible_tubes
import bench_linear_smooth_l1
import bench_scatter_mask_tokens
import pytest
import torch
from harness import DEVICE, Case
from stub_gpu import stub_gpu
from torch import Tensor

from mvd_kernels import add_layer_norm, attention, linear_smooth_l1, scatter_mask_tokens
from mvd_kernels._dispatch import extension

TOKENS, WIDTH = 8, 64
# At least: ratios of eager's time by ours, forward + backward.
GOALS = {"add_layer_norm": 1 / 1.8, "scatter_mask_tokens": 1 / 1.2, "linear_smooth_l1": 1 / 1.2}
OPERATORS = ("add_layer_norm", "scatter_mask_tokens", "linear_smooth_l1", "embed_visible_tubes", "attention")
CASES = {" ".join(parts): parts for parts in product(OPERATORS, ("fwd", "fwd+bwd"), ("C++", "Triton"))}
CASES = {name: parts for name, parts in CASES.items() if parts[0] != "attention" or parts[2] == "C++"}  # a library's

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's kernels, and of Triton's where no GPU is")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def leaf(*shape: int) -> Tensor:
    return normal(*shape).requires_grad_()


def operators() -> dict[str, tuple[Callable, Callable, list[Tensor]]]:
    """Ours, eager, and the leaves that want gradients."""
    x, branch, weight, bias = (leaf(*shape) for shape in ((1, TOKENS, WIDTH),) * 2 + ((WIDTH,),) * 2)
    norm = (x, branch, weight, bias)
    head_weights, head_biases = [leaf(WIDTH, WIDTH) for _ in range(2)], [leaf(WIDTH) for _ in range(2)]
    mask_tokens, pos = [leaf(1, 1, WIDTH) for _ in range(2)], [normal(1, 2 * TOKENS, WIDTH) for _ in range(2)]
    order = torch.randperm(2 * TOKENS)[None]
    visible, masked = order[:, :TOKENS].contiguous(), order[:, TOKENS:].contiguous()
    scatter = (x, head_weights, head_biases, mask_tokens, pos, visible, masked)
    heads = ([x], head_weights[:1], head_biases[:1], [normal(1, 2 * TOKENS, WIDTH)], visible)
    clip = torch.randint(256, (1, 2, 16, 32, 3), dtype=torch.uint8)
    tubes = (clip, leaf(WIDTH, 3, 2, 4, 4), bias, normal(1, 4 * TOKENS, WIDTH), visible)
    qkv = [leaf(1, TOKENS, 1, WIDTH) for _ in range(3)]
    embed, smooth_l1 = bench_embed_visible_tubes, bench_linear_smooth_l1
    scatter_leaves = [x, *head_weights, *head_biases, *mask_tokens]
    return {
        "add_layer_norm": (
            partial(add_layer_norm, *norm),
            partial(bench_add_layer_norm.eager, *norm, None),
            list(norm),
        ),
        "scatter_mask_tokens": (
            partial(scatter_mask_tokens, *scatter),
            partial(bench_scatter_mask_tokens.eager, *scatter),
            scatter_leaves,
        ),
        "linear_smooth_l1": (
            partial(linear_smooth_l1, *heads),
            partial(smooth_l1.eager, *heads),
            [x, head_weights[0], head_biases[0]],
        ),
        "embed_visible_tubes": (
            partial(embed.ours, *tubes),
            partial(embed.embed_all_then_gather, *tubes),
            [tubes[1], bias],
        ),
        "attention": (partial(attention, *qkv), partial(bench_attention.sdpa, *qkv), qkv),
    }


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Iterator[Case]:
    name, way, language = CASES[request.param]
    if language == "C++" and extension()[0] is None:
        pytest.skip("the C++ extension is not built")
    torch.manual_seed(0)
    ours, eager, leaves = operators()[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(function: Callable, grads: list[Tensor] | None) -> list[Tensor]:
        with torch.set_grad_enabled(way == "fwd+bwd"):
            outputs = function()
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return list(torch.autograd.grad(outputs, leaves, grads)) if grads else outputs

    grads = [torch.randn_like(one) for one in call(eager, None)] if way == "fwd+bwd" else None
    with stub_gpu() if language == "Triton" else nullcontext():
        yield Case(
            f"host time of {request.param}",
            {"ours": partial(call, ours, grads), "eager": partial(call, eager, grads)},
            tolerance=0.1,  # in bf16 eager rounds on its way, up to some percent of the largest entry
            goal=GOALS.get(name) if grads else None,
            facts=(lambda results: [torch.tensor(one.shape) for one in results]) if language == "Triton" else None,
            calls=50,
            timer=time.process_time,
        )
    torch.set_num_threads(threads)


@pytest.mark.parametrize("side", ["ours", "eager"])
def test_host_time(compare, case, side):
    compare(case, side)

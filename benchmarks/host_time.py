"""What a call costs besides its arithmetic: small tensors, one thread, against the same in eager PyTorch.

    python benchmarks/host_time.py                  the kernels for the CPU, as a table in Markdown
    python benchmarks/host_time.py --triton         Triton's launchers on a GPU that is not there: launches do nothing

Both sides are checked equal (not with --triton, where nothing is computed) and alternate. The figures are the
process's CPU time, medians of rounds: another process on the machine is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import bench_add_layer_norm
import bench_attention
import bench_embed_visible_tubes
import bench_linear_smooth_l1
import bench_scatter_mask_tokens
import torch
from stub_gpu import stub_gpu
from torch import Tensor

from mvd_kernels import add_layer_norm, attention, embed_visible_tubes, linear_smooth_l1, scatter_mask_tokens, use_impl

TOKENS, WIDTH = 8, 64
CALLS = 50  # of a side in a round


@dataclass(frozen=True)
class Case:
    """An operator at 1 x 8 x 64: ours and eager give the same tensors; leaves want gradients."""

    ours: Callable[[], Iterable[Tensor]]
    eager: Callable[[], Iterable[Tensor]]
    leaves: list[Tensor]

    def side(self, function: Callable[[], Iterable[Tensor]], backward: bool) -> Callable[[], list[Tensor]]:
        def forward() -> list[Tensor]:
            with nullcontext() if backward else torch.no_grad():
                return _list(function())

        grads = [torch.randn_like(one) for one in forward()]
        return (lambda: list(torch.autograd.grad(forward(), self.leaves, grads))) if backward else forward


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def leaf(*shape: int) -> Tensor:
    return normal(*shape).requires_grad_()


def cases() -> dict[str, Case]:
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
    mean, std = bench_embed_visible_tubes.MEAN, bench_embed_visible_tubes.STD
    return {
        "add_layer_norm": Case(
            lambda: add_layer_norm(*norm), lambda: bench_add_layer_norm.eager(*norm, None), list(norm)
        ),
        "scatter_mask_tokens": Case(
            lambda: scatter_mask_tokens(*scatter),
            lambda: bench_scatter_mask_tokens.eager(*scatter),
            [x, *head_weights, *head_biases, *mask_tokens],
        ),
        "linear_smooth_l1": Case(
            lambda: linear_smooth_l1(*heads),
            lambda: bench_linear_smooth_l1.eager(*heads),
            [x, head_weights[0], head_biases[0]],
        ),
        "embed_visible_tubes": Case(
            lambda: embed_visible_tubes(*tubes, mean, std),
            lambda: bench_embed_visible_tubes.embed_all_then_gather(*tubes),
            [tubes[1], bias],
        ),
        "attention": Case(lambda: attention(*qkv), lambda: bench_attention.sdpa(*qkv), qkv),
    }


def _list(results: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def check(name: str, ours: list[Tensor], eager: list[Tensor]) -> None:
    """In bf16 eager rounds on its way, up to some percent of the largest entry."""
    for mine, theirs in zip(ours, eager, strict=True):
        error = (mine.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert error < 0.1, f"{name}: ours is {error:.1e} off eager's"


def measure(ours: Callable[[], object], eager: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Microseconds of ours and of eager, and the ratio ours / eager: medians over rounds."""
    times: dict[Callable, list[float]] = {ours: [], eager: []}
    for number in range(rounds + 2):  # two to warm up
        for side in (ours, eager) if number % 2 else (eager, ours):
            start = time.process_time()
            for _ in range(CALLS):
                side()
            times[side].append((time.process_time() - start) / CALLS * 1e6)
    mine, theirs = times[ours][2:], times[eager][2:]
    ratio = statistics.median(one / other for one, other in zip(mine, theirs, strict=True))
    return statistics.median(mine), statistics.median(theirs), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", action="store_true", help="Triton's launchers instead of the C++ operators")
    parser.add_argument("--rounds", type=int, default=60, help=f"of {CALLS} calls of each side (60)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| operator, 1 x 8 x 64 bf16 | ours no grad | eager | ratio | ours forward + backward | eager | ratio |")
    print("|---|---|---|---|---|---|---|")
    with stub_gpu() if options.triton else nullcontext():
        for name, case in cases().items():
            if options.triton and name == "attention":  # a library's
                continue
            row = []
            for backward in (False, True):
                ours, eager = (case.side(one, backward) for one in (case.ours, case.eager))
                if not options.triton:
                    with use_impl("cpp"):
                        check(name, ours(), eager()) if backward is False else None
                mine, theirs, ratio = measure(ours, eager, options.rounds)
                row += [f"{mine:.0f} us", f"{theirs:.0f} us", f"**{ratio:.2f}x**"]
            print(f"| `{name}` | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

"""How close a trained teacher's linear layers come in 8 bits: `python benchmarks/teacher_8bit.py runs/demo`.

Runs both teachers of a finished demo on test clips, and every linear layer of their blocks again in 8 bits on the same
input: cosine of each token with the layer in float32. That is what `linear_8bit` adds; the whole network in 8 bits is
another question.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd_fast.config.load import load_config
from mvd_fast.data import build_loader
from mvd_fast.models.frozen import FrozenLinear
from mvd_fast.tasks import build_task
from mvd_kernels import linear_8bit, quantize_weight

CLIPS = 8


@torch.inference_mode()
def cosines(demo: Path) -> dict[str, Tensor]:
    """Of every linear layer in the blocks of both teachers, by name: float64 [tokens]."""
    config = load_config(str(demo / "student" / "config.json"), [f"data.train={demo / 'data' / 'test.txt'}"])
    task = build_task(config).eval()
    found: dict[str, Tensor] = {}

    def compare(name: str, layer: FrozenLinear):
        # Taken now: the layer gives its weight up for oneDNN's order of it.
        quantized, weight, bias = quantize_weight(layer.weight), layer.weight.double(), layer.bias

        def hook(_layer: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
            exact = F.linear(inputs[0].double(), weight, None if bias is None else bias.double())
            in_8_bits = linear_8bit(inputs[0], quantized, bias).double()
            found[name] = F.cosine_similarity(in_8_bits, exact, dim=-1).flatten()

        return hook

    for role, network in task.frozen().items():
        for name, layer in network.named_modules():
            if isinstance(layer, FrozenLinear):
                layer.register_forward_hook(compare(f"{role}.{name}", layer))
    loader = build_loader(config, 0, 1, torch.device("cpu"), CLIPS, 1)
    task.with_targets(next(loader.batches(0)))
    loader.close()
    return found


def main() -> None:
    for name, values in cosines(Path(sys.argv[1])).items():
        print(f"{name:<50} {values.numel():>7} tokens   least {values.min():.6f}   mean {values.mean():.6f}")


if __name__ == "__main__":
    main()

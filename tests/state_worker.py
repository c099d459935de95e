"""Started by `deepspeed` with several ranks: bytes of weights, gradients and optimiser state that this rank holds."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch

from mvd_fast.config.load import load_config
from mvd_fast.tasks.distill import DistilledStudent
from mvd_fast.training import launch
from mvd_fast.training.engine import backward, start_engine
from mvd_kernels import tube_mask


def storages(network: torch.nn.Module | None = None) -> dict[int, torch.UntypedStorage]:
    """All tensors that Python knows, and gradients, which it may not know yet."""
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    found += [p.grad for p in network.parameters() if p.grad is not None] if network else []
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in found}


def settled_bytes(network: torch.nn.Module, before: dict[int, torch.UntypedStorage]) -> int:
    """What is there beyond `before`: the least of a few looks, as gloo's threads let go of summed gradients when they
    get to it."""
    looks = []
    for _ in range(5):
        looks.append(sum(one.nbytes() for place, one in storages(network).items() if place not in before))
        time.sleep(0.1)
    return min(looks)


def measure(config_file: str, stage: int, precision: str, accumulation: int) -> int:
    """Bytes after the backward passes of the second step, its inputs and all that was there before left out."""
    settings = [f"deepspeed.zero_optimization.stage={stage}", f'precision="{precision}"']
    config = load_config(config_file, settings)
    model = config.model
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    video = torch.randn(2, 3, model.num_frames, model.image_size, model.image_size).to(dtype)
    mask = tube_mask(0, 0, torch.arange(2), model.grid, config.mask.ratio).mask
    targets = {t.title: torch.randn(2, model.num_tokens, t.target_dim).to(dtype) for t in config.targets}
    gc.collect()
    before = storages()  # kept, so that no address is used again
    network = DistilledStudent(model, config.decoders)
    ranks = launch.world_size()
    engine = start_engine(network, config, config.batch.size // accumulation // ranks, accumulation)
    most = 0
    for step in range(2):
        for _ in range(accumulation):
            loss = sum(part for part in engine(video, mask, targets).values())
            backward(engine, loss)
            del loss
            gc.collect()
            most = max(most, settled_bytes(network, before)) if step else 0
            engine.step()
    return most


if __name__ == "__main__":
    config_file, out, *cases = sys.argv[1:]
    found = {}
    with launch.init_process_group():
        for case in cases:
            stage, precision, accumulation = case.split("-")
            found[case] = measure(config_file, int(stage), precision, int(accumulation))
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(found))

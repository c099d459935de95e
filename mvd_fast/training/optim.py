"""The recipes' optimiser: AdamW's parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mvd_fast.config.run import FineTuneOptimConfig, OptimConfig

from .adamw import MasterAdamW


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Weight decay applies to matrices, kernels and tokens; not to 1-D tensors and biases."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def layer_scale(depth: int, decay: float) -> Callable[[str], float]:
    """Layer-wise decay of the learning rate (BEiT): decay ** (layers above), the embedding being layer 0.

    Returns a function from parameter name to scale; blocks are layers 1..depth, everything after them depth + 1.
    """

    def scale(name: str) -> float:
        if block := re.match(r"blocks\.(\d+)\.", name):
            layer = int(block[1]) + 1
        else:
            layer = 0 if name.startswith(("patch_embed", "pos_embed", "cls_token", "mask_token")) else depth + 1
        return decay ** (depth + 1 - layer)

    return scale


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, Any]]:
    """Groups for AdamW, each with `lr_scale` and `weight_decay`; frozen parameters are left out."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        key = (scale(name), weight_decay if is_decayed(name, parameter) else 0.0)
        group = groups.setdefault(key, {"params": [], "lr_scale": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: OptimConfig, own_masters: bool = False) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; the learning rate is set every step by `set_lr`.

    With `layer_decay` the model's `blocks` learn the more slowly the further they are from the head.
    own_masters: `MasterAdamW`, which clips gradients by itself.
    """
    decay = config.layer_decay if isinstance(config, FineTuneOptimConfig) else 1.0
    scale = [layer_scale(len(model.blocks), decay)] if decay != 1.0 else []
    groups = parameter_groups(model.named_parameters(), config.weight_decay, *scale)
    if own_masters:
        return MasterAdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, clip_grad=config.clip_grad)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps_per_epoch: int, config: OptimConfig, batch_size: int) -> float:
    """Linear warm-up, then cosine, per step; both ends scaled by batch_size / 256 (Goyal et al. 2017).

    The warm-up reaches the peak at its last step; the cosine starts at the peak at the next one and would reach
    the minimum one step after the run's last.
    """
    peak, final = (lr * batch_size / 256 for lr in (config.base_lr, config.base_min_lr))
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + (peak - config.warmup_lr) * step / max(1, warmup - 1)
    phase = math.pi * (step - warmup) / max(1, total - warmup)
    return final + 0.5 * (peak - final) * (1 + math.cos(phase))


def set_lr(optimizer: Any, lr: float) -> None:
    """Sets `lr` times each group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)

"""The trained network on DeepSpeed: its configuration, its optimiser, and its full-precision weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mvd_fast.config.run import RunConfig

from .adamw import GradientSums, MasterAdamW, gradient_norm, round_parameters
from .deepspeed_start import start_deepspeed
from .optim import build_optimizer


def start_engine(network: nn.Module, config: RunConfig, micro_batch_size: int, grad_accum_steps: int) -> Any:
    """DeepSpeed's engine around `network`, on this rank's device, in the run's precision.

    In bf16 with ZeRO stage 0 the step is `MasterAdamW`'s: DeepSpeed's own keeps float32 copies of all gradients, and
    its step takes several times as long. Then DeepSpeed is told of a network without mixed precision, and only sums
    gradients over ranks.
    """
    start_deepspeed()
    import deepspeed

    if has_own_masters(config):
        network.to(deepspeed.get_accelerator().current_device_name())
    optimizer = build_optimizer(network, config.optim, own_masters=has_own_masters(config))
    sums = None
    if has_own_masters(config):
        round_parameters(network)
        sums = GradientSums(network) if grad_accum_steps > 1 else None
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=optimizer, config=deepspeed_config(config, micro_batch_size, grad_accum_steps)
    )
    if sums is not None:
        engine.gradient_sums = sums
    return engine


def backward(engine: Any, loss: Tensor) -> None:
    """The backward pass of one micro batch."""
    sums: GradientSums | None = getattr(engine, "gradient_sums", None)
    if sums:
        sums.last = engine.is_gradient_accumulation_boundary()
    engine.backward(loss)
    if sums and sums.last:
        sums.require_complete()


def has_own_masters(config: RunConfig) -> bool:
    """Whether the step is MasterAdamW's."""
    return config.precision == "bf16" and config.zero_stage == 0


def deepspeed_config(config: RunConfig, micro_batch_size: int, grad_accum_steps: int) -> dict[str, Any]:
    """DeepSpeed's own config: the run's `deepspeed` block plus what the run's fields decide."""
    own = has_own_masters(config)
    sum_in_fp32 = config.precision == "bf16" and grad_accum_steps > 1 and not own
    return {
        # ZeRO-Offload with torch's AdamW is the user's choice, not an error.
        "zero_force_ds_cpu_optimizer": False,
        **({"data_types": {"grad_accum_dtype": "fp32"}} if sum_in_fp32 else {}),
        **({"communication_data_type": "bf16"} if own else {}),
        **copy.deepcopy(config.deepspeed),
        "train_batch_size": config.batch.size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": 0.0 if own else config.optim.clip_grad,
        "bf16": {"enabled": config.precision == "bf16" and not own},
        "steps_per_print": None,
    }


def local_gradient_norm(engine: Any) -> Tensor | None:
    """The gradient norm before the step, where DeepSpeed does not compute it itself (ZeRO 0)."""
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    return gradient_norm(engine.module.parameters())


def full_weights(engine: Any, tables: dict[str, Tensor], keep: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The network's float32 state dict from the optimiser's master weights (collective), and what in it is not finite.

    tables: frozen parameters in full precision. keep: whether this rank wants the weights; else they are dropped one
    by one as they are gathered.
    """
    weights, spoiled = {}, []
    for name, parameter in engine.module.named_parameters():
        value = (tables[name] if name in tables else master_weight(engine, parameter)).detach()
        if not value.isfinite().all():
            spoiled.append(name)
        if keep:
            weights[name] = value.to("cpu", torch.float32, copy=True).contiguous()
    return weights, spoiled


def master_weight(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The float32 value behind a parameter: the optimiser's master copy, or the parameter where it is its own."""
    if isinstance(engine.optimizer, MasterAdamW):
        return engine.optimizer.master(parameter)
    import deepspeed

    full = deepspeed.utils.safe_get_full_fp32_param(parameter)
    return parameter if full is None else full

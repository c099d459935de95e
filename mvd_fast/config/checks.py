"""What no kind can say of a run alone: whether its parts fit together, with the launch, and with DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Iterator

from .base import ConfigError
from .kinds import DATASETS, OfKind, available_kinds, nearest
from .run import DataConfig, RunConfig

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "batch.size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.grad_accum_steps",
    "optimizer": "the fields of optim",
    "scheduler": "optim.base_lr, optim.base_min_lr and optim.warmup_epochs",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "gradient_clipping": "optim.clip_grad",
    "steps_per_print": "log.every",
}

# Top-level keys that DeepSpeed 0.19 reads; it ignores all others without a word.
KNOWN_DEEPSPEED_KEYS = frozenset(
    """activation_checkpointing aio autotuning checkpoint comet comms_logger communication_data_type
    compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler gradient_allreduce_op gradient_predivide_factor
    hybrid_engine log_level managed_gradient_accumulation memory_breakdown pipeline prescale_gradients
    seq_parallel_communication_data_type tensor_parallel tensorboard timers use_data_before_expert_parallelism
    vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization""".split()  # noqa: SIM905 (forty words read best as words)
)


def faults(config: RunConfig) -> list[str]:
    """One sentence for everything in `config` that cannot work together; empty when it is sound."""
    checks = (
        config.faults(),
        config.data.faults(config.request),
        _mask_faults(config),
        _batch_faults(config),
        _deepspeed_faults(config),
    )
    return [sentence for found in checks for sentence in found]


def missing_files(config: RunConfig) -> list[str]:
    """One sentence for each input that is not on disk, saying how to get it. Paths start at the working directory."""
    return [*config.data.missing_files(), *config.missing_files()]


def data_fault(schema: type[RunConfig], kind: str) -> str:
    """One sentence where a kind of dataset lacks what a task needs; else empty."""
    if schema.needs <= _gives(kind):
        return ""
    suited = (other for other in available_kinds(DATASETS) if schema.needs <= _gives(other))
    given, asked = (" and ".join(sorted(names)) for names in (_gives(kind), schema.needs))
    task = schema.model_fields["task"].default
    return f"data.kind: {kind!r} gives {given}, and task {task!r} needs {asked}: take {' or '.join(map(repr, suited))}"


def _gives(kind: str) -> frozenset[str]:
    config = OfKind(DATASETS).config(kind)
    assert issubclass(config, DataConfig)
    return config.gives


def _mask_faults(config: RunConfig) -> Iterator[str]:
    if masks := config.request.masks:
        _, height, width = masks.grid
        masked = int(masks.ratio * height * width)
        if not 0 < masked < height * width:
            yield (
                f"mask.ratio: {masks.ratio} of the {height * width} tokens of a slice masks {masked}; at least one "
                "must be masked and one visible"
            )


def _batch_faults(config: RunConfig) -> Iterator[str]:
    batch = config.batch
    fixed = (batch.micro_batch_size or 1) * (batch.grad_accum_steps or 1)
    if batch.size % fixed:
        yield (
            f"batch.size: {batch.size} is not a multiple of {_factors(config)} for any number of ranks; "
            f"the nearest sizes are {_nearest_multiples(batch.size, fixed)}"
        )


def check_batch(config: RunConfig, world_size: int) -> tuple[int, int]:
    """`(micro_batch_size, grad_accum_steps)` whose product with `world_size` is `batch.size`.

    What the config leaves out is derived (both missing: one micro batch a step).

    Raises:
        ConfigError: the numbers conflict; the sentence proposes the nearest ones that fit.
    """
    batch = config.batch
    unit = (batch.micro_batch_size or 1) * (batch.grad_accum_steps or 1) * world_size
    rest, remainder = divmod(batch.size, unit)
    complete = batch.micro_batch_size is not None and batch.grad_accum_steps is not None
    if remainder or (complete and rest != 1):
        raise ConfigError(_batch_conflict(config, world_size, unit))
    if batch.micro_batch_size is None:
        micro, accumulation = rest, batch.grad_accum_steps or 1
    else:
        micro, accumulation = batch.micro_batch_size, batch.grad_accum_steps or rest
    if micro % config.request.samples:
        raise ConfigError(
            f"a forward pass has {micro} samples, not a multiple of mask.per_clip {config.request.samples}; "
            "change batch.micro_batch_size or batch.size"
        )
    return micro, accumulation


def _batch_conflict(config: RunConfig, world_size: int, unit: int) -> str:
    batch = config.batch
    parts = " x ".join(part for part in (_factors(config), f"{world_size} ranks") if part)
    per_rank, uneven = divmod(batch.size, world_size)
    proposals = []
    if batch.micro_batch_size and batch.grad_accum_steps:
        conflict = f"batch.size {batch.size} is not {parts} = {unit}"
        proposals.append(f"batch.size {unit}")
        if not uneven and per_rank % batch.micro_batch_size == 0:
            proposals.append(f"batch.grad_accum_steps {per_rank // batch.micro_batch_size}")
    else:
        product = f" = {unit}" if unit != world_size else ""
        conflict = f"batch.size {batch.size} is not a multiple of {parts}{product}"
        proposals.append(f"batch.size {_nearest_multiples(batch.size, unit)}")
        for name in ("micro_batch_size", "grad_accum_steps"):
            value = getattr(batch, name)
            if value and not uneven:
                proposals.append(f"batch.{name} {_nearest_divisor(per_rank, value)}")
    if uneven:
        proposals.append(f"{_nearest_divisor(batch.size, world_size)} ranks")
    return f"{conflict}; nearest that fits: {', or '.join(proposals)}"


def _factors(config: RunConfig) -> str:
    parts = (("micro_batch_size", config.batch.micro_batch_size), ("grad_accum_steps", config.batch.grad_accum_steps))
    return " x ".join(f"{name} {value}" for name, value in parts if value)


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _nearest_divisor(value: int, wanted: int) -> int:
    return min((n for n in range(1, value + 1) if value % n == 0), key=lambda n: (abs(n - wanted), n))


def _deepspeed_faults(config: RunConfig) -> Iterator[str]:
    for key in config.deepspeed:
        if key in OWNED_DEEPSPEED_KEYS:
            yield f"deepspeed.{key}: this config decides that itself; use {OWNED_DEEPSPEED_KEYS[key]} instead"
        elif key not in KNOWN_DEEPSPEED_KEYS:
            hint = nearest(key, KNOWN_DEEPSPEED_KEYS | OWNED_DEEPSPEED_KEYS.keys()) or "; its JSON reference lists them"
            yield f"deepspeed.{key}: DeepSpeed knows no such key{hint}"
    zero = config.deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        yield (
            f"deepspeed.zero_optimization: got {json.dumps(zero)}; it must be an object whose stage is 0, 1, 2 or 3, "
            'e.g. {"stage": 1}'
        )

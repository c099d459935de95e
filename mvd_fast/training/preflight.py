"""Before a run starts: which checkpoint it goes on from, and warnings about settings that cost time."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from mvd_fast.config.base import flat
from mvd_fast.config.run import RunConfig
from mvd_fast.errors import UserError
from mvd_fast.files import CONFIG
from mvd_fast.machine import has_fast_bf16

from . import checkpoint, launch

log = logging.getLogger(__name__)


def find_start(config: RunConfig, resume: str, class_names: Sequence[str] = ()) -> Path | None:
    """The checkpoint to go on from, None for a fresh start (collective); see `checkpoint.find_start`.

    class_names: of the data, which must be those of the checkpoint.

    Rank 0 verifies and warns; the others follow it, also in refusing.
    """
    found: Path | UserError | None = None
    if launch.rank() == 0:
        try:
            found = checkpoint.find_start(config.output_dir, resume)
            if found:
                checkpoint.require_classes(found, class_names)
                warn_of_changes(config)
            else:  # a run cannot change its stage later
                warn_of_zero_alone(config, launch.world_size())
            warn_of_slow_bf16(config)
        except UserError as error:
            found = error
    found = launch.broadcast(found)
    if isinstance(found, UserError):
        found.everywhere = True
        raise found
    return found


def warn_of_changes(config: RunConfig) -> None:
    """Names the settings that differ from those the run was started with."""
    saved = Path(config.output_dir) / CONFIG
    if not saved.exists():
        return
    before, now = flat(json.loads(saved.read_text(encoding="utf-8"))), flat(config.model_dump(mode="json"))
    changed = [f"{k} {before.get(k)} -> {now.get(k)}" for k in sorted(before | now) if before.get(k) != now.get(k)]
    if changed:
        log.warning("%s was started with other settings: %s", config.output_dir, ", ".join(changed))


def warn_of_slow_bf16(config: RunConfig) -> None:
    """Says so where bf16 is wanted of a CPU that has no arithmetic for it."""
    asked = {"precision": config.precision}
    asked |= config.precisions()
    slow = [name for name, precision in asked.items() if precision == "bf16"]
    if slow and not has_fast_bf16():
        log.warning(
            "this CPU has no bf16 arithmetic, and is many times faster in float32: %s",
            " ".join(f"--set {name}=fp32" for name in slow),
        )


def warn_of_zero_alone(config: RunConfig, ranks: int) -> None:
    """Says so where there is nobody to share with, and DeepSpeed's bf16 step is used instead of MasterAdamW's."""
    offloads = "offload_optimizer" in config.deepspeed.get("zero_optimization", {})
    if ranks == 1 and config.precision == "bf16" and config.zero_stage in (1, 2) and not offloads:
        log.warning(
            "ZeRO %d shares nothing on one rank; without it the step takes less time and memory (measured on CPUs): "
            "start with --set deepspeed.zero_optimization.stage=0, as a resumed run cannot change it",
            config.zero_stage,
        )

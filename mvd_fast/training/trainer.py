"""The training loop: fetch -> forward and backward -> step -> log, on DeepSpeed's engine, resumable at any update."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvd_fast.config import RunConfig
from mvd_fast.config_file import check_batch, save_config
from mvd_fast.data import build_loader
from mvd_fast.errors import UserError
from mvd_fast.files import BEST, SUMMARY, WEIGHTS, write_text
from mvd_fast.interop.storage import classes_metadata
from mvd_fast.machine import has_fast_bf16
from mvd_fast.names import printable
from mvd_fast.objectives import build_objective
from mvd_fast.targets.ahead import targets_ahead
from mvd_fast.targets.store import open_targets
from mvd_fast.teachers import DTYPES

from . import checkpoint, launch
from .ema import WeightAverage
from .engine import backward, full_weights, local_gradient_norm, start_engine
from .finite import FiniteCheck, NonFiniteLossError
from .metrics import LossWindow, PhaseTimer, ProgressLine, RunLog, measure_peak
from .optim import learning_rate, set_lr
from .preemption import PreemptionHandler

log = logging.getLogger(__name__)

# A network, the module that it uses, and what takes a line on the progress -> `top1` and other facts (collective).
Validate = Callable[[Callable[[Tensor], Tensor], nn.Module, Callable[[str], None]], dict[str, Any]]


class Trainer:
    """One run of one config on this rank. `fit()` trains to the end of the schedule, or to SIGTERM."""

    def __init__(self, config: RunConfig, resume: str = "auto", validate: Validate | None = None) -> None:
        """resume: "auto" (the newest valid checkpoint of the run, if any), "never", or a checkpoint's path.

        validate: is called after each epoch; for configs with an `evaluation.list`, and no others.
        """
        if bool(config.evaluation.list) != (validate is not None):
            raise ValueError(f"evaluation.list is {config.evaluation.list!r}, and validate is {validate!r}")
        self.config = config
        self.rank, self.world_size = launch.rank(), launch.world_size()
        self.run_dir = Path(config.output_dir)
        self.micro, self.accumulation = check_batch(config, self.world_size)
        self.device = launch.device()
        start = self._find_start(resume)
        targets = open_targets(config, self.device)
        self.loader = build_loader(
            config, self.rank, self.world_size, self.device, self.micro, self.accumulation, targets
        )
        self.class_names: tuple[str, ...] = getattr(self.loader.spec.kind, "class_names", ())
        self.metadata = classes_metadata(self.class_names)  # of all weights that are written
        if start:
            checkpoint.require_classes(start, self.class_names)
        self.per_epoch = self.loader.updates_per_epoch
        self.total = config.optim.epochs * self.per_epoch
        self._build_engine()
        self.average = WeightAverage(self.engine, config.optim.ema) if config.optim.ema else None
        self.validate = validate
        self.update, self._earlier, self.window = 0, {}, LossWindow(0)
        self.best: dict[str, Any] = {}  # of all validations
        if start:
            self.update, state = checkpoint.load(self.engine, start, config.precision)
            self.window.restore(state, self.device)
            self.best = state.get("best", {})
            if self.average:
                self.average.restore(state.get("average"), start)
            self._earlier = _read_summary(self.run_dir)
        self.timer = PhaseTimer(self.device)
        self._watch_phases()
        self._stop = PreemptionHandler(self.device)
        self._finite = FiniteCheck()

    def _find_start(self, resume: str) -> Path | None:
        """Rank 0 verifies, the others follow, also in refusing."""
        found: Path | UserError | None = None
        if self.rank == 0:
            try:
                found = checkpoint.find_start(self.run_dir, resume)
                if found:
                    _warn_of_changes(self.config, self.run_dir)
                else:  # a run cannot change its stage later
                    _warn_of_zero_alone(self.config, self.world_size)
                _warn_of_slow_bf16(self.config)
            except UserError as error:
                found = error
        found = launch.broadcast(found)
        if isinstance(found, UserError):
            raise found
        return found

    def _build_engine(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.objective = build_objective(config)
        network = self.objective.model
        self._parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        # Frozen tables would be rounded to the engine's precision; exports take them from here.
        self._tables = {n: p.detach().clone() for n, p in network.named_parameters() if not p.requires_grad}
        self.engine = start_engine(network, config, self.micro, self.accumulation)
        self.engine.checkpoint_engine = checkpoint.SafeTorchEngine(self.engine._config)
        self.objective.model = self.engine
        self.objective.to(self.device)  # teachers: outside the engine

    def _watch_phases(self) -> None:
        for name, child in self.objective.named_children():
            self.timer.watch(name if name != "model" else "forward", child)

    def fit(self) -> bool:
        """Trains; returns whether the schedule was finished (False: stopped by SIGTERM after saving)."""
        config, lead = self.config, self.rank == 0
        if lead:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, self.run_dir / "config.json")
        self.run_log = RunLog(self.run_dir, self.update, config.log.tensorboard) if lead else None
        self.peak = measure_peak(self.device, DTYPES[config.precision]) if lead else 0.0
        self.objective.train()
        try:
            with ProgressLine(config.name, self.total, self.update, enabled=lead) as self.progress:
                finished = self._loop()
            if finished:
                self._export()
            self._write_summary(finished)
            return finished
        finally:
            self._summarise_bad_files()
            self.loader.close()
            if self.run_log:
                self.run_log.close()

    def _loop(self) -> bool:
        batches = self._batches()
        if self.config.teachers.ahead:
            batches = targets_ahead(self.objective, batches, self.device)
        while self.update < self.total:
            set_lr(self.engine.optimizer, self._lr(self.update))
            last = self.update + 1 == self.total
            logged = last or (self.update + 1) % self.config.log.every == 0
            for number in range(self.accumulation):
                self.window.add(self._micro_step(next(batches), number, logged))
            self.update += 1
            if self.average:
                self.average.follow(self.engine)
            if logged:
                self._log()
            else:
                self.progress.advance()
            if self.validate and self.update % self.per_epoch == 0:
                self._validate()
            stop = self._stop.requested() and not last
            if stop or last or self._is_save_due():
                self._save()
            if stop:
                return False
        return True

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Those of the updates that are still to be made."""
        batches = self.loader.batches(self.update)
        for _ in range((self.total - self.update) * self.accumulation):
            with self.timer.phase("data"):
                batch = next(batches)
            yield batch

    def _validate(self) -> None:
        """One view of every video of `evaluation.list` (collective); the best weights so far are kept."""
        with self.timer.phase("validation"):
            network = self.average.network(self.engine) if self.average else self.engine.module
            found = self.validate(network, self.engine.module, self.progress.tell)
            found |= {"update": self.update, "epoch": self.update // self.per_epoch}
            if found["top1"] > self.best.get("top1", -1.0):
                self.best = found
                weights = self._trained_weights()
                if self.rank == 0:
                    checkpoint.write_weights(weights, self.run_dir / BEST, self.metadata)
        if self.rank == 0:
            self.run_log.write({"update": self.update, "validation": found})
        self.progress.say(f"epoch {found['epoch']}: validation top-1 {found['top1']:.2%}, best {self.best['top1']:.2%}")

    def _lr(self, update: int) -> float:
        return learning_rate(update, self.per_epoch, self.config.optim, self.config.batch.size)

    def _micro_step(self, batch: dict[str, Tensor], number: int, logged: bool) -> dict[str, Tensor]:
        # Drop path is a function of (seed, update, micro batch, rank): a resumed run draws the same.
        torch.manual_seed(step_seed(self.config.seed, self.update, number, self.rank))
        out = self.objective(batch)
        last = number + 1 == self.accumulation
        self._finite.add(out["loss"], batch["index"])
        if last:
            self._finite.begin()
        with self.timer.phase("backward"):
            backward(self.engine, out["loss"])
        if last and self._finite.failed():
            self._stop_non_finite()
        if logged and last:
            self._norm = local_gradient_norm(self.engine)
        with self.timer.phase("optimizer"):
            self.engine.step()
        return out

    def _stop_non_finite(self) -> None:
        """Every rank leaves here together."""
        found = self._finite.describe(self.update, self.loader.names)
        raise NonFiniteLossError(
            f"{found}; the update was not made. Last good checkpoint: {self._last_good()}. Look at these files; "
            "resume with a lower optim.base_lr or with optim.clip_grad, or start anew in fp32."
        )

    def _last_good(self) -> str:
        """Of the run's checkpoints, for a sentence (collective): rank 0 reads them."""
        return launch.broadcast(str(checkpoint.newest_valid(self.run_dir) or "none yet") if self.rank == 0 else "")

    def _is_save_due(self) -> bool:
        every = self.config.checkpoint.every_updates or self.per_epoch
        return self.update % every == 0

    def _save(self) -> None:
        with self.timer.phase("checkpoint"):
            weights = self._full_weights()
            state = {"first": self.window.first, "sums": self._over_ranks(self.window.sums)}
            if self.validate:
                state["best"] = self.best
            if self.average:
                state["average"] = self.average.state()
            keep, precision = self.config.checkpoint.keep_last, self.config.precision
            place = self.run_dir, self.update, precision, keep
            checkpoint.save(self.engine, weights, state, *place, self.metadata)
            self._write_summary(finished=self.update == self.total)

    def _full_weights(self) -> dict[str, Tensor]:
        """The network's float32 weights on rank 0 (collective), refused on all ranks where they are not finite.

        A finite loss may have gradients that are not; what they spoiled must not replace a good checkpoint.
        """
        weights, spoiled = full_weights(self.engine, self._tables, keep=self.rank == 0)
        if spoiled:
            raise NonFiniteLossError(
                f"{len(spoiled)} parameters are not finite after update {self.update} ({spoiled[0]}, ...), so nothing "
                f"was saved. Last good checkpoint: {self._last_good()}. Resume with a lower optim.base_lr or with "
                "optim.clip_grad."
            )
        return weights

    def _export(self) -> None:
        """The trained network's weights, where the next stage looks for them."""
        weights = self._trained_weights()
        if self.rank == 0:
            checkpoint.write_weights(weights, self.run_dir / WEIGHTS, self.metadata)

    def _trained_weights(self) -> dict[str, Tensor]:
        """What is validated and exported (collective): the averaged weights where there are any."""
        weights = self._full_weights()
        return weights | self.average.state() if self.average and self.rank == 0 else weights

    def _over_ranks(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Means over the ranks, fetched from the device in one go (collective)."""
        if not losses:
            return {}
        return dict(zip(losses, launch.mean(torch.stack(list(losses.values()))).tolist(), strict=True))

    def _write_summary(self, finished: bool) -> None:
        """What was reached, and every file that was replaced, over all ranks and since the run's first start."""
        found = launch.all_gather((self.loader.bad_files, self.loader.replaced))
        if self.rank:
            return
        bad_files = dict(self._earlier.get("bad_files", {}))
        for files, _ in found:
            bad_files |= files
        summary = {
            "finished": finished,
            "update": self.update,
            "updates": self.total,
            "parameters": self._parameters,
            "replaced_samples": self._earlier.get("replaced_samples", 0) + sum(replaced for _, replaced in found),
            "bad_files": bad_files,
            **({"best": self.best} if self.validate else {}),
            **({"classes": self.class_names} if self.class_names else {}),
        }
        write_text(self.run_dir / SUMMARY, json.dumps(summary, indent=1))

    def _log(self) -> None:
        """One record: losses are means over the updates since the last one, over micro batches and ranks."""
        updates = self.update - self.window.first
        sums, seconds = self.window.close(self.update)
        losses = {name: value / (updates * self.accumulation) for name, value in self._over_ranks(sums).items()}
        norm = self.engine.get_global_grad_norm() if self._norm is None else self._norm
        phases = self.timer.collect()
        clips = updates * self.config.batch.size / self.config.data.masks_per_clip
        record = {
            "update": self.update,
            "epoch": self.update / self.per_epoch,
            **losses,
            "lr": self._lr(self.update - 1),
            "grad_norm": None if norm is None else float(norm),
            "clips_per_second": clips / seconds,
            "data_wait_share": phases.get("data", 0.0) / seconds,
            "seconds": seconds,
            "phase_seconds": phases,
            "skipped_updates": self.engine.skipped_steps,
            "bad_files": len(self.loader.bad_files),
            "replaced_samples": self.loader.replaced,
        }
        if self.rank == 0:
            flops = clips / self.world_size * self.objective.flops()
            record["model_flop_utilisation"] = flops / seconds / self.peak
            record["peak_flops"] = self.peak
            self.run_log.write(record)
        self.progress.advance(_note(record))

    def _summarise_bad_files(self) -> None:
        if self.loader.bad_files:
            found = sorted(self.loader.bad_files.items())
            names = "\n".join(f"  {printable(path)}: {reason}" for path, reason in found)
            log.warning(
                "rank %d replaced %d samples of %d bad files:\n%s",
                self.rank, self.loader.replaced, len(self.loader.bad_files), names,
            )  # fmt: skip


def step_seed(seed: int, update: int, micro: int, rank: int) -> int:
    """The seed of one micro batch's random numbers on one rank, a 64-bit hash of its arguments."""
    return int(np.random.SeedSequence((seed, update, micro, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _warn_of_changes(config: RunConfig, run_dir: Path) -> None:
    """Names the settings that differ from those the run was started with."""
    saved = run_dir / "config.json"
    if not saved.exists():
        return
    before, now = _flat(json.loads(saved.read_text(encoding="utf-8"))), _flat(config.model_dump(mode="json"))
    changed = [f"{k} {before.get(k)} -> {now.get(k)}" for k in sorted(before | now) if before.get(k) != now.get(k)]
    if changed:
        log.warning("%s was started with other settings: %s", run_dir, ", ".join(changed))


def _warn_of_slow_bf16(config: RunConfig) -> None:
    """Says so where bf16 is wanted of a CPU that has no arithmetic for it."""
    asked = {"precision": config.precision}
    for role in () if config.teachers.cache.path else ("image", "video"):
        if teacher := getattr(config.teachers, role):
            asked[f"teachers.{role}.precision"] = teacher.precision
    slow = [name for name, precision in asked.items() if precision == "bf16"]
    if slow and not has_fast_bf16():
        log.warning(
            "this CPU has no bf16 arithmetic, and is many times faster in float32: %s",
            " ".join(f"--set {name}=fp32" for name in slow),
        )


def _warn_of_zero_alone(config: RunConfig, ranks: int) -> None:
    """Says so where there is nobody to share with, and DeepSpeed's bf16 update is used instead of MasterAdamW's."""
    offloads = "offload_optimizer" in config.deepspeed.get("zero_optimization", {})
    if ranks == 1 and config.precision == "bf16" and config.zero_stage in (1, 2) and not offloads:
        log.warning(
            "ZeRO %d shares nothing on one rank; without it the update takes less time and memory (measured on CPUs): "
            "start with --set deepspeed.zero_optimization.stage=0, as a resumed run cannot change it",
            config.zero_stage,
        )


def _read_summary(run_dir: Path) -> dict[str, Any]:
    """The summary that the newest checkpoint's save left; empty where there is none."""
    file = run_dir / SUMMARY
    return json.loads(file.read_text()) if file.exists() else {}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _note(record: dict[str, Any]) -> str:
    losses = " ".join(f"{k} {record[k]:.4f}" for k in record if k.startswith("loss"))
    return f"{losses}  {record['clips_per_second']:.0f} clips/s  waits for data {record['data_wait_share']:.0%}"

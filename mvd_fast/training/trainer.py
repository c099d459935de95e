"""The training loop: fetch -> forward and backward -> step -> log, on DeepSpeed's engine, resumable at any step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvd_fast.config.load import save_config
from mvd_fast.convert.storage import run_metadata
from mvd_fast.files import BEST, CONFIG, WEIGHTS
from mvd_fast.tasks import Validate

from . import checkpoint, launch, messages, preflight
from .ema import ModelEMA
from .engine import backward, full_weights, local_gradient_norm, start_engine
from .finite import FiniteCheck, NonFiniteLossError
from .metrics import Metrics
from .optim import learning_rate, set_lr
from .preemption import PreemptionHandler
from .prepare import Prepared
from .profiler import Profiler
from .summary import RunSummary


class Trainer:
    """One run of one config on this rank. `fit()` trains to the end of the schedule, or to SIGTERM."""

    def __init__(
        self, prepared: Prepared, resume: str = "auto", validate: Validate | None = None, profile: bool = False
    ) -> None:
        """resume: "auto" (the newest valid checkpoint of the run, if any), "never", or a checkpoint's path.

        validate: is called after each epoch, if given. profile: see `Profiler`.
        """
        self._started = time.monotonic()
        config = prepared.config
        self.config, self.validate, self.profile = config, validate, profile
        self.run_dir = Path(config.output_dir)
        self.device, self.loader, self.task = prepared.device, prepared.loader, prepared.task
        self.micro_batch_size, self.grad_accum_steps = prepared.micro_batch_size, prepared.grad_accum_steps
        self.class_names = prepared.class_names
        start = preflight.find_start(config, resume, self.class_names)
        self.steps_per_epoch, self.total_steps = prepared.steps_per_epoch, prepared.total_steps
        self._build_engine()
        self.ema = ModelEMA(self.engine, config.optim.ema) if config.optim.ema else None
        self.metrics = Metrics(config, self.task, self.grad_accum_steps, self.device)
        self.summary = RunSummary(self.run_dir, self.loader, resumed=start is not None)
        self.finite, self.preemption = FiniteCheck(), PreemptionHandler(self.device)
        self.step = 0  # steps done
        self.best: dict[str, Any] = {}  # of all validations
        if start:
            self.step, state = checkpoint.load(self.engine, start, config.precision)
            self.load_state_dict(state, start)
        if launch.rank() == 0:
            messages.say(*messages.outline(prepared, messages.start_of(config, start, self.step, self.steps_per_epoch)))

    def _build_engine(self) -> None:
        network = self.task.network
        self._parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        # Frozen tables would be rounded to the engine's precision; exports take them from here.
        self._tables = {n: p.detach().clone() for n, p in network.named_parameters() if not p.requires_grad}
        self.engine = start_engine(network, self.config, self.micro_batch_size, self.grad_accum_steps)
        self.engine.checkpoint_engine = checkpoint.SafeTorchEngine(self.engine._config)
        self.task.to(self.device)  # what is frozen: outside the engine

    # ---- the loop ----

    def fit(self) -> bool:
        """Trains; returns whether the schedule was finished (False: stopped by SIGTERM after saving)."""
        if launch.rank() == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.run_dir / CONFIG)
        self.task.train()
        try:
            with self.metrics.open(self.run_dir, self.step, self.total_steps), self._profiler() as profiler:
                finished = self._loop(profiler)
            if finished:
                self._export(WEIGHTS)
            self._write_summary(finished)
            if launch.rank() == 0:
                messages.say(*self._last_words(finished))
            return finished
        finally:
            self.summary.warn_of_bad_files()
            self.loader.close()

    def _loop(self, profiler: Profiler) -> bool:
        batches = self._batches()
        while self.step < self.total_steps:
            self.train_step(batches)
            profiler.step()
            if self.validate and self.step % self.steps_per_epoch == 0:
                self._validate()
            last = self.step == self.total_steps
            stop = self.preemption.requested() and not last
            if stop or last or self._is_save_due():
                self._save()
            if stop:
                return False
        return True

    def train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """One step from the next `grad_accum_steps` micro batches, none where a loss is not finite; logs it."""
        logs = self.step == 0 or self._is_last_or_due(self.config.log.every)
        set_lr(self.engine.optimizer, self._lr())
        for number in range(self.grad_accum_steps):
            if number:
                self.engine.step()  # DeepSpeed counts micro batches by it; only the last one steps
            self._forward_backward(next(batches), number)
        if self.finite.failed():
            self._stop_non_finite()
        facts = {"lr": self._lr(), "grad_norm": local_gradient_norm(self.engine)} if logs else {}
        with self.metrics.phase("optimizer"):
            self.engine.step()
        self.step += 1
        if self.ema:
            self.ema.update(self.engine)
        if logs:
            self._log(facts)
        else:
            self.metrics.progress.advance()

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Those of the steps that are still to be made."""

        def fetched() -> Iterator[dict[str, Tensor]]:
            batches = self.loader.batches(self.step)
            for _ in range((self.total_steps - self.step) * self.grad_accum_steps):
                with self.metrics.phase("data"):
                    batch = next(batches)
                yield batch

        return self.task.batches(fetched(), self.device)

    def _forward_backward(self, batch: dict[str, Tensor], number: int) -> None:
        # Drop path is a function of (seed, step, micro batch, rank): a resumed run draws the same.
        torch.manual_seed(step_seed(self.config.seed, self.step, number, launch.rank()))
        losses = self.task.loss(self.engine, batch)
        self.finite.add(losses["loss"], batch["index"])
        if number + 1 == self.grad_accum_steps:
            self.finite.begin()
        with self.metrics.phase("backward"):
            backward(self.engine, losses["loss"])
        self.metrics.window.add(losses)

    def _lr(self) -> float:
        """Of the next step."""
        return learning_rate(self.step, self.steps_per_epoch, self.config.optim, self.config.batch.size)

    def _is_last_or_due(self, every: int) -> bool:
        """Whether the next step is the last one or an `every`-th."""
        return self.step + 1 == self.total_steps or (self.step + 1) % every == 0

    def _profiler(self) -> Profiler:
        left = self.total_steps - self.step
        return Profiler(self.run_dir, self.device, left, self.profile, lambda line: self.metrics.progress.say(line))

    # ---- what it says ----

    def _last_words(self, finished: bool) -> list[str]:
        if finished:
            return messages.finished(self.config, self.total_steps, time.monotonic() - self._started, self.best)
        return messages.stopped(self.config, self.step, self.total_steps)

    def _log(self, facts: dict[str, Any]) -> None:
        norm = facts["grad_norm"]
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        facts |= {
            "grad_norm": None if norm is None else float(norm),
            "skipped_steps": self.engine.skipped_steps,
            "bad_files": len(self.loader.bad_files),
            "replaced_samples": self.loader.replaced,
        }
        self.metrics.log(self.step, self.step / self.steps_per_epoch, facts)

    def _validate(self) -> None:
        """One view of every video of `evaluation.list` (collective); the best weights so far are kept."""
        with self.metrics.phase("validation"):
            network = self.ema.network(self.engine) if self.ema else self.engine.module
            found = self.validate(network, self.engine.module, self.metrics.progress.tell)
            found |= {"step": self.step, "epoch": self.step // self.steps_per_epoch}
            if found["top1"] > self.best.get("top1", -1.0):
                self.best = found
                self._export(BEST)
        self.metrics.write({"step": self.step, "validation": found})
        self.metrics.progress.say(
            f"epoch {found['epoch']}: validation top-1 {found['top1']:.2%}, best {self.best['top1']:.2%}"
        )

    def _write_summary(self, finished: bool) -> None:
        facts = {
            "finished": finished,
            "step": self.step,
            "steps": self.total_steps,
            "parameters": self._parameters,
            **({"best": self.best} if self.validate else {}),
            **({"classes": self.class_names} if self.class_names else {}),
        }
        self.summary.write(facts)

    def _stop_non_finite(self) -> None:
        """Every rank leaves here together."""
        found = self.finite.describe(self.step, self.loader.names)
        raise NonFiniteLossError(
            f"{found}; the step was not made. Last good checkpoint: {self._last_good()}. Look at these files; "
            "resume with a lower optim.base_lr or with optim.clip_grad, or start anew in fp32; --anomaly names the "
            "operation whose gradient is not finite."
        )

    def _last_good(self) -> str:
        """Of the run's checkpoints, for a sentence (collective): rank 0 reads them."""
        return launch.broadcast(str(checkpoint.newest_valid(self.run_dir) or "none yet") if launch.rank() == 0 else "")

    # ---- what it keeps ----

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the engine's state (collective)."""
        return {
            **self.metrics.state_dict(),
            **({"best": self.best} if self.validate else {}),
            **({"average": self.ema.state_dict()} if self.ema else {}),
        }

    def load_state_dict(self, state: dict[str, Any], source: Path) -> None:
        """source: the checkpoint, for sentences."""
        self.metrics.load_state_dict(state)
        self.best = state.get("best", {})
        if self.ema:
            self.ema.load_state_dict(state.get("average"), source)

    def _is_save_due(self) -> bool:
        return self.step % (self.config.checkpoint.every_steps or self.steps_per_epoch) == 0

    def _save(self) -> None:
        config = self.config
        with self.metrics.phase("checkpoint"):
            weights, state = self._full_weights(), self.state_dict()
            where = self.run_dir, self.step, config.precision, config.checkpoint.keep_last
            checkpoint.save(self.engine, weights, state, *where, run_metadata(self.config, self.class_names))
            self._write_summary(finished=self.step == self.total_steps)

    def _export(self, name: str) -> None:
        """The trained network's weights, averaged where there is an average, for the next stage (collective)."""
        weights = self._full_weights()
        if launch.rank() == 0:
            weights |= self.ema.state_dict() if self.ema else {}
            checkpoint.write_weights(weights, self.run_dir / name, run_metadata(self.config, self.class_names))

    def _full_weights(self) -> dict[str, Tensor]:
        """The network's float32 weights on rank 0 (collective), refused on all ranks where they are not finite.

        A finite loss may have gradients that are not; what they spoiled must not replace a good checkpoint.
        """
        weights, spoiled = full_weights(self.engine, self._tables, keep=launch.rank() == 0)
        if spoiled:
            raise NonFiniteLossError(
                f"{len(spoiled)} parameters are not finite after step {self.step} ({spoiled[0]}, ...), so nothing "
                f"was saved. Last good checkpoint: {self._last_good()}. Resume with a lower optim.base_lr or with "
                "optim.clip_grad."
            )
        return weights


def step_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The seed of one micro batch's random numbers on one rank, a 64-bit hash of its arguments."""
    return int(np.random.SeedSequence((seed, step, micro_batch, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))

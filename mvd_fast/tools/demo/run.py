"""The demo's phases: video set, image teacher, video teacher, student, probes, report."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import mvd_fast
from mvd_fast.config.load import load_config
from mvd_fast.config.run import RunConfig
from mvd_fast.errors import INTERRUPTED, SAVED, UserError
from mvd_fast.files import SUMMARY, WEIGHTS, write_text
from mvd_fast.machine import cpu_name, has_fast_bf16
from mvd_fast.tools.demo.digits import FRAMES, MOTIONS, SIZE, DigitSet, is_written, write_digit_set
from mvd_fast.training.launcher import run_ranks

RUNS = ("image_teacher", "video_teacher", "student")


@dataclass(frozen=True)
class Size:
    """Clips written, and changes to the configs in `configs/demo/`."""

    train: int
    test: int
    changes: dict[str, dict[str, int]]


QUICK = {"optim.warmup_epochs": 1, "log.every": 10}
SIZES = {
    "full": Size(4000, 1000, {name: {} for name in RUNS}),
    "medium": Size(
        1280, 320, {name: {**QUICK, "optim.epochs": epochs} for name, epochs in zip(RUNS, (24, 12, 8), strict=True)}
    ),
    "quick": Size(
        640, 160, {name: {**QUICK, "optim.epochs": epochs} for name, epochs in zip(RUNS, (12, 3, 3), strict=True)}
    ),
}


class DemoError(UserError):
    """The demo cannot go on; the message says why and how to go on."""


class DemoStopped(DemoError):
    """Stopped by a signal, after the training in progress was saved."""

    status = SAVED


class Demo:
    """One demo in one folder. `phases.json` keeps what was done and how long it took.

    Every phase builds on those before it: once one has run, what is left of the later ones is stale and done anew.
    """

    def __init__(self, out: Path, size: str, seed: int) -> None:
        self.out, self.size, self.seed = out, size, seed
        self.console = Console(stderr=True, highlight=False)
        self.clips = DigitSet(SIZES[size].train, SIZES[size].test, seed)
        self._claim_folder()
        self._stale = False
        self._phases_file = out / "phases.json"
        self.phases: dict[str, dict[str, Any]] = (
            json.loads(self._phases_file.read_text()) if self._phases_file.exists() else {}
        )

    def _claim_folder(self) -> None:
        """One folder, one size and seed."""
        facts, mine = self.out / "demo.json", {"size": self.size, "seed": self.seed}
        if facts.exists() and (there := json.loads(facts.read_text())) != mine:
            raise DemoError(
                f"{self.out} holds a demo of size {there['size']} and seed {there['seed']}, not {self.size} and "
                f"{self.seed}; give another folder with --out, or delete this one"
            )
        write_text(facts, json.dumps(mine))

    def run(self) -> None:
        """Runs what is missing of every phase, then writes the report."""
        self._write_clips()
        for name in RUNS:
            self._train(name)
        self._evaluate()
        from mvd_fast.tools.report import write_report

        report = write_report(self.out)
        self._tell(f"report: {report}")

    def _tell(self, text: str) -> None:
        self.console.print(f"[bold]mvd-fast demo[/bold]  {text}")

    @contextmanager
    def _phase(self, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Times a phase; it counts as done when its block was left without an error."""
        self._tell(f"{name} ...")
        start = time.monotonic()
        record: dict[str, Any] = {"name": name, "run": None, **facts}
        yield record
        self._stale = True
        record["seconds"] = time.monotonic() - start + self.phases.get(name, {}).get("partial_seconds", 0.0)
        self._keep(name, record)

    def _keep(self, name: str, record: dict[str, Any]) -> None:
        self.phases[name] = record
        write_text(self._phases_file, json.dumps(self.phases, indent=1))

    def _is_done(self, name: str) -> bool:
        done = "seconds" in self.phases.get(name, {}) and not self._stale
        if done:
            self._tell(f"{name}: done before, skipped")
        return done

    def _write_clips(self) -> None:
        folder = self.out / "data"
        if is_written(folder, self.clips) and self._is_done("data"):
            return
        with self._phase("data"), Progress(console=self.console) as bar:
            task = bar.add_task(f"writing {SIZE} px VP9 clips", total=self.clips.train + self.clips.test)
            write_digit_set(folder, self.clips, lambda: bar.advance(task))

    def config(self, name: str) -> RunConfig:
        return load_config(f"demo/{name}", self._overrides(name))

    def _overrides(self, name: str) -> list[str]:
        places = {
            "run_dir": self.out / name,
            "data.train": self.out / "data" / "train.txt",
            "seed": self.seed,
            **SIZES[self.size].changes[name],
        }
        if name == "student":
            places["targets.image.checkpoint"] = self.out / "image_teacher" / WEIGHTS
            places["targets.video.checkpoint"] = self.out / "video_teacher" / WEIGHTS
            if not has_fast_bf16():
                places |= {f"targets.{teacher}.precision": "fp32" for teacher in ("image", "video")}
        return [f"{key}={json.dumps(value if isinstance(value, int) else str(value))}" for key, value in places.items()]

    def _train(self, name: str) -> None:
        """Trains by the real launcher, as a user would; an unfinished run is resumed."""
        title, run_dir, config = name.replace("_", " "), self.out / name, self.config(name)
        if self._stale_run(run_dir, config):
            self.phases.pop(title, None)
            shutil.rmtree(run_dir, ignore_errors=True)
        elif _summary(run_dir).get("finished") and self._is_done(title):
            return
        with self._phase(title, run=name, batch=config.batch.size) as record:
            self._launch(name)
            summary = _summary(run_dir)
            record.update(steps=summary["steps"], parameters=summary["parameters"])

    def _stale_run(self, run_dir: Path, config: RunConfig) -> bool:
        """Whether a run folder is of another config, or of inputs that were made anew: it must not be resumed."""
        saved = run_dir / "config.json"
        same = saved.exists() and json.loads(saved.read_text()) == config.model_dump(mode="json")
        return self._stale or not same

    def _launch(self, name: str) -> None:
        script = Path(mvd_fast.__file__).with_name("train.py")
        arguments = ["--config", f"demo/{name}", "--set", *self._overrides(name)]
        start, title = time.monotonic(), name.replace("_", " ")
        status = INTERRUPTED
        try:
            # So small a network gains nothing from a second thread; the decoder has the other half of the cores.
            status = run_ranks(1, script, arguments, threads=max(1, len(os.sched_getaffinity(0)) // 2))
        finally:
            if status:
                spent = self.phases.get(title, {}).get("partial_seconds", 0.0) + time.monotonic() - start
                self._keep(title, {"partial_seconds": spent})
        again = "`mvd-fast demo` with the same options goes on from there"
        if status == SAVED:
            raise DemoStopped(f"training the {title} was interrupted; {again}")
        if status:
            raise DemoError(f"training the {title} failed with status {status}, see above; {again}")

    def _evaluate(self) -> None:
        results = self.out / "results.json"
        if results.exists() and self._is_done("probes"):
            return
        from mvd_fast.tools.demo.evaluate import evaluate

        with self._phase("probes"):
            measured = evaluate(self.config("student"), self.config("video_teacher"), self.out, self.console)
        write_text(results, json.dumps({**self._facts(), **measured}, indent=1))

    def _facts(self) -> dict[str, Any]:
        folder = self.out / "data"
        return {
            "size": self.size,
            "seed": self.seed,
            "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
            "versions": {name: version(name) for name in ("mvd-fast", "torch", "deepspeed", "nvidia-dali-cuda130")},
            "data": {
                "clips": self.clips.train,
                "test_clips": self.clips.test,
                "bytes": sum(file.stat().st_size for file in folder.rglob("*.webm")),
                "codec": "VP9",
                "frame": SIZE,
                "frames": FRAMES,
                "motions": list(MOTIONS),
            },
            "phases": list(self.phases.values()),
        }


def _summary(run_dir: Path) -> dict[str, Any]:
    file = run_dir / SUMMARY
    return json.loads(file.read_text()) if file.exists() else {}

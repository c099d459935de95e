"""Costs and savings of the recipes that need less work, on the demo's task: `python benchmarks/recipes.py FOLDER`.

FOLDER is that of a finished `mvd-fast demo`; its clips and teachers are used. Trains a student with each
recipe and three seeds, all with the same number of steps of the same number of student samples. Writes
recipes.json, recipes.md and recipes.png: linear probes of the student (centre clips, test list), the final training
loss, and the seconds of training, without starting up. What is there already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from less_work import HALF, INT8, MASKS
from spread import spread

from mvd_fast.config.load import load_config
from mvd_fast.config.run import RunConfig
from mvd_fast.convert.weights import load_into, read_weights
from mvd_fast.evaluation.features import clip_features
from mvd_fast.evaluation.probe import linear_probe
from mvd_fast.files import SUMMARY, WEIGHTS, write_text
from mvd_fast.tasks import build_task
from mvd_fast.tools.demo.evaluate import LABELS, clip_labels

RECIPES: dict[str, tuple[str, ...]] = {
    "exact": (),
    "8-bit teachers": INT8,
    "4 masks per clip": MASKS,
    "stored targets, 2 views": ("teachers.cache.views=2",),
    "half of the tokens": HALF,
    "8-bit, 4 masks, half": (*INT8, *MASKS, *HALF),
}
SEEDS = 3


def configure(demo: Path, recipe: str, seed: int) -> tuple[str, list[str]]:
    """The config's file and overrides of one run."""
    base = demo / "student" / "config.json"
    changes = RECIPES[recipe]
    run_dir = demo / "recipes" / f"{recipe.replace(' ', '_').replace(',', '')}_{seed}"
    overrides = [*changes, f"seed={seed}", f"run_dir={json.dumps(str(run_dir))}"]
    if "teachers.cache.views=2" in changes:
        overrides.append(f"teachers.cache.path={json.dumps(str(run_dir / 'targets'))}")
    if set(MASKS) <= set(changes):  # a quarter of the epochs, so that the samples are as many
        optim = load_config(str(base)).optim
        warmup = max(1, round(optim.warmup_epochs / 4))
        overrides += [f"optim.epochs={round(optim.epochs / 4)}", f"optim.warmup_epochs={warmup}"]
    return str(base), overrides


def train(demo: Path, recipe: str, seed: int) -> RunConfig:
    """Runs the command line, as a user would; the store of targets first, where there is one."""
    file, overrides = configure(demo, recipe, seed)
    config = load_config(file, overrides)
    summary = Path(config.output_dir) / SUMMARY
    if summary.exists() and json.loads(summary.read_text())["finished"]:
        return config
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    commands = [["train"]]
    if config.teachers.cache.path:
        commands.insert(0, ["teachers", "cache"])
    for command in commands:
        line = [sys.executable, "-m", "mvd_fast.cli", *command, "--config", file]
        for override in overrides:
            line += ["--set", override]
        subprocess.run(line, env=environment, check=True)
    return config


def measure(config: RunConfig) -> dict[str, float]:
    """Probes of the trained student, its last loss, seconds of training and student samples per second."""
    demo_data = Path(config.data.train).parent
    student = build_task(config.as_written()).eval().network
    weights = Path(config.output_dir) / WEIGHTS
    load_into(student, read_weights(weights), weights)
    features, labels = {}, {}
    for split in ("train", "test"):
        clips = str(demo_data / f"{split}.txt")
        features[split] = clip_features({"student": student.encode}, config, clips, torch.device("cpu"))
        labels[split] = clip_labels(clips, features[split])
    found = {
        label: linear_probe(
            *(part for split in ("train", "test") for part in (features[split].pooled["student"], labels[split][label]))
        ).accuracy
        for label in LABELS
    }
    records = [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]
    seconds = sum(record["seconds"] for record in records)
    samples = records[-1]["step"] * config.batch.size
    return {**found, "loss": records[-1]["loss"], "seconds": seconds, "samples_per_second": samples / seconds}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| recipe | digit, % | motion, % | loss | seconds | samples/s |", "|---|---|---|---|---|---|"]
    for recipe, runs in results.items():
        cells = [
            spread([run[key] * factor for run in runs], digits)
            for key, factor, digits in (
                ("digit", 100, 1), ("motion", 100, 1), ("loss", 1, 4), ("seconds", 1, 1), ("samples_per_second", 1, 0)
            )
        ]  # fmt: skip
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Probe accuracy and loss against the seconds of training, a point a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 4), constrained_layout=True)
    views: list[tuple[Any, str, str, float]] = [
        (axes[0], "digit", "digit probe, %", 100),
        (axes[1], "motion", "motion probe, %", 100),
        (axes[2], "loss", "last training loss", 1),
    ]
    for axis, key, title, factor in views:
        for recipe, runs in results.items():
            axis.scatter([r["seconds"] for r in runs], [r[key] * factor for r in runs], s=28, label=recipe, alpha=0.85)
        axis.set(title=title, xlabel="seconds of training", xlim=(0, None))
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    demo = parser.parse_args().demo
    results: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in RECIPES}
    for seed in range(SEEDS):  # recipes in turn, so that a change of the machine's mood meets all of them
        for recipe in RECIPES:
            results[recipe].append(measure(train(demo, recipe, seed)))
            print(seed, recipe, results[recipe][-1], flush=True)
    write_text(demo / "recipes.json", json.dumps(results, indent=1) + "\n")
    write_text(demo / "recipes.md", table(results))
    plot(results, demo / "recipes.png")
    print(table(results))


if __name__ == "__main__":
    main()

"""Action detection on two-digit clips in AVA's formats, from a demo's student and from scratch, with equal settings.

    mvd-fast demo
    python benchmarks/ava.py runs/demo

Writes the clips first. Each side's learning rate is the one of `LEARNING_RATES` that does best on the validation clips;
then it is trained with each of `SEEDS` seeds and tested once with `mvd-fast ava-evaluate`, on the boxes of a pretended
person detector. Writes `ava.json` and `ava.md`; finished runs are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from finetuning import SEEDS, train
from spread import spread

from mvd_fast.data import ava_files
from mvd_fast.evaluation.ava import frame_map
from mvd_fast.files import write_text
from mvd_fast.tools.demo.ava_digits import ACTIONS, AvaDigitSet, write_ava_digits

CLIPS = AvaDigitSet(train=800, val=300, test=400, seed=0)
LEARNING_RATES = (0.064, 0.256, 1.024)
EPOCHS = 24


def evaluate(run_dir: Path, data: Path, split: str) -> float:
    """Frame mAP of a run on a split."""
    out = run_dir / f"{split}.csv"
    line = [sys.executable, "-m", "mvd_fast.cli", "ava-evaluate", str(run_dir), "--out", str(out)]
    line += ["--annotations", str(data / f"{split}.csv"), "--excluded", str(data / f"{split}_excluded.csv")]
    line += ["--proposals", str(data / f"{split}_proposals.csv"), "--label-map", str(data / "actions.pbtxt")]
    subprocess.run([*line, "--root", str(data / "videos")], check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.with_suffix(".json").read_text())["map"]


def chance(run_dir: Path, data: Path) -> float:
    """Frame mAP of a run's test detections with random scores: mean of ten draws."""
    found = ava_files.read_detections(run_dir / "test.csv")
    truth = ava_files.read_annotations(data / "test.csv")
    excluded = ava_files.read_exclusions(data / "test_excluded.csv")
    actions, rng = ava_files.read_label_map(data / "actions.pbtxt"), np.random.default_rng(0)
    draws = [replace(found, scores=rng.random(len(found.scores))) for _ in range(10)]
    return statistics.mean(frame_map(truth, draw, actions, excluded).mean for draw in draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--out", type=Path, help="folder for clips, runs and results (default: DEMO/ava)")
    args = parser.parse_args()
    out = args.out or args.demo.resolve() / "ava"
    data = out / "data"
    if not (data / "set.json").exists():
        write_ava_digits(data, CLIPS)
    inits = {"pre-trained student": str(args.demo.resolve() / "student"), "from scratch": ""}
    lists = {
        "data.train": str(data / "train.csv"),
        "data.excluded": str(data / "train_excluded.csv"),
        "data.root": str(data / "videos"),
        "optim.epochs": EPOCHS,
    }
    results: dict[str, Any] = {"actions": len(ACTIONS), "validation": {}, "test": {side: [] for side in inits}}

    def run(side: str, lr: float, seed: int) -> Path:
        changes = lists | {"init": inits[side], "optim.base_lr": lr, "seed": seed}
        return train("demo/ava", out / f"{side.replace(' ', '_')}_{lr}_{seed}", changes)

    for side in inits:
        results["validation"][side] = {lr: evaluate(run(side, lr, 0), data, "val") for lr in LEARNING_RATES}
        print(side, results["validation"][side], flush=True)
    for seed, side in itertools.product(range(SEEDS), inits):
        tried = results["validation"][side]
        done = run(side, max(tried, key=tried.__getitem__), seed)
        results["test"][side].append(evaluate(done, data, "test"))
        results["chance"] = chance(done, data)
        print(seed, side, results["test"][side][-1], flush=True)
    write_text(out / "ava.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "ava.md", table(results))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation over the seeds, percent."""
    lines = ["| start | `base_lr` | frame mAP, % |", "|---|---|---|"]
    for side, found in results["test"].items():
        tried = results["validation"][side]
        lines.append(f"| {side} | {max(tried, key=tried.__getitem__)} | {spread([100 * value for value in found])} |")
    lines.append(f"| random scores | | {100 * results['chance']:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Fine-tuning on the demo's clips, from its pre-trained student and from scratch, with equal settings and budget.

    mvd-fast demo
    python benchmarks/finetuning.py runs/demo

Each side's learning rate and layer decay are chosen on training clips alone: trained on `CHOOSING[0]` of them, tested
on `CHOOSING[1]` others. Then each is trained on all of them with each of `SEEDS` seeds and tested once with `mvd-fast
evaluate`. Writes `finetuning.json` and `finetuning.md`; finished runs are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from spread import spread

from mvd_fast.files import SUMMARY, write_text

LEARNING_RATES = (0.004, 0.016, 0.064)
LAYER_DECAYS = (0.75, 1.0)
CHOOSING = (1600, 400)
SEEDS = 3
CHANCE = {"class": 1 / 80, "digit": 1 / 10, "motion": 1 / 8}
MOTIONS = 8  # a class is digit * 8 + motion


def split(demo: Path, folder: Path) -> tuple[Path, Path]:
    """Lists of the first `CHOOSING[0]` training clips and of the last `CHOOSING[1]`."""
    lines = (demo / "data" / "train.txt").read_text().splitlines()
    absolute = [str((demo / "data").resolve() / line) for line in lines]
    parts = {"train.txt": absolute[: CHOOSING[0]], "val.txt": absolute[-CHOOSING[1] :]}
    for name, part in parts.items():
        write_text(folder / name, "\n".join(part) + "\n")
    return folder / "train.txt", folder / "val.txt"


def train(config: str, run_dir: Path, changes: dict[str, Any]) -> Path:
    """Runs `mvd-fast finetune`, unless it has run to its end before."""
    if (run_dir / SUMMARY).exists() and json.loads((run_dir / SUMMARY).read_text())["finished"]:
        return run_dir
    line = [sys.executable, "-m", "mvd_fast.cli", "finetune", "--config", config]
    for name, value in {"run_dir": str(run_dir), **changes}.items():
        line += ["--set", f"{name}={json.dumps(value)}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run(line, env=environment, check=True)
    return run_dir


def test(run_dir: Path, clips: Path) -> dict[str, float]:
    """Shares of the test clips whose class, digit and motion are right."""
    line = [sys.executable, "-m", "mvd_fast.cli", "evaluate", str(run_dir), "--data", str(clips)]
    subprocess.run([*line, "--out", str(run_dir / "test")], check=True)
    rows = [json.loads(row) for row in (run_dir / "test" / "predictions.jsonl").read_text().splitlines()]
    pairs = [(row["label"], row["classes"][0]) for row in rows]
    parts = {"class": lambda c: c, "digit": lambda c: c // MOTIONS, "motion": lambda c: c % MOTIONS}
    return {name: statistics.mean(part(a) == part(b) for a, b in pairs) for name, part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--out", type=Path, help="folder for runs and results (default: DEMO/finetuning)")
    args = parser.parse_args()
    demo = args.demo.resolve()
    out = args.out or demo / "finetuning"
    out.mkdir(parents=True, exist_ok=True)
    inits = {"pre-trained student": str(demo / "student"), "from scratch": ""}
    train_list, val_list = split(demo, out)
    results: dict[str, Any] = {"chance": CHANCE, "validation": {}, "chosen": {}, "test": {side: [] for side in inits}}
    for side, init in inits.items():
        tried = {}
        for lr, decay in itertools.product(LEARNING_RATES, LAYER_DECAYS):
            changes = {"init": init, "optim.base_lr": lr, "optim.layer_decay": decay}
            lists = {"data.train": str(train_list), "evaluation.list": str(val_list)}
            run = train("demo/finetune", out / f"{side.replace(' ', '_')}_{lr}_{decay}", changes | lists)
            last = [json.loads(row) for row in (run / "log.jsonl").read_text().splitlines()]
            tried[lr, decay] = [row["validation"]["top1"] for row in last if "validation" in row][-1]
        results["validation"][side] = [{"base_lr": lr, "layer_decay": d, "top1": v} for (lr, d), v in tried.items()]
        results["chosen"][side] = dict(zip(("base_lr", "layer_decay"), max(tried, key=tried.__getitem__), strict=True))
        print(side, results["validation"][side], flush=True)
    for seed, side in itertools.product(range(SEEDS), inits):
        changes = {f"optim.{name}": value for name, value in results["chosen"][side].items()}
        lists = {"data.train": str(demo / "data" / "train.txt"), "evaluation.list": ""}
        whole = changes | lists | {"init": inits[side], "seed": seed}
        run = train("demo/finetune", out / f"{side.replace(' ', '_')}_seed{seed}", whole)
        results["test"][side].append(test(run, demo / "data" / "test.txt"))
        print(seed, side, results["test"][side][-1], flush=True)
    write_text(out / "finetuning.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "finetuning.md", table(results))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation over the seeds, percent."""
    lines = ["| start | `base_lr`, layer decay | class of 80 | digit | motion |", "|---|---|---|---|---|"]
    for side, runs in results["test"].items():
        cells = []
        for name in CHANCE:
            cells.append(spread([100 * run[name] for run in runs]))
        chosen = results["chosen"][side]
        lines.append(f"| {side} | {chosen['base_lr']}, {chosen['layer_decay']} | {' | '.join(cells)} |")
    lines.append(f"| chance | | {' | '.join(f'{100 * share:.1f}' for share in CHANCE.values())} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

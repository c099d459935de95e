"""Started by `deepspeed` with several ranks: trains the config given once per ZeRO stage, one after the other."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mvd_fast.config.load import load_config
from mvd_fast.training import launch
from mvd_fast.training.prepare import prepare
from mvd_fast.training.trainer import Trainer

config_file, out, *stages = sys.argv[1:]
with launch.init_process_group():
    for stage in stages:
        folder = json.dumps(str(Path(out) / f"zero{stage}"))
        settings = [f"run_dir={folder}", f"deepspeed.zero_optimization.stage={stage}"]
        assert Trainer(prepare(load_config(config_file, settings)), resume="never").fit()
if os.environ["RANK"] == "0":
    (Path(out) / "ranks.txt").write_text(os.environ["WORLD_SIZE"])

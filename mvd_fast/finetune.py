"""The script for fine-tuning: `deepspeed mvd_fast/finetune.py --config configs/finetune/k400_vitb.json`.

It is `train.py` for configs of fine-tuned networks. Also `mvd-fast finetune`, on one rank.
"""

from __future__ import annotations

import sys
from pathlib import Path

# As in train.py: started as a script, the checkout's root belongs on the path, not this folder.
_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

from collections.abc import Sequence  # noqa: E402

from mvd_fast.config.base import ConfigError  # noqa: E402
from mvd_fast.config.run import RunConfig  # noqa: E402
from mvd_fast.train import main as train  # noqa: E402


def main(argv: Sequence[str] | None = None, program: str = "mvd_fast/finetune.py") -> int:
    """As `mvd_fast.train.main`; a config that pre-trains is refused."""
    return train(argv, program, "fine-tune a network on labelled videos", _require_fine_tuning, __file__)


def _require_fine_tuning(config: RunConfig) -> None:
    if config.stage != "finetune":
        raise ConfigError(
            f"config {config.name} has task {config.task!r}, which pre-trains and has no classes; start it with "
            "mvd_fast/train.py, or give a config for fine-tuning, such as finetune/k400_vitb"
        )


if __name__ == "__main__":
    sys.exit(main(program="python -m mvd_fast.finetune" if __spec__ else "mvd_fast/finetune.py"))

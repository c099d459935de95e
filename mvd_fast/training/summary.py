"""`summary.json` of a run folder: what was reached, and every file that was replaced, since the run's first start."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mvd_fast.data.loader import Loader
from mvd_fast.files import SUMMARY, write_text
from mvd_fast.names import printable

from . import launch

log = logging.getLogger(__name__)


class RunSummary:
    """Bad files and replaced samples, over all ranks and over interruptions."""

    def __init__(self, run_dir: Path, loader: Loader, resumed: bool) -> None:
        """resumed: go on from the summary that the newest checkpoint's save left."""
        self._file, self._loader = run_dir / SUMMARY, loader
        self._earlier = json.loads(self._file.read_text(encoding="utf-8")) if resumed and self._file.exists() else {}

    def write(self, facts: dict[str, Any]) -> None:
        """`facts` and the files (collective)."""
        found = launch.all_gather((self._loader.bad_files, self._loader.replaced))
        if launch.rank():
            return
        bad_files = dict(self._earlier.get("bad_files", {}))
        for files, _ in found:
            bad_files |= files
        replaced = self._earlier.get("replaced_samples", 0) + sum(count for _, count in found)
        write_text(self._file, json.dumps({**facts, "replaced_samples": replaced, "bad_files": bad_files}, indent=1))

    def warn_of_bad_files(self) -> None:
        """Names this rank's."""
        if bad_files := self._loader.bad_files:
            names = "\n".join(f"  {printable(path)}: {reason}" for path, reason in sorted(bad_files.items()))
            log.warning(
                "rank %d replaced %d samples of %d bad files:\n%s",
                launch.rank(), self._loader.replaced, len(bad_files), names,
            )  # fmt: skip

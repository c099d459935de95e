"""What a demonstration leaves in its folder, read tolerantly: a report is worth having when a piece is missing."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mvd_fast.errors import UserError

ARRAYS = ("frames", "mask", "tubelet", "patch", "reconstruction", "digit", "motion")


@dataclass(frozen=True)
class Inputs:
    """`results` as in results.json; `logs` has a run's records by the name of its phase; `pictures` may be empty."""

    results: dict[str, Any]
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def read_inputs(out: Path) -> Inputs:
    """Reads results.json (required), `<run>/log.jsonl` of each phase and pictures.npz (where they exist).

    Raises UserError where results.json is missing or is not a JSON object.
    """
    results = read_results(out / "results.json")
    runs = {phase["name"]: phase["run"] for phase in results.get("phases") or [] if phase.get("run")}
    logs = {name: read_log(out / run / "log.jsonl") for name, run in runs.items()}
    return Inputs(results, logs, read_pictures(out / "pictures.npz"))


def read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the report needs {path}, which does not exist: run `mvd-fast demo` first") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run `mvd-fast demo` again") from None
    if not isinstance(results, dict):
        raise UserError(f"{path} holds a JSON {type(results).__name__}, expected an object: run `mvd-fast demo` again")
    return results


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records in order; a line cut short by a crash is left out."""
    if not path.is_file():
        return []
    records = (_parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [record for record in records if isinstance(record, dict) and is_number(record.get("step"))]


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def read_pictures(path: Path) -> dict[str, np.ndarray]:
    """The arrays of pictures.npz; empty where the file is missing, unreadable or incomplete."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def series(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [n], values [n]) of the records that have a finite number under `name`."""
    pairs = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
    return tuple(np.array(pairs, dtype=float).reshape(-1, 2).T)

"""What the page says, computed from what was measured: verdicts, tables, times. No drawing, no HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from .inputs import Inputs, is_number, series

NETWORKS = ("untrained student", "image teacher", "video teacher", "student")
TRAINED = NETWORKS[1:]
LABELS = ("digit", "motion")
# A gain counts when it is larger than this many standard errors.
CLEAR = 2.0
RIVAL = "an untrained network of the same shape"
VERDICTS = {"above": "beats", "level": "is not measurably better than", "below": "is worse than"}
# Mean similarities closer than this are called alike.
ALIKE = 0.02
# Names of the trainer's timers by what they are called on the page; what remains of a step is "other".
STEP_PARTS = {
    "data": ("data",),
    "teachers": ("image_teacher", "video_teacher"),
    "forward": ("forward",),
    "backward": ("backward",),
    "optimizer": ("optimizer",),
    "checkpoint": ("checkpoint",),
}


# ---- probes ----


@dataclass(frozen=True)
class Accuracy:
    """Share of the test clips read correctly (0..1) and its binomial standard error (None: number unknown)."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Gain:
    """Student minus untrained student, in points, and the standard error of the difference."""

    label: str
    points: float
    error: float | None

    @property
    def verdict(self) -> str:
        """above, below or level: whether the difference is larger than `CLEAR` standard errors."""
        limit = CLEAR * (self.error or 0.0)
        if abs(self.points) <= limit:
            return "level"
        return "above" if self.points > 0 else "below"


def accuracies(results: dict[str, Any]) -> dict[str, dict[str, Accuracy]]:
    """Accuracy by network and label; what was not measured is left out."""
    probes = results.get("probes") or {}
    count = probes.get("n_test") or (results.get("data") or {}).get("test_clips")
    table = {}
    for network in NETWORKS:
        measured = probes.get(network) or {}
        row = {label: _accuracy(measured[label], count) for label in LABELS if is_number(measured.get(label))}
        if row:
            table[network] = row
    return table


def _accuracy(value: float, count: int | None) -> Accuracy:
    return Accuracy(value, math.sqrt(max(value * (1 - value), 0.0) / count) if count else None)


def chance(results: dict[str, Any]) -> dict[str, float]:
    levels = (results.get("probes") or {}).get("chance") or {}
    return {label: levels[label] for label in LABELS if is_number(levels.get(label))}


def gains(table: dict[str, dict[str, Accuracy]]) -> list[Gain]:
    student, untrained = table.get("student", {}), table.get("untrained student", {})
    both = [label for label in LABELS if label in student and label in untrained]
    return [_gain(label, student[label], untrained[label]) for label in both]


def _gain(label: str, student: Accuracy, untrained: Accuracy) -> Gain:
    # Both probes read the same clips, so their errors are positively correlated: this is the cautious side.
    known = student.error is not None and untrained.error is not None
    error = 100 * math.hypot(student.error, untrained.error) if known else None
    return Gain(label, 100 * (student.value - untrained.value), error)


def outcome(found: list[Gain]) -> str:
    """One sentence that the numbers support, whatever they are."""
    if len(found) < len(LABELS):
        return "What the student learned is not known yet: its probes, or the untrained network's, are missing."
    by_verdict = {
        words: [gain.label for gain in found if gain.verdict == verdict] for verdict, words in VERDICTS.items()
    }
    clauses, rival = [], RIVAL
    for words, labels in by_verdict.items():
        if labels:
            where = "both labels" if len(labels) == len(LABELS) else f"the {labels[0]}"
            clauses.append(f"{words} {rival} on {where}")
            rival = "it"
    numbers = ", ".join(f"{gain.label} {_points(gain)}" for gain in found)
    return f"The distilled student {', but '.join(clauses)}: {numbers}."


def _points(gain: Gain) -> str:
    error = "" if gain.error is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{gain.error:.1f}"
    return f"{signed(gain.points)}{error} points"


def signed(value: float) -> str:
    """One decimal, with its sign; a true minus sign."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def best(table: dict[str, dict[str, Accuracy]], label: str) -> str | None:
    """The network that reads a label best."""
    measured = {network: row[label].value for network, row in table.items() if label in row}
    return max(measured, key=measured.get) if measured else None


# ---- similarity across time ----


@dataclass(frozen=True)
class Similarity:
    """Cosine similarity of time slices [T, T] and the mean of its off-diagonal entries."""

    network: str
    matrix: np.ndarray
    mean: float


def similarities(results: dict[str, Any]) -> list[Similarity]:
    given = results.get("similarity") or {}
    return [similarity for name in TRAINED if name in given and (similarity := _similarity(name, given[name]))]


def _similarity(network: str, rows: list[list[float]] | None) -> Similarity | None:
    matrix = np.array(rows, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2 or not np.isfinite(matrix).all():
        return None
    return Similarity(network, matrix, float(matrix[~np.eye(len(matrix), dtype=bool)].mean()))


def similarity_sentence(found: list[Similarity]) -> str:
    """Whether the numbers show what the paper saw."""
    means = {item.network: item.mean for item in found}
    if not {"image teacher", "video teacher"} <= means.keys():
        return "One of the teachers' matrices is missing, so the comparison cannot be made here."
    image, video = means["image teacher"], means["video teacher"]
    numbers = f"the mean off the diagonal is {image:.2f} for the image teacher, {video:.2f} for the video teacher"
    if abs(image - video) <= ALIKE:
        text = f"These numbers do not show it: {numbers} (about the same)"
    elif image > video:
        text = f"These numbers show it: {numbers}"
    else:
        text = f"These numbers show the opposite: {numbers}"
    return text + (f", and {means['student']:.2f} for the student." if "student" in means else ".")


# ---- time ----


@dataclass(frozen=True)
class Phase:
    """One phase of the demonstration; what is not known is None. Rates are medians over the log's records."""

    name: str
    seconds: float | None
    steps: int | None
    batch: int | None
    parameters: int | None
    clips_per_second: float | None
    data_wait: float | None
    utilisation: float | None
    peak: float | None
    bad_files: int


def phases(inputs: Inputs) -> list[Phase]:
    return [_phase(given, inputs.logs.get(given["name"], [])) for given in inputs.results.get("phases") or []]


def _phase(given: dict[str, Any], records: list[dict[str, Any]]) -> Phase:
    return Phase(
        name=given["name"],
        seconds=given.get("seconds"),
        steps=given.get("steps") or (records[-1]["step"] if records else None),
        batch=given.get("batch"),
        parameters=given.get("parameters"),
        clips_per_second=_median(records, "clips_per_second") or given.get("clips_per_second"),
        data_wait=_data_wait(records),
        utilisation=_median(records, "model_flop_utilisation"),
        peak=_median(records, "peak_flops"),
        bad_files=max((record.get("bad_files") or 0 for record in records), default=0),
    )


def _median(records: list[dict[str, Any]], name: str) -> float | None:
    values = series(records, name)[1]
    return median(values.tolist()) if len(values) else None


def _data_wait(records: list[dict[str, Any]]) -> float | None:
    """Share of the whole run's seconds, not the mean of shares: windows differ in length."""
    timed = [r for r in records if is_number(r.get("seconds")) and is_number(r.get("data_wait_share"))]
    seconds = sum(record["seconds"] for record in timed)
    return sum(record["seconds"] * record["data_wait_share"] for record in timed) / seconds if seconds else None


def total_seconds(table: list[Phase]) -> float:
    return sum(phase.seconds or 0.0 for phase in table)


def step_parts(records: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds per clip spent in each part of a training step, in order; empty where nothing was logged."""
    timed = [r for r in records if is_number(r.get("seconds")) and is_number(r.get("clips_per_second"))]
    clips = sum(record["seconds"] * record["clips_per_second"] for record in timed)
    if not clips:
        return {}
    parts = {part: sum(_seconds(record, names) for record in timed) for part, names in STEP_PARTS.items()}
    # On a GPU, phases are measured on the device and may overlap the host's clock: never below zero.
    parts["other"] = max(sum(record["seconds"] for record in timed) - sum(parts.values()), 0.0)
    return {part: 1000 * seconds / clips for part, seconds in parts.items() if seconds > 0}


def _seconds(record: dict[str, Any], names: tuple[str, ...]) -> float:
    spent = record.get("phase_seconds") or {}
    return sum(spent.get(name) or 0.0 for name in names)

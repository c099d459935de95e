"""Fills page.html with what was measured and writes it in one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mvd_fast.files import write_text

from . import facts, plots
from .inputs import Inputs, read_inputs, series

NAME = "report.html"
MAX_CLIPS = 6


def write_report(out: Path) -> Path:
    """Writes `out/report.html` from `out/results.json`, the runs' `log.jsonl` and `out/pictures.npz`; returns its path.

    The page is self-contained: nothing is fetched when it is opened. Pieces that are missing are named in their
    section. Raises UserError where results.json itself is missing or broken.
    """
    out = Path(out)
    path = out / NAME
    write_text(path, render(read_inputs(out)))
    return path


def render(inputs: Inputs) -> str:
    """The page as text; a function of the inputs alone."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count, duration=duration, percent=percent, points=facts.signed, size=size, sig=significant, slug=slug
    )
    return environment.get_template("page.html").render(context(inputs))


def context(inputs: Inputs) -> dict[str, Any]:
    results = inputs.results
    table = facts.accuracies(results)
    phases = facts.phases(inputs)
    found = facts.gains(table)
    steps = _steps(inputs)
    return {
        "title": results.get("title") or "Masked video distillation in small",
        "size": results.get("size") or "full",
        "seed": results.get("seed") or 0,
        "data": results.get("data") or {},
        "machine": results.get("machine") or {},
        "versions": results.get("versions") or {},
        "labels": facts.LABELS,
        "networks": facts.NETWORKS,
        "outcome": facts.outcome(found),
        "gains": {gain.label: gain for gain in found},
        "chance": facts.chance(results),
        "probes": table,
        "best": {label: facts.best(table, label) for label in facts.LABELS},
        "probe_charts": _probe_charts(table, facts.chance(results)),
        "confusions": _confusions(results),
        "losses": [_loss_panel(network, inputs.logs.get(network, [])) for network in facts.TRAINED],
        "similarity": _similarity(results),
        "clips": _clips(inputs),
        "phases": phases,
        "total_seconds": facts.total_seconds(phases),
        "steps": steps,
        "step_parts": [part for part in (*facts.STEP_PARTS, "other") if any(part in run["parts"] for run in steps)],
    }


# ---- sections ----


def _probe_charts(table: dict[str, dict[str, facts.Accuracy]], chance: dict[str, float]) -> dict[str, Markup]:
    measured = [label for label in facts.LABELS if any(label in row for row in table.values())]
    return {label: plots.probe_bars(label, table, chance.get(label)) for label in measured}


def _confusions(results: dict[str, Any]) -> dict[str, Markup]:
    given = (results.get("confusion") or {}).get("student") or {}
    motions = (results.get("data") or {}).get("motions") or []
    charts = {}
    for label in facts.LABELS:
        counts = np.array(given.get(label) or [], dtype=float)
        if counts.ndim == 2 and counts.shape[0] == counts.shape[1]:
            known = label == "motion" and len(motions) == len(counts)
            names = list(motions) if known else [str(number) for number in range(len(counts))]
            charts[label] = plots.confusion_matrix(label, counts, names)
    return charts


def _loss_panel(network: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """`chart` is None where no step was logged."""
    parts = {"loss_image": ("image part", "image teacher"), "loss_video": ("video part", "video teacher")}
    curves = {"loss": (series(records, "loss"), network)}
    curves |= {name: (series(records, key), owner) for key, (name, owner) in parts.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve[0][0])}
    chart = plots.loss_curves(network, curves, series(records, "lr")) if "loss" in curves else None
    return {"network": network, "chart": chart}


def _similarity(results: dict[str, Any]) -> dict[str, Any]:
    found = facts.similarities(results)
    if not found:
        return {"items": []}
    limits = plots.similarity_range(found)
    return {
        "items": [
            {"network": item.network, "mean": item.mean, "chart": plots.similarity_matrix(item, limits)}
            for item in found
        ],
        "limits": limits,
        "gradient": plots.heat_gradient(),
        "sentence": facts.similarity_sentence(found),
    }


def _clips(inputs: Inputs) -> list[dict[str, Any]]:
    """Strips per clip; empty where there are no pictures."""
    pictures = inputs.pictures
    if not pictures:
        return []
    motions = (inputs.results.get("data") or {}).get("motions") or []
    tubelet, patch = int(pictures["tubelet"]), int(pictures["patch"])
    clips = []
    for place in range(min(len(pictures["frames"]), MAX_CLIPS)):
        frames, mask = pictures["frames"][place], pictures["mask"][place]
        motion = int(pictures["motion"][place])
        rows = {
            "input": frames,
            "visible": plots.masked_frames(frames, mask, tubelet, patch),
            "rebuilt": pictures["reconstruction"][place],
        }
        clips.append({
            "digit": int(pictures["digit"][place]),
            "motion": motions[motion] if motion < len(motions) else f"motion {motion}",
            "masked": float(mask.mean()),
            "rows": {name: plots.strip(row) for name, row in rows.items()},
        })  # fmt: skip
    return clips


def _steps(inputs: Inputs) -> list[dict[str, Any]]:
    """Parts of a step per run, all on the scale of the longest."""
    runs = [(network, facts.step_parts(inputs.logs.get(network, []))) for network in facts.TRAINED]
    runs = [(network, parts) for network, parts in runs if parts]
    longest = max((sum(parts.values()) for _, parts in runs), default=1.0)
    return [
        {"network": network, "parts": parts, "total": sum(parts.values()), "share": sum(parts.values()) / longest}
        for network, parts in runs
    ]


# ---- numbers as text ----


def count(value: float) -> str:
    return f"{value:,.0f}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def significant(value: float, digits: int = 3) -> str:
    """That many significant digits, trailing zeros too; whole numbers above that."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(number: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def slug(text: str) -> str:
    return text.replace(" ", "-")

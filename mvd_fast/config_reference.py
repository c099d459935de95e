"""`mvd-fast config keys`: every setting of the schema with its default and meaning; docs/settings.md is its output."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mvd_fast.config import RunConfig
from mvd_fast.config_checks import available_kinds
from mvd_fast.config_file import model_of

# Whose modules a `kind` names.
REGISTRIES = {
    "model.kind": "models",
    "teachers.image.kind": "teachers",
    "teachers.video.kind": "teachers",
    "objective.kind": "objectives",
    "data.kind": "data/kinds",
}
HEADING = """# Settings

Every key of a config, as `mvd-fast config keys` prints them. `mvd-fast config show NAME` prints a recipe's values,
`--set KEY=VALUE` changes one ([training.md](training.md#the-config)). A key without a default must be given; `null`
means that nothing is set. Keys of other kinds than those of this project are described by their own modules.
"""


def reference() -> str:
    """Markdown: one table for each section of the schema, in its order."""
    return "\n".join([HEADING, *_sections(RunConfig, "")])


def setting_names() -> list[str]:
    """All keys that hold a value, dotted."""
    return [key for key, _ in _leaves(RunConfig, "")]


def _sections(model: type[BaseModel], prefix: str) -> Iterator[str]:
    rows = [_row(prefix + name, field) for name, field in model.model_fields.items() if not model_of(field)]
    if prefix:
        yield f"## {prefix.rstrip('.')}\n"
    yield f"{' '.join((model.__doc__ or '').split())}\n"
    if rows:
        yield "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n"
    for name, field in model.model_fields.items():
        if inner := model_of(field):
            yield from _sections(inner, f"{prefix}{name}.")


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if inner := model_of(field):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _row(key: str, field: FieldInfo) -> str:
    choices = available_kinds(REGISTRIES[key]) if key in REGISTRIES else _choices(field.annotation)
    meaning = field.description or ""
    if choices:
        meaning = f"{', '.join(f'`{choice}`' for choice in choices)}: {meaning}"
    return f"| `{key}` | {_default(field)} | {meaning} |"


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) is types.UnionType:
        return tuple(choice for part in get_args(annotation) for choice in _choices(part))
    return ()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"

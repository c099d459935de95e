"""What every setting means: `mvd-fast config keys`, whose output is docs/settings.md, and `mvd-fast config explain`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .base import ConfigError
from .kinds import TASKS, OfKind, available_kinds, kind_module, nearest
from .load import kinds_of, model_of
from .run import RunConfig

HEADING = """# Settings

Every key of a config, as `mvd-fast config keys` prints them. `mvd-fast config show NAME` prints a recipe's values,
`--set KEY=VALUE` changes one ([training.md](training.md#the-config)), `mvd-fast config explain KEY` prints what one
means. A key without a default must be given; `null` means that nothing is set. Which sections a run has depends on its
`task`; which keys a section has, on its `kind`. An entry of a list is meant by its name, its kind or its number:
`targets.image.checkpoint`.
"""


@dataclass(frozen=True)
class Setting:
    """One key. where: the task or the kind that has it; empty: all."""

    key: str
    where: str
    field: FieldInfo
    choices: tuple[str, ...] = ()

    @property
    def meaning(self) -> str:
        text = self.field.description or ""
        return f"{', '.join(f'`{choice}`' for choice in self.choices)}: {text}" if self.choices else text

    @property
    def default(self) -> str:
        """As JSON; empty: it must be given."""
        if self.field.is_required():
            return ""
        value = self.field.get_default(call_default_factory=True)
        return json.dumps(value.model_dump(mode="json") if isinstance(value, BaseModel) else value)


@dataclass(frozen=True)
class Section:
    """The keys of one object of a config: `settings` with values, and its title and text."""

    title: str
    text: str
    settings: tuple[Setting, ...]


def reference() -> str:
    """Markdown: one table for each section of the schema."""
    return "\n".join([HEADING, *(_table(section) for section in sections())])


def setting_names() -> list[str]:
    """All keys that hold a value, dotted; `targets[]` for the entries of a list."""
    return list(dict.fromkeys(setting.key for section in sections() for setting in section.settings))


def explain(key: str) -> str:
    """What a key means, for each task or kind that has it.

    Raises ConfigError for a key that there is not.
    """
    parts = key.split(".")
    wanted = {key, ".".join([f"{parts[0]}[]", *parts[2:]])} if len(parts) > 2 else {key}
    if key.endswith(".kind") and wanted.isdisjoint(setting_names()):
        return explain(key.removesuffix(".kind"))  # of an object that may be given by its kind's name
    found = [setting for section in sections() for setting in section.settings if setting.key in wanted]
    inside = [f"{name}" for name in setting_names() if name.startswith((f"{key}.", f"{key}[]."))]
    if not found and inside:
        return f"{key}: a section, with the keys {', '.join(inside)}"
    if not found:
        raise ConfigError(f"no setting {key!r}{nearest(key, setting_names()) or ';'} `mvd-fast config keys` lists them")
    same: dict[tuple[str, str], list[Setting]] = {}
    for setting in found:
        same.setdefault((setting.meaning, setting.default), []).append(setting)
    return "\n".join(_explained(meaning, default, settings) for (meaning, default), settings in same.items())


def _explained(meaning: str, default: str, settings: list[Setting]) -> str:
    """One line on settings that are the same for several tasks or kinds."""
    where = ", ".join(setting.where for setting in settings)
    where = f" ({where})" if where not in ("", "all kinds") else ""
    return f"{settings[0].key}{where}: {meaning}; {f'default {default}' if default else 'it must be given'}"


def sections() -> list[Section]:
    """Those of all runs, then for each task what it adds, with the kinds that its objects may be of; none twice."""
    found = list(_sections(RunConfig, "", ""))
    for task in available_kinds(TASKS):
        found += _sections(kind_module(TASKS, task).Config, "", f"task `{task}`", shared=RunConfig)
    unique: dict[Any, Section] = {}
    for section in found:
        unique.setdefault((section.title, tuple(setting.key for setting in section.settings)), section)
    return list(unique.values())


def _sections(
    model: type[BaseModel], prefix: str, where: str, shared: type[BaseModel] | None = None
) -> Iterator[Section]:
    """shared: a class whose fields are described already; those that the model types anew are described again."""
    known = shared.model_fields if shared else {}
    fields = {n: f for n, f in model.model_fields.items() if n not in known or f.annotation is not known[n].annotation}
    for name in ("task", "kind") if shared else ():
        fields.pop(name, None)
    rows = [_setting(prefix + n, where, f) for n, f in fields.items() if kinds_of(f) or not model_of(f)]
    if rows or not prefix or shared:
        title = f"{prefix.rstrip('.')}{', ' if prefix and where else ''}{where}"
        yield Section(title, " ".join((model.__doc__ or "").split()), tuple(rows))
    for name, field in fields.items():
        entries = "[]" if get_origin(field.annotation) is list else ""
        inner, below = model_of(field), f"{prefix}{name}{entries}."
        if kinds := kinds_of(field):
            yield from _kinds(kinds, inner, below)
        elif inner:
            base = model_of(known[name]) if name in known else None
            yield from _sections(inner, below, where, base if base is not inner else None)


def _kinds(kinds: OfKind, base: type[BaseModel] | None, prefix: str) -> Iterator[Section]:
    """What the objects of all kinds have, then what each adds."""
    if base and base.model_fields.keys() > {"kind"}:
        (section, *inner) = _sections(base, prefix, "all kinds")
        kind, *rest = section.settings
        yield replace(section, settings=(replace(kind, choices=kinds.kinds()), *rest))
        yield from inner
    for kind in kinds.kinds():
        yield from _sections(kinds.config(kind), prefix, f"kind `{kind}`", shared=base)


def _setting(key: str, where: str, field: FieldInfo) -> Setting:
    kinds = kinds_of(field)
    choices = kinds.kinds() if kinds else available_kinds(TASKS) if key == "task" else _choices(field.annotation)
    return Setting(key, where.replace("`", ""), field, choices)


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) is types.UnionType:
        return tuple(choice for part in get_args(annotation) for choice in _choices(part))
    return ()


def _table(section: Section) -> str:
    rows = [f"| `{s.key}` | {f'`{s.default}`' if s.default else ''} | {s.meaning} |" for s in section.settings]
    table = ["| key | default | meaning |", "|---|---|---|", *rows, ""] if rows else []
    return "\n".join([*([f"## {section.title}\n"] if section.title else []), f"{section.text}\n", *table])

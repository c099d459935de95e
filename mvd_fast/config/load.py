"""Loading a run's JSON: `extends`, `--set`, and every fault of a config as one clear sentence.

A file may name others under `extends` (a string or a list, relative to itself, or a recipe's name); they are merged in
order and the file itself goes on top: objects merge key by key, everything else replaces, and so does an object of
another `kind`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mvd_fast.errors import UserError
from mvd_fast.files import write_text
from mvd_fast.names import printable

from .base import ConfigError
from .checks import data_fault, faults
from .kinds import DATASETS, TARGETS, TASKS, OfKind, available_kinds, kind_module, nearest, unknown_kind
from .run import RunConfig

Json = dict[str, Any]

# Installed, the recipes lie inside the package; in a checkout, beside it.
RECIPE_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")

# What a field accepts, for pydantic's error types that say it in pydantic's own words.
ACCEPTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": 'a string, such as "text"',
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object, such as {}",
    "model_type": "an object, such as {}",
    "model_attributes_type": "an object, such as {}",
}


def load_config(path_or_recipe_name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge, override and check a run's config, before anything else is loaded.

    Args:
        path_or_recipe_name: a JSON file, or a recipe's name with or without `.json` (`vitl`, `demo/student`).
        overrides: `a.b=value` settings, applied last; a value that is not JSON is taken as a string.

    Raises:
        ConfigError: the file is missing or not JSON, or the config is faulty; one sentence, or one a line. What an
            override brought in is blamed on `--set`, all else on the file.
    """
    path = _find(path_or_recipe_name)
    tree = _read_merged(path, ())
    changed = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(changed, override)
    config, sentences = _checked(changed)
    if config is None:
        before = set(_checked(tree)[1]) if overrides else sentences
        raise ConfigError(_report([_blamed(s, path, () if s in before else overrides) for s in sentences]))
    return config


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the resolved config as JSON that `load_config` reads back equal; the file is complete or absent."""
    write_text(path, config.model_dump_json(indent=2) + "\n")


def list_recipes() -> dict[str, Path]:
    """The recipes that come with mvd_fast, by name; files in `base/` are parts of recipes and not listed."""
    return {name: path for name, path in _recipe_files().items() if not name.startswith("base/")}


def config_from_arguments(arguments: argparse.Namespace) -> RunConfig:
    """The config that the arguments of `add_train_arguments` name; `--run-dir` wins over the file and `--set`."""
    config = load_config(arguments.config, arguments.set)
    return config.model_copy(update={"run_dir": arguments.run_dir}) if arguments.run_dir else config


def _find(name: str, start: Path = Path()) -> Path:
    """The file meant by `name`: below `start`, else a recipe."""
    bare = name.removesuffix(".json")
    for candidate in (start / name, start / f"{bare}.json", _recipe_files().get(bare)):
        if candidate is not None and candidate.is_file():
            return candidate
    names = list(list_recipes())
    hint = nearest(Path(bare).name, names) or nearest(bare, names) or f"; the recipes are {', '.join(names)}"
    raise ConfigError(f"config {name} does not exist{hint}")


def _recipe_files() -> dict[str, Path]:
    folder = next((folder for folder in RECIPE_FOLDERS if folder.is_dir()), RECIPE_FOLDERS[-1])
    files = sorted(folder.rglob("*.json"), key=lambda file: (len(file.parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _read_merged(path: Path, above: tuple[Path, ...]) -> Json:
    """The file with everything it extends; `above` is the chain of files that led here."""
    chain = (*above, path.resolve())
    if path.resolve() in above:
        raise ConfigError(f"{path} extends itself: {' -> '.join(file.name for file in chain)}")
    tree = _read_json(path)
    bases = tree.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends: got {_shown(bases)}; it must be a file name or a list of file names")
    merged: Json = {}
    for base in bases:
        merged = _merge(merged, _read_merged(_find_base(path, base), chain))
    return _merge(merged, tree)


def _find_base(path: Path, base: str) -> Path:
    try:
        return _find(base, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None


def _read_json(path: Path) -> Json:
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path} is not valid JSON: {error.msg} at {place}") from None
    except ValueError as error:  # a key twice, NaN, or bytes that are not UTF-8
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f'{path} must hold one JSON object, such as {{"extends": "vitl"}}, not {_shown(tree)}')
    return tree


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    tree: Json = {}
    for key, value in pairs:
        if key in tree:
            raise UserError(f"the key {key!r} stands twice in one object")
        tree[key] = value
    return tree


def _refuse_constant(text: str) -> None:
    raise UserError(f"{text} is not a number that JSON allows")


def _merge(base: Json, top: Json) -> Json:
    merged = dict(base)
    for key, value in top.items():
        merged[key] = _merge(base[key], value) if _is_same_kind(base.get(key), value) else value
    return merged


def _is_same_kind(base: Any, top: Any) -> bool:
    """Whether both are objects of one kind: another kind has no use for the settings of `base`."""
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return False
    return "kind" not in base or top.get("kind", base["kind"]) == base["kind"]


def _apply_override(tree: Json, override: str) -> None:
    """Set the value at a dotted path; an object replaces what was there."""
    path, separator, text = override.partition("=")
    *parents, last = path.strip().split(".")
    if not separator or not last or not all(parents):
        raise ConfigError(f"--set takes KEY=VALUE with a dotted key, such as optim.epochs=100, not {override!r}")
    holder: Any = tree
    for key in parents:
        holder = _entered(holder, key, override)
    place: Any = _place(holder, last, override) if isinstance(holder, list) else last
    try:
        holder[place] = _parse(text)
    except ValueError:
        holder[place] = text


def _entered(holder: Any, key: str, override: str) -> Any:
    """The object or list at a key, made where there is none; the name of a kind alone becomes an object."""
    if isinstance(holder, list):
        return holder[_place(holder, key, override)]
    found = holder.get(key)
    if isinstance(found, str):
        found = {"kind": found}
    holder[key] = found if isinstance(found, dict | list) else {}
    return holder[key]


def _place(entries: list[Any], key: str, override: str) -> int:
    """The entry of a list that a key means: its number from 0, its name or its kind."""
    named = [_names(entry) for entry in entries]
    for field in (0, 1):
        found = [number for number, names in enumerate(named) if names[field] == key]
        if len(found) == 1:
            return found[0]
    if key.isdigit() and int(key) < len(entries):
        return int(key)
    known = [names[0] for names in named]
    there = f"{', '.join(known)}, or a number below {len(entries)}" if entries else "empty"
    raise ConfigError(f"--set {override}: no entry {key!r} in the list{nearest(key, known) or ','} which is {there}")


def _names(entry: Any) -> tuple[str, str]:
    """Name and kind of an entry; it has its kind's name where it has none of its own."""
    entry = entry if isinstance(entry, dict) else {}
    kind = str(entry.get("kind", ""))
    if "name" not in entry and kind in available_kinds(TARGETS):
        return kind_module(TARGETS, kind).Config.model_fields["name"].default or kind, kind
    return str(entry.get("name", kind)), kind


def _checked(tree: Json) -> tuple[RunConfig | None, list[str]]:
    """The config, or None and one sentence for every fault."""
    if odd := [(path, text) for path, text in _strings(tree) if not _is_utf8(text)]:
        what = "is not UTF-8; rename it (names of files in lists and folders may be any bytes)"
        return None, [f"{path}: '{printable(text)}' {what}" for path, text in odd]
    try:
        schema = _schema(tree)
        if unfit := _unfit_data(schema, tree):  # then its settings are not what is wrong
            return None, [unfit]
        config = schema.model_validate_json(json.dumps(tree), strict=True)
        sentences = faults(config)
    except ConfigError as error:
        return None, [str(error)]
    except ValidationError as error:
        return None, [_sentence(found, schema, tree) for found in error.errors(include_url=False)]
    return (None if sentences else config), sentences


def _unfit_data(schema: type[RunConfig], tree: Json) -> str:
    """What `checks.data_fault` says of the data that a tree names."""
    data = tree.get("data")
    kind = data.get("kind") if isinstance(data, dict) else data
    return data_fault(schema, kind) if kind in available_kinds(DATASETS) else ""


def _schema(tree: Json) -> type[RunConfig]:
    """The class of the task that a tree names."""
    task, tasks = tree.get("task"), available_kinds(TASKS)
    if not isinstance(task, str):
        what = f"got {_shown(task)}; it must be" if "task" in tree else "is missing; it is"
        raise ConfigError(f"task{':' if 'task' in tree else ''} {what} one of {', '.join(tasks)}")
    if task not in tasks:
        raise ConfigError(f"task: {unknown_kind(task, tasks)}")
    return kind_module(TASKS, task).Config


def _blamed(sentence: str, path: Path, overrides: Sequence[str]) -> tuple[str, str]:
    """What brought a fault in, and the fault: the override of the setting that it names, all overrides, or the file."""
    where, separator, _ = sentence.partition(": ")
    keys = [override.partition("=")[0].strip() for override in overrides]
    if separator and any(where == key or where.startswith((f"{key}.", f"{key}[")) for key in keys):
        return "", f"--set {sentence}"
    return (f"{path} with --set {' '.join(overrides)}" if overrides else str(path)), sentence


def _report(found: list[tuple[str, str]]) -> str:
    """One fault in one line; more under a heading, which says where they come from if that is one place."""
    sources = {source for source, _ in found}
    if len(found) > 1 and len(sources) == 1 and (source := found[0][0]):
        return "\n  ".join([f"{source} has {len(found)} errors:", *(sentence for _, sentence in found)])
    lines = [": ".join(filter(None, pair)) for pair in found]
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} errors:", *lines])


def _strings(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a tree, and where it is."""
    if isinstance(tree, str):
        yield path, tree
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _strings(value, f"{path}.{key}".removeprefix("."))


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _sentence(error: ErrorDetails, schema: type[BaseModel], tree: Json) -> str:
    """One pydantic error in our words: where, what came, what is accepted."""
    location, kind, context = error["loc"], error["type"], error.get("ctx", {})
    path = _dotted(location)
    fields = _fields(schema, tree, location[:-1])
    if kind == "extra_forbidden":
        return _unknown_key(location, fields, schema, tree)
    if kind == "missing":
        field = fields.get(str(location[-1]))
        return f"{path} is missing" + (f"; it is the {field.description}" if field and field.description else "")
    if kind == "kind":
        return f"{path} {error['msg']}" if error["msg"].startswith("is missing") else f"{path}: {error['msg']}"
    if kind == "value_error":  # a validator of ours, whose sentence is complete
        return f"{path}: {context['error']}" if path else str(context["error"])
    accepted = ACCEPTED.get(kind) or error["msg"].removeprefix("Input should be ")
    hint = nearest(str(error["input"]), str(context.get("expected", "")).split("'")[1::2])
    return f"{path}: got {_shown(error['input'])}; it must be {accepted}{hint}"


def _unknown_key(
    location: tuple[int | str, ...], siblings: dict[str, FieldInfo], schema: type[BaseModel], tree: Json
) -> str:
    name = str(location[-1])
    owners = [task for task in available_kinds(TASKS) if name in kind_module(TASKS, task).Config.model_fields]
    if len(location) == 1 and owners:
        return f"{name}: unknown key of task {tree['task']!r}; it is one of task {' and '.join(map(repr, owners))}"
    hint = nearest(name, siblings)
    if not hint:  # a known name at the wrong place
        elsewhere = [path for path, _, _ in settings(schema, tree) if path.split(".")[-1] == name]
        hint = f", did you mean {elsewhere[0]!r}?" if elsewhere else ";"
    return f"{_dotted(location)}: unknown key{hint} valid here: {', '.join(siblings)}"


def _fields(schema: type[BaseModel], tree: Any, location: tuple[int | str, ...]) -> dict[str, FieldInfo]:
    """The fields of the object at `location` of a tree that the schema describes."""
    model: type[BaseModel] | None = schema
    field: FieldInfo | None = None
    for key in location:
        tree = tree[key] if isinstance(tree, list) else tree.get(key) if isinstance(tree, dict) else None
        if isinstance(key, str):
            field = model.model_fields.get(key) if model else None
        model = model_of(field, tree) if field else None
    return dict(model.model_fields) if model else {}


def model_of(field: FieldInfo, value: Any = None) -> type[BaseModel] | None:
    """The schema of the object that a field, or an entry of its list, holds; None where it holds a value.

    value: what stands there; of its kind where there are several.
    """
    options = list(_parts(field))
    chosen = next((option for option in options if isinstance(option, OfKind)), None)
    if chosen:
        kind = value if isinstance(value, str) else value.get("kind") if isinstance(value, dict) else None
        if kind in chosen.kinds():
            return chosen.config(kind)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def kinds_of(field: FieldInfo) -> OfKind | None:
    """The kinds that the object of a field, or an entry of its list, may be of."""
    return next((part for part in _parts(field) if isinstance(part, OfKind)), None)


def _parts(field: FieldInfo) -> Iterator[Any]:
    """What a field's annotation is made of."""
    yield from field.metadata
    yield from _inside(field.annotation)


def _inside(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in (*getattr(annotation, "__metadata__", ()), *get_args(annotation)):
        if part is not annotation:
            yield from _inside(part)


def settings(schema: type[BaseModel], tree: Any = None, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Every key of a schema, dotted, with its field and what stands there in the tree; `targets[]` for entries."""
    for name, field in schema.model_fields.items():
        value = tree.get(name) if isinstance(tree, dict) else None
        yield prefix + name, field, value
        if isinstance(value, list) and model_of(field):
            for number, entry in enumerate(value):
                yield from settings(model_of(field, entry) or BaseModel, entry, f"{prefix}{name}[{number}].")
        elif inner := model_of(field, value):
            yield from settings(inner, value, f"{prefix}{name}.")


def _dotted(location: tuple[int | str, ...]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

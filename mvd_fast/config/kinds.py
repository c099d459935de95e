"""Settings that belong to a kind: the class that reads an object of a config is named by the object's `kind`.

A kind is a module that defines `class Config`: a file of mvd_fast/tasks, mvd_fast/targets or mvd_fast/data/datasets, or
of a folder `tasks`, `targets` or `datasets` in one of the folders that MVD_PLUGINS names (`MVD_PLUGINS=plugins` and
plugins/tasks/mine.py). Only the modules that a config names are imported; the others' sources are read for their names.
"""

from __future__ import annotations

import difflib
import json
import os
import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from .base import ConfigError, Strict

TASKS, TARGETS, DATASETS = "mvd_fast.tasks", "mvd_fast.targets", "mvd_fast.data.datasets"


def with_plugins(own: Iterable[str], package: str) -> list[str]:
    """The `__path__` of a package of kinds: its own folders, then those of MVD_PLUGINS.

    Raises ConfigError where one that is named is no folder.
    """
    folder = package.rpartition(".")[2]
    named = [name for name in os.environ.get("MVD_PLUGINS", "").split(os.pathsep) if name]
    if missing := [name for name in named if not os.path.isdir(name)]:
        raise ConfigError(f"MVD_PLUGINS: {missing[0]} is no folder; name folders that hold tasks, targets or datasets")
    return [*own, *(os.path.join(os.path.abspath(plugins), folder) for plugins in named)]


def nearest(name: str, choices: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the choice most like `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f", did you mean {found[0]!r}?" if found else ""


@cache
def available_kinds(package: str) -> tuple[str, ...]:
    """Names of the modules of a package that define a `Config`, sorted; none of them is imported."""
    return kinds_in(import_module(package).__path__)


def kinds_in(folders: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules in some folders. Raises ConfigError for a name that two folders have."""
    found: dict[str, Path] = {}
    modules = (module for folder in folders for module in pkgutil.iter_modules([folder]))  # all at once: no name twice
    for module in modules:
        file = Path(module.module_finder.path) / f"{module.name}.py"
        if not _defines_config(file):
            continue
        if module.name in found:
            raise ConfigError(f"{file} and {found[module.name]} are both kind {module.name!r}; rename yours")
        found[module.name] = file
    return tuple(sorted(found))


def _defines_config(module: Path) -> bool:
    return module.is_file() and bool(re.search(r"^class Config\b", module.read_text("utf-8"), re.MULTILINE))


def kind_module(package: str, kind: str) -> Any:
    """The module of a kind. Raises ConfigError, with the kinds that there are, where there is no such kind."""
    kinds = available_kinds(package)
    if kind not in kinds:
        raise ConfigError(unknown_kind(kind, kinds))
    return import_module(f"{package}.{kind}")


def unknown_kind(kind: Any, kinds: Iterable[str]) -> str:
    return f"unknown kind {kind!r}{nearest(str(kind), kinds) or ';'} there are: {', '.join(kinds)}"


@dataclass(frozen=True)
class OfKind:
    """Annotates a field whose object is read by the class of its kind.

    package: where kinds are modules with a `Config`; or `classes`, by kind. A kind without settings may be given by its
    name alone. default: the kind of an object that names none.
    """

    package: str = ""
    classes: tuple[type[Strict], ...] = ()
    default: str = ""

    def kinds(self) -> tuple[str, ...]:
        return available_kinds(self.package) if self.package else tuple(map(kind_of, self.classes))

    def config(self, kind: str) -> type[Strict]:
        """The class of a kind that there is."""
        if self.package:
            return kind_module(self.package, kind).Config
        return next(config for config in self.classes if kind_of(config) == kind)

    def read(self, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        value = {"kind": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            return handler(value)
        kind = value.get("kind", self.default)
        if kind not in self.kinds():
            missing = f"is missing; it is one of {', '.join(self.kinds())}"
            sentence = unknown_kind(kind, self.kinds()) if isinstance(value.get("kind"), str) else missing
            error = PydanticCustomError("kind", sentence)  # type: ignore[arg-type]
            raise ValidationError.from_exception_data("kind", [InitErrorDetails(type=error, loc=("kind",), input=kind)])
        return self.config(kind).model_validate_json(json.dumps(value), strict=True)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self.read, handler(source))


def kind_of(config: type[BaseModel]) -> str:
    return config.model_fields["kind"].default

"""setuptools' build backend, which asks for torch too where there is none to build the C++ operators with."""

from __future__ import annotations

import tomllib
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403 (the hooks that stay as they are)

import native

TORCH = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return TORCH if native.why_not() is None and not native.finds_torch() else []


get_requires_for_build_editable = get_requires_for_build_wheel

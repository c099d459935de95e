"""What is installed, under which names, and who may import whom."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import mvd_fast
import mvd_kernels
from mvd_fast import doctor

ROOT = Path(__file__).parents[1]
PACKAGES = {"mvd_fast": ROOT / "mvd_fast", "mvd_kernels": ROOT / "kernels" / "mvd_kernels"}

# What each part may import besides itself and the base, lowest first: every module of ours is in one, and a part comes
# after those that it imports. `training.launch` is a part of its own: who it is and where, a process asks everywhere.
BASE = {
    "mvd_fast.errors",
    "mvd_fast.names",
    "mvd_fast.config",
    "mvd_fast.files",
    "mvd_fast.arguments",
    "mvd_fast.machine",
}
ALLOWED = {
    "mvd_kernels": set(),
    "mvd_fast.errors": set(),
    "mvd_fast.names": set(),
    "mvd_fast.config": set(),
    "mvd_fast.files": set(),
    "mvd_fast.arguments": set(),
    "mvd_fast.machine": set(),
    "mvd_fast.config_checks": set(),
    "mvd_fast.config_file": {"mvd_fast.config_checks"},
    "mvd_fast.config_reference": {"mvd_fast.config_checks", "mvd_fast.config_file"},
    "mvd_fast.training.launch": set(),
    "mvd_fast.models": {"mvd_kernels"},
    "mvd_fast.interop": {"mvd_fast.models"},
    "mvd_fast.teachers": {"mvd_fast.models", "mvd_fast.interop", "mvd_kernels"},
    "mvd_fast.objectives": {"mvd_fast.models", "mvd_fast.teachers", "mvd_fast.interop", "mvd_kernels"},
    "mvd_fast.data": {"mvd_fast.config_file", "mvd_kernels"},
    "mvd_fast.doctor": {"mvd_fast.data", "mvd_kernels"},
    "mvd_fast.targets": {
        "mvd_fast.config_file",
        "mvd_fast.data",
        "mvd_fast.objectives",
        "mvd_fast.teachers",
        "mvd_fast.training.launch",
        "mvd_kernels",
    },
    "mvd_fast.training": {
        "mvd_fast.config_checks",
        "mvd_fast.config_file",
        "mvd_fast.data",
        "mvd_fast.interop",
        "mvd_fast.objectives",
        "mvd_fast.targets",
        "mvd_fast.teachers",
        "mvd_fast.training.launch",
    },
    "mvd_fast.downstream": {
        "mvd_fast.config_file",
        "mvd_fast.data",
        "mvd_fast.interop",
        "mvd_fast.models",
        "mvd_fast.teachers",
        "mvd_fast.training.launch",
        "mvd_kernels",
    },
    "mvd_fast.planning": {
        "mvd_fast.training",
        "mvd_fast.config_file",
        "mvd_fast.data",
        "mvd_fast.models",
        "mvd_fast.objectives",
        "mvd_fast.targets",
        "mvd_fast.teachers",
        "mvd_kernels",
    },
    "mvd_fast.train": {
        "mvd_fast.config_file",
        "mvd_fast.downstream",
        "mvd_fast.planning",
        "mvd_fast.training",
        "mvd_fast.training.launch",
    },
    "mvd_fast.finetune": {"mvd_fast.config_file", "mvd_fast.train"},
    "mvd_fast.report": set(),
    "mvd_fast.demo": {
        "mvd_fast.config_file",
        "mvd_fast.data",
        "mvd_fast.downstream",
        "mvd_fast.interop",
        "mvd_fast.models",
        "mvd_fast.objectives",
        "mvd_fast.report",
        "mvd_fast.training",
    },
    "mvd_fast.cli": {
        "mvd_fast.config_reference",
        "mvd_fast.config_file",
        "mvd_fast.doctor",
        "mvd_fast.finetune",
        "mvd_fast.train",
        "mvd_fast.training",
        "mvd_fast.training.launch",
    },
}


# ---- imports run one way ----


def imported_names(file: Path) -> Iterator[str]:
    """Absolute names that a module imports; `from a import b` gives a.b, which may be a module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module_name(file).split(".")[: None if file.stem == "__init__" else -1]
            base = [*package[: len(package) + 1 - node.level], node.module] if node.level else [node.module]
            yield from (".".join(filter(None, [*base, alias.name])) for alias in node.names)


def module_name(file: Path) -> str:
    """mvd_fast/models/mae.py -> mvd_fast.models.mae, mvd_fast/models/__init__.py -> mvd_fast.models."""
    package = next(name for name, folder in PACKAGES.items() if folder in file.parents)
    parts = [package, *file.relative_to(PACKAGES[package]).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for folder in PACKAGES.values() for file in sorted(folder.rglob("*.py"))}


def home(name: str, homes: Iterable[str]) -> str | None:
    """The longest of `homes` that a dotted name is, or is in."""
    return max((one for one in homes if f"{name}.".startswith(f"{one}.")), key=len, default=None)


def test_every_module_belongs_to_a_part():
    parts = {home(name, ALLOWED): name for name in MODULES if name != "mvd_fast"}  # which imports nothing of ours
    assert None not in parts, f"{parts.get(None)} needs a part in ALLOWED"
    assert set(ALLOWED) == set(parts), "parts without modules"


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    order = list(ALLOWED)
    accepted = {one for one in ALLOWED[part] | BASE | {part} if order.index(one) <= order.index(part)}
    assert ALLOWED[part] <= accepted, "a part comes after those that it imports"
    wrong = [
        f"{name} imports {imported}"
        for name, file in MODULES.items()
        if home(name, ALLOWED) == part
        for imported in imported_names(file)
        if imported.split(".")[0] in PACKAGES and not imported.startswith("mvd_fast.__")
        if home(imported, ALLOWED) not in accepted and imported != "mvd_fast"
    ]
    assert not wrong


def test_no_modules_import_each_other():
    """Not within a part either. A package's own file may import what is in the package."""
    imports = {
        name: {found for one in imported_names(file) if (found := home(one, MODULES)) and found != name}
        for name, file in MODULES.items()
    }
    for name, file in MODULES.items():
        if file.stem == "__init__":
            imports[name] = {found for found in imports[name] if not found.startswith(f"{name}.")}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_kernels_need_torch_only():
    """In a process where everything else of ours and of the training stack is out of reach."""
    blocked = ("mvd_fast", "nvidia.dali", "deepspeed", "pydantic", "rich", "av")
    script = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import mvd_kernels, torch; "
    script += "print(mvd_kernels.tube_mask(0, 0, torch.arange(2), (8, 14, 14), 0.9).mask.sum().item())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2816"


def test_importing_mvd_fast_is_cheap():
    script = "import sys, mvd_fast; print(sorted({'torch', 'numpy', 'pydantic', 'deepspeed'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- names ----


def test_nothing_shadows_other_modules():
    """`deepspeed mvd_fast/train.py` puts mvd_fast/ itself first on sys.path: its files become top-level names."""
    children = {path.stem for path in PACKAGES["mvd_fast"].iterdir() if path.suffix == ".py" or path.is_dir()}
    names = (children | set(PACKAGES)) - {"__init__", "__pycache__"}
    installed = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if set(distributions) != {"mvd-fast"}
    }
    assert "torch" in installed
    assert not names & set(sys.stdlib_module_names)
    assert not names & installed


# ---- the distribution ----


def test_one_version():
    assert mvd_fast.__version__ == mvd_kernels.__version__ == importlib.metadata.version("mvd-fast")


def test_command_is_installed():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="mvd-fast")
    assert command.value == "mvd_fast.cli:main"


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    """Names in a wheel built from a copy of the sources, without the native code (which would take a minute)."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("mvd_fast", "kernels", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "LICENSE"):
        shutil.copy(file, copy)
    script = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    environment = os.environ | {"MVD_FAST_NO_NATIVE": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=copy, env=environment, check=True, capture_output=True)
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_holds_two_packages_and_all_their_files(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {"mvd_fast", "mvd_kernels", f"mvd_fast-{mvd_fast.__version__}.dist-info"}
    for package, folder in PACKAGES.items():
        sources = {f"{package}/{file.relative_to(folder)}" for file in folder.rglob("*.py")}
        assert sources <= set(wheel_names)


def test_wheel_holds_the_recipes(wheel_names):
    recipes = {f"mvd_fast/configs/{file.relative_to(ROOT / 'configs')}" for file in (ROOT / "configs").rglob("*.json")}
    assert "mvd_fast/configs/vitl.json" in recipes
    assert recipes <= set(wheel_names)


def test_native_code_is_built():
    assert mvd_kernels.implementation("tube_mask", "cpu")[0] == "cpp"


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {requirement.split(">")[0].split("=")[0].lower() for requirement in wanted}
    assert names <= pinned


# ---- doctor ----


def test_doctor_reports_and_returns_zero(capsys):
    assert doctor.main() == 0
    text = capsys.readouterr().out
    for expected in ("python", "torch", "tube_mask (cpu)", "cpp", "DALI plugin", "loads"):
        assert expected in text


@pytest.mark.parametrize("columns", [60, 120])
def test_doctor_survives_what_is_missing(monkeypatch, columns):
    def broken():
        yield "triton", "3.8"
        raise OSError("libcuda.so.1: cannot open shared object file\nmore")

    def no_package(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "operators", broken)
    monkeypatch.setattr(importlib.metadata, "version", no_package)
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    monkeypatch.setenv("COLUMNS", str(columns))
    text = " ".join(doctor.report().split())  # a narrow table wraps
    assert "not installed" in text
    assert "no g++" in text
    assert "OSError" in text
    assert "cannot open shared object file" in text

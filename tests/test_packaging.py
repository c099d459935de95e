"""What is installed, under which names, and who may import whom."""

from __future__ import annotations

import ast
import email
import graphlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

import mvd_fast
import mvd_kernels
from mvd_fast.tools import doctor
from mvd_kernels import _dispatch

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
    "mvd_fast.files": set(),
    "mvd_fast.config": set(),
    "mvd_fast.arguments": set(),
    "mvd_fast.machine": set(),
    "mvd_fast.training.launch": set(),
    "mvd_fast.models": {"mvd_kernels"},
    "mvd_fast.convert": {"mvd_fast.models"},
    "mvd_fast.data": {"mvd_kernels"},
    "mvd_fast.tools": set(),
    "mvd_fast.tools.doctor": {"mvd_fast.data", "mvd_kernels"},
    "mvd_fast.evaluation": {
        "mvd_fast.data",
        "mvd_fast.convert",
        "mvd_fast.models",
        "mvd_fast.training.launch",
        "mvd_kernels",
    },
    "mvd_fast.targets": {"mvd_fast.models", "mvd_fast.convert"},
    "mvd_fast.tasks": {
        "mvd_fast.data",
        "mvd_fast.evaluation",
        "mvd_fast.convert",
        "mvd_fast.models",
        "mvd_fast.targets",
        "mvd_kernels",
    },
    "mvd_fast.target_store": {
        "mvd_fast.data",
        "mvd_fast.models",
        "mvd_fast.tasks",
        "mvd_fast.training.launch",
        "mvd_kernels",
    },
    "mvd_fast.training": {
        "mvd_fast.data",
        "mvd_fast.convert",
        "mvd_fast.models",
        "mvd_fast.target_store",
        "mvd_fast.tasks",
        "mvd_fast.training.launch",
    },
    "mvd_fast.tools.plan": {
        "mvd_fast.data",
        "mvd_fast.models",
        "mvd_fast.target_store",
        "mvd_fast.tasks",
        "mvd_fast.training",
        "mvd_kernels",
    },
    "mvd_fast.train": {
        "mvd_fast.tools.plan",
        "mvd_fast.tasks",
        "mvd_fast.training",
        "mvd_fast.training.launch",
    },
    "mvd_fast.finetune": {"mvd_fast.train"},
    "mvd_fast.tools.report": set(),
    "mvd_fast.tools.demo": {
        "mvd_fast.data",
        "mvd_fast.evaluation",
        "mvd_fast.convert",
        "mvd_fast.models",
        "mvd_fast.tools.report",
        "mvd_fast.tasks",
        "mvd_fast.training",
    },
    "mvd_fast.cli": {
        "mvd_fast.tools.doctor",
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
        if not set(distributions) <= {"mvd-fast", "mvd-kernels"}
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


# ---- the distribution of the kernels alone ----


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What the distribution mvd-kernels is built from: kernels/ and what it links to."""
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build", "dist", "*.egg-info")
    for name in ("kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "LICENSE", copy)
    return copy


def in_kernels(checkout: Path, script: str, **environment: str) -> str:
    """What a script prints that runs as pip runs the build backend of kernels/."""
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); import backend, native; {script}"],
        cwd=checkout / "kernels",
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout


def test_kernels_alone_need_torch_alone(checkout):
    """Of the same versions as mvd-fast; without a compiler the wheel is for any machine."""
    output = in_kernels(checkout, "backend.build_wheel('dist')", CXX="no-such-compiler")
    assert "there is no no-such-compiler, so its operators will run as plain PyTorch" in output
    with zipfile.ZipFile(checkout / f"kernels/dist/mvd_kernels-{mvd_kernels.__version__}-py3-none-any.whl") as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    folder = PACKAGES["mvd_kernels"]
    assert {f"mvd_kernels/{file.relative_to(folder)}" for file in folder.rglob("*.py")} <= names
    assert {name.split("/")[0] for name in names} == {
        "mvd_kernels",
        f"mvd_kernels-{mvd_kernels.__version__}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    fields = email.message_from_string(metadata)
    (torch,) = (Requirement(one) for one in root["dependencies"] if Requirement(one).name == "torch")
    assert [Requirement(one) for one in fields.get_all("Requires-Dist")] == [torch]
    assert fields["Requires-Python"] == root["requires-python"]
    assert fields["License-Expression"] == root["license"]


def test_source_distribution_of_the_kernels_carries_the_sources(checkout):
    in_kernels(checkout, "backend.build_sdist('dist')")
    top = f"mvd_kernels-{mvd_kernels.__version__}"
    with tarfile.open(checkout / f"kernels/dist/{top}.tar.gz") as archive:
        files = {member.name.removeprefix(f"{top}/") for member in archive if member.isreg()}
        assert not any(member.issym() for member in archive)
    sources = {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir() if file.suffix in (".cpp", ".h")}
    assert sources <= files and not any("dali" in name or name.endswith(".so") for name in files)
    assert {"LICENSE", "README.md", "setup.py", "backend.py", "native.py", "pyproject.toml"} <= files


def test_build_of_the_kernels_asks_for_torch_only_where_there_is_none(checkout):
    """pip hides the environment's packages from an isolated build; torch is looked up there all the same."""
    ask = "print(backend.get_requires_for_build_wheel())"
    hide = "sys.path = [one for one in sys.path if 'site-packages' not in one]; "
    hide += "import importlib.util as u; assert u.find_spec('torch') is None; "
    assert in_kernels(checkout, hide + ask, CXX=sys.executable).split() == ["[]"]
    nowhere = "native.sysconfig.get_path = lambda name: '/nowhere'; "
    assert "torch" in in_kernels(checkout, hide + nowhere + ask, CXX=sys.executable)
    assert in_kernels(checkout, hide + nowhere + ask, CXX="no-such-compiler").split() == ["[]"]
    assert in_kernels(checkout, hide + nowhere + ask, CXX=sys.executable, MVD_FAST_NO_NATIVE="1").split() == ["[]"]


def test_operators_built_for_another_torch_are_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "mvd_kernels._C", SimpleNamespace(torch_version="2.1.0+cpu"))
    module, reason = _dispatch.extension.__wrapped__()
    assert module is None
    assert reason.startswith(f"the C++ extension is built for torch 2.1.0+cpu, and this is {torch.__version__} (")


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


def test_doctor_says_that_both_distributions_are_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    assert "mvd-fast contains it: `pip uninstall mvd-kernels`" in " ".join(doctor.report().split())

"""`mvd-fast doctor`: versions, devices, and which implementation every operator uses and why."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.table import Table

from mvd_fast.machine import cpu_name

Row = tuple[str, ...]

PACKAGES = (
    *("mvd-fast", "torch", "triton", "deepspeed", "nvidia-dali-cuda130", "xformers", "av", "numpy", "pydantic"),
    *("safetensors", "tensorboard", "rich", "scikit-learn", "matplotlib", "timm", "transformers"),
)


def main() -> int:
    """Print the report; 0 always: what is missing is reported, not an error."""
    print(report())
    return 0


def report() -> str:
    """The whole report as text."""
    sections: tuple[tuple[str, Callable[[], Iterable[Row]]], ...] = (
        ("Versions", versions),
        ("Devices", devices),
        ("Operators", operators),
        ("Native code", native_code),
        ("Kinds", kinds),
    )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for _ in range(2):
        table.add_column(overflow="fold")  # on a narrow terminal, too, no error loses its end
    for title, section in sections:
        table.add_row(f"[bold]{title}[/bold]")
        for row in _collect(section):
            table.add_row(f"  {row[0]}", *row[1:])
    console = Console(file=io.StringIO(), width=shutil.get_terminal_size((120, 40)).columns)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def versions() -> Iterator[Row]:
    yield "python", platform.python_version(), platform.platform()
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    try:  # the same files twice, of which uninstalling either removes one
        version = importlib.metadata.version("mvd-kernels")
        yield "mvd-kernels", version, "mvd-fast contains it: `pip uninstall mvd-kernels`, then install mvd-fast again"
    except importlib.metadata.PackageNotFoundError:
        pass


def devices() -> Iterator[Row]:
    yield "cpu", cpu_name(), f"{len(os.sched_getaffinity(0))} cores"
    from mvd_kernels._dispatch import extension

    module, problem = extension()
    features = " ".join(module.cpu_features()) or "none known" if module else "unknown"
    yield "instruction sets", features, f"operators use {module.isa_name()}" if module else problem or ""
    import torch

    if not torch.cuda.is_available():
        yield (
            "gpu",
            "none",
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is CPU only",
        )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield f"cuda:{index}", properties.name, f"sm_{properties.major}{properties.minor}, {memory:.0f} GiB"


def operators() -> Iterator[Row]:
    import torch

    import mvd_kernels

    for name in mvd_kernels.operators():
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            yield f"{name} ({device})", *mvd_kernels.implementation(name, device)


def native_code() -> Iterator[Row]:
    yield "compiler", _first_line("g++", "--version"), _first_line("nvcc", "--version", last=True)
    from mvd_kernels._dispatch import extension

    module, problem = extension()
    yield "mvd_kernels._C", f"built with g++ {module.compiler}" if module else "missing", problem or ""
    from mvd_fast.data.dali_plugin import PluginError, load_plugin, plugin_path

    try:
        load_plugin()
        yield "DALI plugin", "loads", plugin_path().name
    except PluginError as error:
        yield "DALI plugin", "missing", str(error)


def kinds() -> Iterator[Row]:
    """What a config can name; further ones are files in the folders of MVD_PLUGINS."""
    from mvd_fast.config.kinds import DATASETS, TARGETS, TASKS, available_kinds

    for title, package in (("tasks", TASKS), ("targets", TARGETS), ("datasets", DATASETS)):
        yield title, ", ".join(available_kinds(package)), package


def _collect(section: Callable[[], Iterable[Row]]) -> list[Row]:
    """The rows of a section up to the first thing that fails, whatever that is; the last row then names it."""
    rows = []
    try:
        rows.extend(section())
    except Exception as error:  # a broken optional piece is what the report is for
        rows.append(("failed", type(error).__name__, str(error).split("\n")[0]))
    return rows


def _first_line(program: str, *arguments: str, last: bool = False) -> str:
    if shutil.which(program) is None:
        return f"no {program}"
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20)
    lines = result.stdout.strip().splitlines()
    return lines[-1 if last else 0] if lines else f"{program} does not run"

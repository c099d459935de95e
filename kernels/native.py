"""How the C++ operators are built: by the distribution mvd-kernels, and by mvd-fast, which contains it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext


def why_not() -> str | None:
    """Why there is no native build; None where there is one."""
    if os.environ.get("MVD_FAST_NO_NATIVE") == "1":
        return "MVD_FAST_NO_NATIVE is 1"
    if sys.platform != "linux":
        return f"the C++ operators are for Linux, not {sys.platform}"
    compiler = os.environ.get("CXX", "g++")
    return f"there is no {compiler}" if shutil.which(compiler) is None else None


def finds_torch() -> bool:
    """Whether torch can be imported; pip's build isolation hides the environment's, which is the one to build with."""
    if importlib.util.find_spec("torch") is None:
        sys.path += sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} - {*sys.path})
    return importlib.util.find_spec("torch") is not None


def operators(csrc: Path) -> Extension:
    """mvd_kernels._C from the sources in `csrc`, a path relative to setup.py, for any x86-64 processor.

    MVD_EMULATE_AVX512=1 compiles its AVX-512 code as plain C.
    """
    import torch
    from torch.utils.cpp_extension import CppExtension

    emulation = ["-DMVD_EMULATE_AVX512", "-mavx2", "-mfma"] if os.environ.get("MVD_EMULATE_AVX512") == "1" else []
    return CppExtension(
        "mvd_kernels._C",
        sorted(str(file) for file in csrc.glob("*.cpp")),
        depends=sorted(str(file) for file in csrc.glob("*.h")),
        define_macros=[("MVD_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args=["-O3", "-g0", "-fopenmp", *emulation],
        extra_link_args=["-fopenmp", "-s"],
    )


def build_command(project: str, hint: str) -> type[build_ext]:
    """The command that builds extensions with torch's headers; where it fails it ends with a sentence and `hint`."""
    from torch.utils.cpp_extension import BuildExtension

    class NativeBuild(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                sys.exit(f"{project}'s native build failed ({error}); the compiler's message is above. Fix it, {hint}")

    return NativeBuild

"""Packages and native build of mvd-kernels; everything else stands in pyproject.toml.

The C++ operators are built with g++ against the torch of the environment. Without g++, or with MVD_FAST_NO_NATIVE=1,
the operators run as plain PyTorch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
import native

SKIP_HINT = "or set MVD_FAST_NO_NATIVE=1 to install the operators as plain PyTorch."


class NeedsTorch(build_ext):
    """Stands where there is no torch, which only a build needs: a source distribution can be made without."""

    def run(self) -> None:
        sys.exit(f"mvd-kernels' native build needs torch in the environment: install it first, {SKIP_HINT}")


def native_build() -> dict:
    if reason := native.why_not():
        print(f"mvd-kernels: {reason}, so its operators will run as plain PyTorch")
        return {}
    if not native.finds_torch():
        return {"ext_modules": [Extension("mvd_kernels._C", [])], "cmdclass": {"build_ext": NeedsTorch}}
    return {
        "ext_modules": [native.operators(Path("csrc"))],
        "cmdclass": {"build_ext": native.build_command("mvd-kernels", SKIP_HINT)},
    }


setup(packages=find_packages(include=["mvd_kernels", "mvd_kernels.*"]), zip_safe=False, **native_build())

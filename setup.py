"""Packages and native build of mvd-fast; everything else stands in pyproject.toml.

Builds with g++ and ninja, for any x86-64 processor (operators choose instruction sets at run time):
* mvd_kernels._C              csrc/*.cpp      operators for the CPU (kernels/native.py)
* mvd_fast.data._dali_plugin  csrc/dali/*.cc  operators inside DALI pipelines; also for the GPU where nvcc is found

MVD_FAST_NO_NATIVE=1 leaves both out; the operators then run as plain PyTorch, and there is no training.
MVD_EMULATE_AVX512=1 builds the operators alone, their AVX-512 code as plain C (`make emulate` tests it).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import native

CSRC = Path("csrc")
CUDA_MAJOR = 13  # of the DALI wheel
CUDA_HEADERS = {  # wheel: a header that DALI's headers need from it
    "runtime": "include/cuda_runtime_api.h",
    "crt": "include/crt/host_defines.h",
    "cccl": "include/cccl/cuda/std/version",
}
NEEDED = {"torch": "torch", "nvidia.dali": "nvidia-dali-cuda130", "ninja": "ninja"}
SKIP_HINT = "or set MVD_FAST_NO_NATIVE=1 to install the operators as plain PyTorch; training needs the native code."


def main() -> None:
    extensions = {} if os.environ.get("MVD_FAST_NO_NATIVE") == "1" else native_build()
    setup(
        packages=[
            *find_packages(include=["mvd_fast", "mvd_fast.*"]),
            *find_packages("kernels", include=["mvd_kernels", "mvd_kernels.*"]),
            "mvd_fast.configs",
        ],
        # A top-level package called `kernels` would shadow the one of that name on PyPI.
        package_dir={"mvd_kernels": "kernels/mvd_kernels", "mvd_fast.configs": "configs"},
        package_data={"mvd_fast": ["**/*.html", "**/*.css", "**/*.js"], "mvd_fast.configs": ["**/*.json"]},
        zip_safe=False,
        **extensions,
    )


def native_build() -> dict:
    missing = [wheel for module, wheel in NEEDED.items() if not is_installed(module)]
    for wheel, header in CUDA_HEADERS.items():
        if not any((root / header).is_file() for root in cuda_wheels()):
            missing.append(f"nvidia-cuda-{wheel}=={CUDA_MAJOR}.0.*")
    if missing:
        sys.exit(
            f"mvd-fast's native build needs {', '.join(missing)} in the environment first: `make setup` does it all; "
            f"by hand `pip install {' '.join(missing)}`, then install mvd-fast with --no-build-isolation; {SKIP_HINT}"
        )
    if not shutil.which(os.environ.get("CXX", "g++")):
        sys.exit(f"mvd-fast's native build needs a C++ compiler: install g++ (or point CXX to one), {SKIP_HINT}")
    emulate = os.environ.get("MVD_EMULATE_AVX512") == "1"

    class NativeBuild(native.build_command("mvd-fast", SKIP_HINT)):
        def build_extensions(self) -> None:
            if not emulate:
                add_gpu_operators(self.extensions[-1], Path(self.build_temp))
            super().build_extensions()

    extensions = [native.operators(CSRC)] + ([] if emulate else [dali_plugin()])
    return {"ext_modules": extensions, "cmdclass": {"build_ext": NativeBuild}}


def dali_plugin() -> Extension:
    """The DALI plugin: a shared library built like an extension module, but loaded by DALI and never imported."""
    from nvidia.dali import sysconfig

    headers = [
        sysconfig.get_include_dir(),
        *(str(root / path) for root in cuda_wheels() for path in ("include", "include/cccl")),
    ]
    return Extension(
        "mvd_fast.data._dali_plugin",
        sorted(str(file) for file in (CSRC / "dali").glob("*.cc") if not file.stem.endswith("_gpu")),
        depends=sorted(map(str, [*CSRC.glob("*.h"), *CSRC.glob("dali/*.h")])),
        include_dirs=[str(CSRC.resolve())],
        library_dirs=[sysconfig.get_lib_dir()],
        libraries=["dali", "dali_core"],
        # -isystem: DALI's headers warn in code that is not ours.
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-Wno-unused-variable", "-Wno-free-nonheap-object"]
        + [f"-isystem{path}" for path in headers]
        + [flag for flag in sysconfig.get_compile_flags() if not flag.startswith("-I")],
        # Undefined symbols show when it is linked or loaded: at the first call they would end the process.
        extra_link_args=["-s", "-Wl,--no-undefined", "-Wl,-z,now"],
    )


def cuda_wheels() -> list[Path]:
    """Where the wheels nvidia-cuda-{runtime,crt,cccl} lie: all that DALI's headers need, without a CUDA toolkit."""
    if not is_installed("nvidia"):
        return []
    import nvidia

    return [path for root in nvidia.__path__ if (path := Path(root) / f"cu{CUDA_MAJOR}").is_dir()]


def add_gpu_operators(plugin: Extension, build_folder: Path) -> None:
    """Add the GPU operators to the plugin where a fitting nvcc compiles them; the CPU operators do not depend on it."""
    nvcc = find_nvcc()
    if nvcc is None:
        return
    build_folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sorted((CSRC / "dali").glob("*.cu")):
        objects.append(str(build_folder / f"{source.stem}.cu.o"))
        flags = ["-O3", "-arch=all-major", "-std=c++17", "-Xcompiler", "-fPIC", f"-I{CSRC}", "-c", "-o", objects[-1]]
        if subprocess.run([nvcc, *flags, str(source)]).returncode:
            print(f"mvd-fast: {nvcc} does not compile {source}; the DALI plugin gets its CPU operators only")
            return
    plugin.sources += sorted(str(file) for file in (CSRC / "dali").glob("*_gpu.cc"))
    plugin.extra_objects += objects
    plugin.library_dirs += [str(root / "lib") for root in cuda_wheels()]
    plugin.libraries += ["cudart_static", "rt", "pthread", "dl"]


def find_nvcc() -> str | None:
    """An nvcc of DALI's CUDA release: its objects must fit the runtime that they are linked with."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if nvcc is None:
        return None
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return nvcc if f"release {CUDA_MAJOR}." in version else None


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


main()

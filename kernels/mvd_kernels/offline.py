"""Compiles every Triton kernel for GPUs that need not be there, and predicts what each launch costs on them.

    python -m mvd_kernels.offline TABLE.json            check against the table (`make kernels-check`)
    python -m mvd_kernels.offline TABLE.json --update   write the table anew

An operator's module gives its production shapes as `offline_cases()`: pairs of a name and a function that calls the
module's launchers with tensors on the meta device. `_triton.launch` lists the launches instead of starting them. Each,
in every configuration of its autotuner, is compiled for sm_80, sm_90 and sm_100. Registers and spills are read from
the binary, shared memory is Triton's. The table holds all of them; spills must be zero.

Times are roofline bounds: the larger of FLOP / peak and bytes / bandwidth. They are predicted, not measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvd_kernels._dispatch import operators
from mvd_kernels._triton import HAS_TRITON, OPTIONS, Launch, interpreting, record_launches, triton

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use
REGISTERS = 65536  # of a multiprocessor
TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
}
FP8_ARCHITECTURE = 89  # the first that multiplies it
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Gpu:
    """Dense peaks in FLOP/s by bits of what is multiplied, and bytes/s, as NVIDIA's data sheets give them."""

    name: str
    peak: dict[int, float]
    bandwidth: float


# A product of fp32 is three of TF32 (tf32x3), which is faster than the fp32 units.
A100 = Gpu("A100", {8: 624e12, 16: 312e12, 32: 156e12 / 3}, 2.039e12)
H100 = Gpu("H100", {8: 1979e12, 16: 989e12, 32: 494.5e12 / 3}, 3.35e12)


@dataclass(frozen=True)
class Build:
    """One kernel, with all that decides about its code; picklable."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # places of arguments that Triton knows to be multiples of 16
    unaligned: tuple[str, ...]  # integers that it has seen not to be
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """Kernel, dtypes, constants and options: what tells builds apart, in the table."""
        types = "".join(f" {kind}" for kind in dict.fromkeys(k for _, k in self.signature if k.startswith("*")))
        settings = "".join(f" {name}={value}" for name, value in (*self.constants, *self.options))
        unaligned = f" unaligned={','.join(self.unaligned)}" if self.unaligned else ""
        return f"{self.module.rsplit('.', 1)[-1]}.{self.kernel}{types}{settings}{unaligned}"

    @property
    def architectures(self) -> tuple[int, ...]:
        """Those that it is for."""
        fp8 = any(kind == "*fp8e4nv" for _, kind in self.signature)
        return tuple(one for one in ARCHITECTURES if one >= FP8_ARCHITECTURE or not fp8)


# ---- what is to be compiled ----


def cases() -> Iterator[tuple[str, str, Launch]]:
    """(operator, case, launch) of all operators at their production shapes."""
    for operator in operators():
        module = importlib.import_module(f"mvd_kernels.{operator}")
        for case, call in getattr(module, "offline_cases", tuple)():
            with record_launches() as launches:
                call()
            yield from ((operator, case, launch) for launch in launches)


def builds(launch: Launch) -> list[Build]:
    """A build for every configuration of the launched kernel."""
    configs = [({}, {})]
    if isinstance(launch.kernel, triton.runtime.Autotuner):
        configs = [(config.kwargs, {n: getattr(config, n) for n in OPTIONS}) for config in launch.kernel.configs]
    return [_build(function_of(launch.kernel), launch, constants, options) for constants, options in configs]


def function_of(kernel: Any) -> Any:
    """The kernel without its autotuner."""
    return kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel


def named_builds(launches: list[tuple[str, str, Launch]]) -> dict[str, Build]:
    """All builds, each once."""
    named: dict[str, Build] = {}
    for _, _, launch in launches:
        for build in builds(launch):
            assert named.setdefault(build.name, build) == build, f"another build is named {build.name}"
    return named


def _build(kernel: Any, launch: Launch, constants: dict[str, Any], options: dict[str, int]) -> Build:
    constants = {**launch.constants, **constants}
    options = {**options, **{name: constants.pop(name) for name in OPTIONS if name in constants}}
    signature, aligned, unaligned = {}, [], []
    for place, (parameter, value) in enumerate(zip(kernel.params, launch.arguments, strict=False)):
        name, specialise = parameter.name, not parameter.do_not_specialize
        signature[name] = _type(value, specialise)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            aligned.append(place)  # as torch allocates
        elif isinstance(value, int) and specialise:
            aligned += [place] * (value % 16 == 0)
            unaligned += [name] * (value % 16 != 0)
    signature |= {name: "constexpr" for name in kernel.arg_names if name in constants}
    missing = [name for name in kernel.arg_names if name not in signature]
    assert not missing, f"{kernel.__name__} is launched without {missing}"
    ordered = tuple((name, signature[name]) for name in kernel.arg_names)
    parts = (sorted(constants.items()), aligned, unaligned, sorted(options.items()))
    return Build(kernel.fn.__module__, kernel.fn.__name__, ordered, *map(tuple, parts))


def _type(value: Any, specialise: bool) -> str:
    """As Triton's launcher would specialise it: an integer 1 becomes a constant."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int) and not isinstance(value, bool) and (value != 1 or not specialise):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "constexpr"


# ---- compiling ----


def try_to_compile(build: Build, architecture: int) -> dict[str, Any]:
    """What compile_one gives, or the last line of what the compiler says as "failed"."""
    try:
        return compile_one(build, architecture)
    except Exception as error:  # whatever it is: the other kernels are to be compiled all the same
        return {"failed": f"{type(error).__name__}: {error.__cause__ or error}".strip().splitlines()[-1]}


def compile_one(build: Build, architecture: int) -> dict[str, int]:
    """-> registers and spills (bytes) of a thread, shared (bytes) and threads of a block."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = function_of(getattr(importlib.import_module(build.module), build.kernel))
    attributes = {(place,): [["tt.divisibility", 16]] for place in build.aligned}
    source = ASTSource(function, dict(build.signature), constexprs=dict(build.constants), attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=dict(build.options))
    registers, stack = _usage(compiled.asm["cubin"])
    threads = compiled.metadata.num_warps * 32
    return {"registers": registers, "shared": compiled.metadata.shared, "spills": stack, "threads": threads}


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of the stack: Triton's kernels have none but for what does not fit the registers.

    Not ptxas again with -v: Triton has options of its own for it, which differ from release to release.
    """
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return int(registers), int(stack)


def compile_all(wanted: list[Build], workers: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Build name -> "sm_80" -> what try_to_compile gives."""
    jobs = [(build, architecture) for build in wanted for architecture in build.architectures]
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = pool.map(try_to_compile, *zip(*jobs, strict=True), chunksize=4)
        table: dict[str, dict[str, dict[str, Any]]] = {}
        for (build, architecture), result in zip(jobs, results, strict=True):
            table.setdefault(build.name, {})[f"sm_{architecture}"] = result
    return table


# ---- checking ----


def problems(table: dict, committed: dict, same_version: bool) -> list[str]:
    """What is wrong with freshly compiled kernels, in sentences."""
    found = []
    for name, targets in table.items():
        for target, now in targets.items():
            if "failed" in now:
                found.append(f"{name} does not compile for {target}: {now['failed']}")
                continue
            limit = SHARED_LIMIT[int(target.removeprefix("sm_"))]
            if now["spills"]:
                found.append(f"{name} spills {now['spills']} bytes on {target}; use smaller blocks or more warps")
            if now["shared"] > limit:
                found.append(f"{name} needs {now['shared']} bytes of shared memory on {target}, which has {limit}")
            if now["registers"] * now["threads"] > REGISTERS:
                found.append(f"{name} needs {now['registers']} registers in {now['threads']} threads on {target}")
            before = committed.get(name, {}).get(target)
            if same_version and before not in (None, now):
                found.append(f"{name} on {target} was {before} and is {now}; if that is meant, write the table anew")
    found += [f"{name} is not in the table; write it anew" for name in table if name not in committed]
    return found + [f"{name} is in the table and not launched any more" for name in committed if name not in table]


def predicted(launch: Launch, gpu: Gpu) -> tuple[float, str]:
    """Seconds that a launch takes at least, and what bounds it."""
    dtypes = {x.dtype for x in launch.arguments if isinstance(x, torch.Tensor)}
    bits = 8 if dtypes & set(EIGHT_BITS) else 16 if dtypes & {torch.float16, torch.bfloat16} else 32
    compute, memory = launch.flops / gpu.peak[bits], launch.bytes / gpu.bandwidth
    return max(compute, memory), "compute" if compute > memory else "memory"


def roofline(launches: list[tuple[str, str, Launch]]) -> list[str]:
    """A line for every launch: its work, and its least time."""
    head = f"{'operator':<20} {'case':<34} {'kernel':<26} {'MFLOP':>9} {'MB':>8} {'FLOP/B':>7}"
    lines = ["predicted, not measured: least microseconds on an A100 and an H100, and what bounds them on the H100"]
    lines.append(f"{head} {'A100':>9} {'H100':>9} (predicted, not measured)")
    for operator, case, launch in launches:
        work = f"{launch.flops / 1e6:9.1f} {launch.bytes / 1e6:8.2f} {launch.flops / max(launch.bytes, 1):7.1f}"
        (a100, _), (h100, bound) = (predicted(launch, gpu) for gpu in (A100, H100))
        times = f"{a100 * 1e6:9.2f} {h100 * 1e6:9.2f} {bound}"
        lines.append(f"{operator:<20} {case:<34} {function_of(launch.kernel).__name__:<26} {work} {times}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mvd_kernels.offline", description=__doc__.split("\n\n")[0])
    parser.add_argument("table", type=Path, help="JSON file with what the kernels need")
    parser.add_argument("--update", action="store_true", help="write the table instead of checking it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args(arguments)
    if not HAS_TRITON or interpreting():
        print("kernels cannot be compiled: install triton, and leave TRITON_INTERPRET unset", file=sys.stderr)
        return 1
    if not options.update and not options.table.is_file():
        print(f"there is no table {options.table}; --update writes one", file=sys.stderr)
        return 1
    launches = list(cases())
    print("\n".join(roofline(launches)))
    table = compile_all(list(named_builds(launches).values()), options.workers)
    content = {"made with": f"triton {triton.__version__}", "kernels": dict(sorted(table.items()))}
    committed = content if options.update else json.loads(options.table.read_text())
    found = problems(table, committed["kernels"], committed["made with"] == content["made with"])
    if options.update and not any("failed" in one for targets in table.values() for one in targets.values()):
        options.table.write_text(as_text(content))
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(table)} kernels compiled for {', '.join(f'sm_{a}' for a in ARCHITECTURES)}; {len(found)} problems")
    return int(bool(found))


def as_text(content: dict) -> str:
    """The table as JSON with a line for every kernel, for readable differences."""
    kernels = ",\n".join(f" {json.dumps(name)}: {json.dumps(one)}" for name, one in content["kernels"].items())
    return f'{{"made with": {json.dumps(content["made with"])},\n"kernels": {{\n{kernels}\n}}}}\n'


if __name__ == "__main__":
    sys.exit(main())

"""A GPU that is not there, to time what Triton's launches cost the host: kernels are compiled, launches do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from mvd_kernels import _dispatch, use_impl
from mvd_kernels._triton import interpreting, triton


class Launcher:
    """Stands for the compiled function that hands a kernel's arguments to the driver: grid, stream, function, .. ."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _Driver:
    """As much of Triton's CudaDriver as a launch asks for: an H100."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (name, kernel, 32, 0, 1024),  # module, function, registers, ..
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles: [1.0] * len(quantiles)


@contextmanager
def stub_gpu() -> Iterator[None]:
    """Inside, operators run as their Triton launchers on tensors of the CPU; results are whatever the memory held."""
    assert not interpreting(), "leave TRITON_INTERPRET unset"
    before, _dispatch._triton_problem = _dispatch._triton_problem, lambda device: None
    driver, triton.runtime.driver._active = triton.runtime.driver._active, _Driver()
    try:
        with use_impl("triton"):
            yield
    finally:
        _dispatch._triton_problem, triton.runtime.driver._active = before, driver

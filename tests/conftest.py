"""Shared by all tests: two threads, and Triton kernels in the interpreter where there is no GPU."""

from __future__ import annotations

import os
import signal

import pytest
import torch

# A shell's background job begins with Ctrl-C ignored, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(2)
# Else a test may meet what torch.compile made of an earlier version of an operator.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before mvd_kernels is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from op_checks import IMPLEMENTATIONS, LANGUAGES, running  # noqa: E402 (after the interpreter is chosen)


def pytest_configure() -> None:
    """Some tests start pytest themselves, which is no worker of this session's."""
    os.environ.pop("PYTEST_XDIST_WORKER", None)


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest):
    """Every implementation of the fused operators that runs here, in turn; gives the device of its tensors."""
    with running(request.param) as device:
        yield device


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest):
    """C++ with the widest instruction set, and Triton; gives the device of the tensors."""
    with running(request.param) as device:
        yield device

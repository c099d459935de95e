"""`triton` and `tl` for the op files, which must also import where Triton is not installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    def _leave_undecorated(function: Any = None, **_options: Any) -> Any:
        return function if function is not None else lambda later: later

    triton = SimpleNamespace(jit=_leave_undecorated)  # type: ignore[assignment]
    tl = SimpleNamespace()  # type: ignore[assignment]


def interpreting() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter (TRITON_INTERPRET=1 at import)."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


__all__ = ["HAS_TRITON", "interpreting", "tl", "triton"]

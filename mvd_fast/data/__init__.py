"""Data: lists, the DALI pipeline and the loader. The public entry is `build_loader`."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Worker processes import this package too; they need neither the loader nor torch.
    if name == "build_loader":
        from mvd_fast.data.loader import build_loader

        return build_loader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["build_loader"]

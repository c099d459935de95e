"""The project's DALI operators: loading the plugin, and their form inside a pipeline."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvd_fast.errors import UserError
from mvd_kernels import masked_per_slice

BUILD_COMMAND = "pip install -e . --no-build-isolation"


class PluginError(UserError):
    """The DALI plugin is not built, or does not load."""


def plugin_path() -> Path | None:
    """The plugin's shared library, or None where it is not built."""
    return next(iter(sorted(Path(__file__).parent.glob("_dali_plugin*.so"))), None)


@functools.cache
def load_plugin() -> None:
    """Make `fn.mvd_tube_mask` known to DALI; calling it again does nothing.

    Raises:
        PluginError: if the plugin is not built or does not fit the DALI that is installed; says how to build it.
    """
    from nvidia.dali import plugin_manager

    path = plugin_path()
    if path is None:
        raise PluginError(f"the DALI plugin is not built; `{BUILD_COMMAND}` in the checkout builds it")
    try:
        plugin_manager.load_library(str(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PluginError(f"the DALI plugin does not load ({reason}); build it again with `{BUILD_COMMAND}`") from error


def tube_mask(numbers: Any, grid: Sequence[int], ratio: float) -> Any:
    """Tube masks inside a DALI pipeline, equal to `mvd_kernels.tube_mask`.

    Args:
        numbers: DataNode of int64 [3] per sample: (seed, epoch, sample).
        grid: tokens along time, height and width (T, H, W).
        ratio: share of masked positions, 0 to 1.

    Returns:
        DataNode of bool [T * H * W] per sample, True = masked; on the CPU or GPU, where `numbers` is.
    """
    load_plugin()
    from nvidia.dali import fn

    # DALI carries real arguments in single precision, which may round `ratio * H * W` to another count.
    return fn.mvd_tube_mask(numbers, grid=list(grid), masked=masked_per_slice(grid, ratio))
